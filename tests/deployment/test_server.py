"""Who is waited for: everybody once, and who has gone not again until it is back."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedtrain import flower
from fedtrain.deployment.remote import Remote, Waits
from fedtrain.deployment.roster import Roster
from fedtrain.deployment.server import Listening, _Attendance
from fedtrain.errors import InputError, RunError
from fedtrain.link.register import Passing

KIND = {
    "input_shape": [3],
    "target": "class",
    "num_classes": 2,
    "feature_names": [],
    "class_names": [],
    "dtype": "float32",
}


class Hub:
    """Answers for the clients that are here."""

    def __init__(self, here: set[str]) -> None:
        self.here = here
        self.asked: list[list[str]] = []

    def members(self) -> list[Any]:
        return [SimpleNamespace(name=name, connected=True) for name in self.here]

    def exchange(
        self, tasks: Sequence[tuple[str, Message]], limit: int, patience: float, deadline: float | None
    ) -> Iterator[Message]:
        self.asked.append([name for name, _ in tasks])
        for name, message in tasks:
            if name in self.here:
                yield Message(RecordDict(), reply_to=message)


def messages() -> list[Message]:
    made = []
    for node in (1, 2, 3):
        message = Message(RecordDict(), node, "train")
        flower.set_message_id(message, f"m{node}")
        made.append(message)
    return made


def test_who_did_not_answer_and_is_gone_is_not_waited_for_until_it_is_back() -> None:
    flower.enter_run(1)
    hub = Hub({"a", "c"})
    remote = Remote(hub, ("a", "b", "c"), 100, Waits(1.0))  # type: ignore[arg-type]
    for _ in range(2):
        assert len(list(remote.run(messages()))) == 2
    hub.here.add("b")
    assert len(list(remote.run(messages()))) == 3
    assert hub.asked == [["a", "b", "c"], ["a", "c"], ["a", "b", "c"]]


def test_clients_with_data_of_their_own_are_counted_by_name_until_the_run_begins() -> None:
    roster = Roster()
    attendance = _Attendance(roster, None, fixed=False)
    facts = {"data": KIND, "num_examples": 5}
    assert attendance.ready("west", facts) is None
    assert attendance.ready("east", {**facts, "num_examples": 7}) is None
    assert "another kind" in str(attendance.ready("odd", {**facts, "data": {**KIND, "num_classes": 3}}))
    assert "how many examples" in str(attendance.ready("odd", {"data": KIND, "num_examples": -1}))
    notices: list[str] = []
    attendance.wait_for(Listening("", min_clients=2), SimpleNamespace(notice=notices.append), lambda: False)  # type: ignore[arg-type]
    attendance.enlist()
    assert list(roster.sizes.items()) == [("east", 7), ("west", 5)]
    assert "has 6 examples, and had 7" in str(attendance.ready("east", {**facts, "num_examples": 6}))
    assert not attendance.newcomers()
    assert attendance.ready("late", {**facts, "num_examples": 9}) is None
    assert attendance.ready("brief", facts) is None
    attendance.left("brief")
    assert attendance.newcomers() == ["late"]
    attendance.enlist()
    assert list(roster.sizes.items()) == [("east", 7), ("west", 5), ("late", 9)]


def test_what_the_data_are_is_forgotten_with_those_who_told_it() -> None:
    attendance = _Attendance(Roster(), None, fixed=False)
    facts = {"data": KIND, "num_examples": 5}
    odd = {**facts, "data": {**KIND, "num_classes": 3}}
    assert attendance.ready("odd", odd) is None
    assert isinstance(attendance.ready("west", facts), Passing)
    attendance.left("odd")
    assert attendance.ready("west", facts) is None


def test_under_privacy_nobody_joins_a_run_that_has_begun() -> None:
    attendance = _Attendance(Roster(), None, fixed=True)
    facts = {"data": KIND, "num_examples": 5}
    assert attendance.ready("west", facts) is None
    attendance.enlist()
    assert "has no client late" in str(attendance.ready("late", facts))
    assert attendance.ready("west", facts) is None


def test_waiting_ends_by_its_limit_by_a_stop_and_not_without_a_number() -> None:
    attendance = _Attendance(Roster(), None, fixed=False)
    observer: Any = SimpleNamespace(notice=lambda _: None)
    with pytest.raises(InputError, match="--min-clients"):
        attendance.wait_for(Listening(""), observer, lambda: False)
    with pytest.raises(RunError, match=r"got 0 in 0\.01 seconds; expected 2"):
        attendance.wait_for(Listening("", min_clients=2, wait=0.01), observer, lambda: False)
    with pytest.raises(KeyboardInterrupt):
        attendance.wait_for(Listening("", min_clients=2), observer, lambda: True)
