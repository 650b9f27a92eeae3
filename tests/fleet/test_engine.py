import re
from collections.abc import Iterable, Mapping

import pytest
import torch
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run

from fedtrain import flower, wire
from fedtrain.errors import RunError
from fedtrain.fleet import engine as ours
from fedtrain.fleet.engine import FleetEngine, plain
from fedtrain.fleet.settings import NodeSettings, RunSettings
from fedtrain.simulations.grid import SimulationGrid

NAMES = ["a", "b", "c"]
RUN = 2**63 + 5
PARAMS = {"w": torch.arange(3.0), "scale": torch.tensor(2.0)}


class FakeGrid(Grid):
    """flwr's Grid with SuperNodes that answer at once; its messages pass through flwr's serialisation."""

    def __init__(self, nodes: Mapping[int, Mapping[str, str | int]]) -> None:
        self.nodes = dict(nodes)
        self.mute: set[int] = set()
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(RUN)

    def create_message(self, *_: object, **__: object) -> Message:
        raise AssertionError("flwr calls it deprecated")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.sent.append(message)
            ids.append(message.object_id)
            if message.metadata.dst_node_id not in self.mute:
                reply = self._answer(through_flwr(message))
                self._replies[ids[-1]] = reply if reply.has_error() else through_flwr(reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("it sleeps for three seconds")

    def _answer(self, message: Message) -> Message:
        config = self.nodes[message.metadata.dst_node_id]
        if "fails" in config:
            return Message(Error(0, str(config["fails"])), reply_to=message)
        if message.metadata.message_type == "query":
            return Message(NodeSettings.of(config).introduction(), reply_to=message)
        params = wire.instruction(message).params
        update = wire.Update(str(config["client-id"]), 1, {n: t + 1 for n, t in params.items()}, 1)
        return Message(plain(wire.update_content(update)), reply_to=message)


def through_flwr(message: Message) -> Message:
    """What another process reads of a message."""
    message.metadata.__dict__["_message_id"] = message.object_id
    contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(arrived, Message)
    arrived.metadata.__dict__["_message_id"] = message.object_id
    return arrived


@pytest.fixture(autouse=True)
def in_a_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    flower.enter_run(RUN)
    monkeypatch.setattr(ours, "_POLL", 0.01)


@pytest.fixture
def notices() -> list[str]:
    return []


def settings(**changes: float) -> RunSettings:
    return RunSettings(experiment="", base="", out="", wait=0, **changes)


def named(*names: str) -> dict[int, dict[str, str | int]]:
    return {700 + number: {"client-id": name} for number, name in enumerate(names)}


def replies(grid: SimulationGrid) -> dict[int, Message]:
    record = flower.array_record(PARAMS)
    asked = [Message(wire.instruction_content(record, 1), node, "train", group_id="1") for node in grid.get_node_ids()]
    answers = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(asked)}
    for node, reply in answers.items():
        assert reply.metadata.reply_to_message_id == asked[node - 1].metadata.message_id
    return answers


def updates_of(answers: Mapping[int, Message]) -> dict[int, str]:
    """Our node id -> the client that answered; -> the reason, where there is an error."""
    return {n: r.error.reason if r.has_error() else wire.update(r.content).client_id for n, r in answers.items()}


def test_replies_come_from_the_clients_that_were_asked(notices: list[str]) -> None:
    fleet = FakeGrid({31: {"client-id": "c"}, 7: {"client-id": "a"}, 99: {"partition-id": 1, "client-id": "b"}})
    answers = replies(SimulationGrid(FleetEngine(fleet, NAMES, settings(), notices.append), 3))
    assert updates_of(answers) == {1: "a", 2: "b", 3: "c"}
    delta = wire.update(answers[1].content).delta
    assert list(delta) == list(PARAMS)
    assert all(torch.equal(delta[name], tensor + 1) for name, tensor in PARAMS.items())
    assert notices == []


def test_messages_carry_flwrs_names_though_a_grid_of_ours_took_the_process_over(notices: list[str]) -> None:
    fleet = FakeGrid(named(*NAMES))
    replies(SimulationGrid(FleetEngine(fleet, NAMES, settings(), notices.append), 3))
    assert {(m.metadata.run_id, m.metadata.src_task_id) for m in fleet.sent} == {(RUN, RUN)}
    assert {m.metadata.group_id for m in fleet.sent[-3:]} == {"1"}


