import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtrain.errors import FedtrainError, InputError, PrivacyError, RunError
from fedtrain.fleet.events import EventWriter, follow
from fedtrain.records import RoundRecord

RECORD = RoundRecord(round_number=1, participants=["a"], central={"loss": 0.1}, quarantined={"b": 'a "reason"\nof two'})


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def round_started(self, round_number: int, clients: int) -> None:
        self.events.append((round_number, clients))

    def client_finished(self, round_number: int) -> None:
        self.events.append(round_number)

    def round_finished(self, record: RoundRecord) -> None:
        self.events.append(record)

    def notice(self, text: str) -> None:
        self.events.append(text)


def written(capsys: pytest.CaptureFixture[str], failure: FedtrainError | None = None) -> str:
    writer = EventWriter()
    writer.round_started(1, 2)
    writer.client_finished(1)
    writer.notice("a note\nof two lines")
    print("INFO: flwr says something")
    writer.round_finished(RECORD)
    if failure:
        writer.failed(failure)
    return capsys.readouterr().out


def heard(log: Iterable[str]) -> tuple[list[object], FedtrainError | None]:
    seen = Seen()
    failure = follow(log, seen)
    return seen.events, failure


EVENTS = [(1, 2), 1, "a note\nof two lines", RECORD]


@pytest.mark.parametrize("length", [1, 7, 10_000])
def test_events_arrive_however_the_log_is_cut(capsys: pytest.CaptureFixture[str], length: int) -> None:
    text = written(capsys)
    assert heard(text[i : i + length] for i in range(0, len(text), length)) == (EVENTS, None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(InputError("no data"), InputError), (RunError("quorum"), RunError), (PrivacyError("x"), RunError)],
)
def test_why_a_run_failed_arrives(
    capsys: pytest.CaptureFixture[str], error: FedtrainError, kind: type[FedtrainError]
) -> None:
    events, failure = heard([written(capsys, error)])
    assert events == EVENTS
    assert type(failure) is kind
    assert str(failure) == str(error)


@given(st.text())
def test_a_torn_line_is_passed_over(noise: str) -> None:
    line = noise.replace("\n", "")
    assert heard([f'fedtrain-event {line}\nfedtrain-event ["notice", "still here"]\n'])[0][-1] == "still here"


def test_numbers_that_json_does_not_know_survive(capsys: pytest.CaptureFixture[str]) -> None:
    EventWriter().round_finished(RoundRecord(round_number=1, central={"loss": math.inf}))
    (record,), _ = heard([capsys.readouterr().out])
    assert isinstance(record, RoundRecord)
    assert record.central == {"loss": math.inf}
