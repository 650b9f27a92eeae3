"""Peers that speak the protocol wrongly, against a running deployment."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from fedtrain.deployment.session import Client, Dial
from fedtrain.deployment.site import Assembly, Owner
from fedtrain.deployment.terms import offer_for
from fedtrain.errors import ConnectionLostError, RefusedError
from fedtrain.experiment.load import load
from fedtrain.link.channel import Link, Task, connect
from fedtrain.link.control import Ack, Hello
from fedtrain.link.enrolment import server_credentials
from fedtrain.link.hub import Door, Hub
from fedtrain.link.identity import Identity


class Odd(Client):
    """Trains as it should, and answers also what it was not asked."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.acks: list[Ack] = []
        self.lost: list[str] = []
        self._before = ""

    def _work(self, task: Task, assembly: Assembly) -> None:
        packed, link = self._made(task, assembly), task.link

        def submit(number: str) -> None:
            self.acks.append(link.submit(task.notice.model_copy(update={"id": number}), packed))

        prefix, _, number = task.id.rpartition("-")
        submit(f"{prefix}-{int(number) - 1}")  # what client-0 was asked
        submit(f"{prefix}-1000")  # what nobody was asked
        submit("of-another-run-1")
        link._session, session = "0" * 32, link._session
        with pytest.raises(ConnectionLostError) as lost:
            submit(task.id)
        self.lost.append(str(lost.value))
        link._session = session
        if self._before:
            submit(self._before)  # of the round before
        submit(task.id)
        submit(task.id)  # again
        self._before = task.id


def test_answers_that_nobody_wants(deployment: Any) -> None:
    server = deployment.server()
    clients = deployment.clients("client-1")
    owner = Owner("client-1", deployment.folder, deployment.folder / "odd")
    dial = Dial(deployment.address, Identity.load(deployment.identity("client-1")).channel_credentials, once=True)
    odd = Odd(owner, dial, lambda _: None)
    odd.run()
    said = deployment.ends_well(server)
    for client in clients:
        client.ends(0)
    unwanted = [("refused", "this was asked of client-0"), *[("refused", "nobody asked for this")] * 2]
    wanted = [("accepted", ""), ("already", "")]
    later = [*unwanted, ("already", ""), *wanted]
    assert [(ack.verdict, ack.reason) for ack in odd.acks] == [*unwanted, *wanted, *later, *later]
    assert ["its session does not take part" in text for text in odd.lost] == [True] * 3
    assert said.count("an answer of client-1 is not used") == 3 * 3 + 2 + 3
    assert said.count("a call of client-1 at") == 3
    for record in deployment.rounds():
        assert record["participants"] == ["client-0", "client-1", "client-2"]
        assert not record["quarantined"]


def of_another_run(link: Link) -> None:
    link.offer = link.offer.model_copy(update={"run": "0" * 32})
    link.ready({})


@pytest.mark.parametrize(
    ("changes", "speak", "reason"),
    [
        ({"protocol": 2}, Link.close, "the client speaks protocol 2, the server 1"),
        ({"name": "client-0"}, Link.close, "its certificate is not of client-0"),
        ({}, of_another_run, "this is another run"),
        ({}, lambda link: link.ready({}), "it does not describe its data"),
        ({}, lambda link: link.ready({"data": {"kind": "\x1b[2J"}}), "it does not describe its data"),
    ],
)
def test_a_client_that_is_not_one(
    deployment: Any, changes: dict[str, Any], speak: Callable[[Link], None], reason: str
) -> None:
    server = deployment.server()
    server.says("waiting for 3 clients")
    credentials = Identity.load(deployment.identity("client-1")).channel_credentials()
    hello = Hello(**{"version": "1", "name": "client-1", "instance": "1", **changes})

    def come() -> None:
        with connect(deployment.address, credentials, hello) as link:
            speak(link)

    with pytest.raises(RefusedError, match=reason):
        come()
    server.says(f"is refused: {reason}")
    deployment.clients()
    assert "\x1b" not in deployment.ends_well(server)


def test_a_server_whose_experiment_is_not_the_one_it_names(deployment: Any, tmp_path: Any) -> None:
    (tmp_path / "experiment.toml").write_text(deployment.experiment)
    offer = offer_for(load(tmp_path / "experiment.toml"), "0" * 32)
    offer = offer.model_copy(update={"experiment_hash": "0" * 64})
    door = Door(server_credentials(deployment.authority, (), mutual=True))
    with Hub(deployment.address, offer, Nobody(), tmp_path, door):
        client = deployment.client("client-1")
        client.says("waiting: the offered experiment is not the one that its SHA-256 names")
    server = deployment.server()
    deployment.clients("client-1")
    deployment.ends_well(server)
    assert not re.search("Traceback", client.ends(0))


class Nobody:
    """Whom no client must come to."""

    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        raise AssertionError(name)

    def left(self, name: str) -> None:
        raise AssertionError(name)