def test_messages_of_a_round_share_their_arrays(notices: list[str]) -> None:
    fleet = FakeGrid(named(*NAMES))
    replies(SimulationGrid(FleetEngine(fleet, NAMES, settings(), notices.append), 3))
    records = [message.content.array_records["arrays"] for message in fleet.sent[-3:]]
    assert records[0] is records[1] is records[2]
    assert {type(array) for array in records[0].values()} == {Array}


def test_a_client_without_a_node_is_an_error_until_one_comes(notices: list[str]) -> None:
    fleet = FakeGrid(named("a", "b"))
    grid = SimulationGrid(FleetEngine(fleet, NAMES, settings(), notices.append), 3)
    assert notices == ["1 of 3 clients have no SuperNode, such as c"]
    missing = "no SuperNode of the fleet serves this client"
    assert updates_of(replies(grid)) == {1: "a", 2: "b", 3: missing}
    fleet.nodes[50] = {"client-id": "c"}
    gone = fleet.nodes.pop(700)
    assert updates_of(replies(grid)) == {1: missing, 2: "b", 3: "c"}
    fleet.nodes[700] = gone
    assert updates_of(replies(grid)) == {1: "a", 2: "b", 3: "c"}


def test_a_node_is_asked_once_whose_it_is(notices: list[str]) -> None:
    fleet = FakeGrid(named(*NAMES))
    grid = SimulationGrid(FleetEngine(fleet, NAMES, settings(), notices.append), 3)
    replies(grid)
    replies(grid)
    assert [m.metadata.message_type for m in fleet.sent].count("query") == 3


@pytest.mark.parametrize(
    ("config", "notice"),
    [
        ({"client-id": "x\x1b[2J"}, "a SuperNode takes no part: .* got x\N{REPLACEMENT CHARACTER}"),
        ({}, "a SuperNode takes no part: the SuperNode serves no client"),
        ({"fails": "ImportError: no fedtrain"}, "a SuperNode takes no part: ImportError: no fedtrain"),
        ({"client-id": "a"}, "a second SuperNode says that it is a: it is not asked"),
    ],
)
def test_strangers_take_no_part(config: dict[str, str | int], notice: str, notices: list[str]) -> None:
    fleet = FakeGrid({**named(*NAMES), 900: config})
    grid = SimulationGrid(FleetEngine(fleet, NAMES, settings(), notices.append), 3)
    assert updates_of(replies(grid)) == {1: "a", 2: "b", 3: "c"}
    assert 900 not in {m.metadata.dst_node_id for m in fleet.sent[-3:]}
    assert [re.match(notice, text) is not None for text in notices] == [True]


def test_without_any_node_there_is_no_run(notices: list[str]) -> None:
    fleet = FakeGrid({4: {"client-id": "x"}})
    with pytest.raises(RunError, match="no SuperNode serves a client of this experiment: got 1 other SuperNodes"):
        FleetEngine(fleet, NAMES, settings(), notices.append)


def test_a_silent_node_is_waited_for_no_longer_than_the_patience(notices: list[str]) -> None:
    fleet = FakeGrid(named(*NAMES))
    grid = SimulationGrid(FleetEngine(fleet, NAMES, settings(patience=0.05), notices.append), 3)
    fleet.mute = {701}
    assert updates_of(replies(grid)) == {1: "a", 3: "c"}
    assert notices == ["2 of 3 clients have answered in 0.05 seconds: --patience is for a whole round here"]


def test_a_message_that_the_superlink_does_not_take_ends_the_run(
    notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = FakeGrid(named(*NAMES))
    grid = SimulationGrid(FleetEngine(fleet, NAMES, settings(), notices.append), 3)
    monkeypatch.setattr(fleet, "push_messages", lambda messages: ["", "1", "2"])
    with pytest.raises(RunError, match="the SuperLink did not take a message"):
        replies(grid)


def test_an_introduction_that_is_none_is_refused(notices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    none = RecordDict({"node": ConfigRecord({"partition-id": [1]})})
    monkeypatch.setattr(NodeSettings, "introduction", lambda _: none)
    with pytest.raises(RunError, match="no SuperNode serves"):
        FleetEngine(FakeGrid(named("a")), NAMES, settings(), notices.append)
