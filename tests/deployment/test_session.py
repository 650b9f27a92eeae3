"""A client's life against a real hub: what makes it dial anew, and what it leaves behind."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtrain.deployment import session
from fedtrain.deployment.session import Client, Dial
from fedtrain.deployment.site import Owner
from fedtrain.deployment.terms import offer_for
from fedtrain.errors import InputError
from fedtrain.experiment.sections import Experiment
from fedtrain.link.hub import Hub

RUN = "0" * 32


class Doorman:
    """Lets everybody in, and counts."""

    def __init__(self) -> None:
        self.came = threading.Semaphore(0)
        self.objection: str | None = None

    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        self.came.release()
        return self.objection

    def left(self, name: str) -> None:
        pass


@pytest.fixture
def doorman() -> Doorman:
    return Doorman()


@pytest.fixture
def hub(tmp_path: Path, doorman: Doorman) -> Iterator[Hub]:
    fields = {"task": {"name": "logistic"}, "data": {"name": "digits", "clients": 3}}
    offer = offer_for(Experiment.model_validate(fields), RUN)
    with Hub("127.0.0.1:0", offer, doorman, tmp_path) as hub:
        yield hub


@pytest.fixture
def client(tmp_path: Path, hub: Hub, said: list[str]) -> Client:
    owner = Owner("client-1", tmp_path, tmp_path / "home", device="cpu")
    return Client(owner, Dial(hub.address, once=True), said.append)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def running(client: Client, hub: Hub) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=client.run)
    thread.start()
    yield thread
    hub.close()
    thread.join(30)
    assert not thread.is_alive()


def test_a_client_dials_anew_when_it_is_told_to(
    client: Client, doorman: Doorman, said: list[str], running: threading.Thread
) -> None:
    for _ in range(3):
        assert doorman.came.acquire(timeout=30)
        client.reconnect()
    assert doorman.came.acquire(timeout=30)
    assert not [text for text in said if text.startswith("waiting for")]


def test_credentials_that_change_while_it_dials(hub: Hub, doorman: Doorman, tmp_path: Path) -> None:
    dials: list[str] = []

    def credentials() -> None:
        if not dials:
            client.reconnect()
        dials.append("one")

    owner = Owner("client-1", tmp_path, tmp_path / "home", device="cpu")
    client = Client(owner, Dial(hub.address, credentials, once=True), lambda _: None)
    thread = threading.Thread(target=client.run)
    thread.start()
    for _ in range(2):
        assert doorman.came.acquire(timeout=30)
    hub.close()
    thread.join(30)
    assert not thread.is_alive()


def test_a_fault_that_nobody_foresaw_is_one_line_and_no_end(
    client: Client, hub: Hub, doorman: Doorman, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = iter([ValueError("set_num_threads expects\na positive integer"), RecursionError("deep")])
    real = session.assemble

    def assemble(*arguments: Any) -> Any:
        if fault := next(faults, None):
            raise fault
        return real(*arguments)

    monkeypatch.setattr(session, "assemble", assemble)
    thread = threading.Thread(target=client.run)
    thread.start()
    assert doorman.came.acquire(timeout=30)
    hub.close()
    thread.join(30)
    assert not thread.is_alive()
    first, second = (record.getMessage() for record in caplog.records)
    assert "ValueError: set_num_threads expects a positive integer" in first
    assert "test_session.py, line" in first
    assert "RecursionError: deep" in second


def test_a_final_refusal_ends_it(client: Client, doorman: Doorman) -> None:
    doorman.objection = "its data are of another kind"
    with pytest.raises(InputError, match="another kind"):
        client.run()


@pytest.mark.parametrize("back", [False, True])
def test_finished_updates_go_with_the_run(hub: Hub, doorman: Doorman, tmp_path: Path, back: bool) -> None:
    update = tmp_path / "home" / "runs" / RUN / "outbox" / "0000001-aa.update"
    update.parent.mkdir(parents=True)
    update.touch()
    dials = iter([None])

    def credentials() -> Any:
        for none in dials:
            return none
        raise InputError("one connection is enough")

    owner = Owner("client-1", tmp_path, tmp_path / "home", device="cpu")
    client = Client(owner, Dial(hub.address, credentials, once=True), lambda _: None)

    def close() -> None:
        assert doorman.came.acquire(timeout=30)
        hub.close("it stops", back=back)

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(InputError, match="enough") if back else contextlib.nullcontext():
        client.run()
    closing.join()
    assert update.exists() is back
