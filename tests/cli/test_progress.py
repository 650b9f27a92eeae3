from __future__ import annotations

import io
import json
import sys

import pytest

from fedtrain.cli.progress import make_observer
from fedtrain.experiment.sections import Experiment
from fedtrain.records import RoundRecord

PRIVATE = RoundRecord(round_number=2, participants=["a"], central={"accuracy": 0.5}, epsilon=3.2146, bytes_up=1000)
PLAIN = PRIVATE.model_copy(update={"epsilon": None})


def experiment_with(privacy: dict[str, object] | None) -> Experiment:
    data = {"name": "digits", "clients": 10}
    return Experiment.model_validate(
        {"name": "x", "rounds": 8, "task": {"name": "mlp"}, "data": data, "privacy": privacy}
    )


SECRET = experiment_with({"epsilon": 8.0, "delta": 1e-5})
SEEDED = experiment_with({"epsilon": 8.0, "delta": 1e-5, "noise_seed": 1})


@pytest.mark.parametrize(
    ("experiment", "record", "line"),
    [
        (SECRET, PRIVATE, "round 2/8  test accuracy 0.5000  epsilon 3.21  1 client  1.0 kB  0.00 s"),
        (SEEDED, PRIVATE, "round 2/8  test accuracy 0.5000  epsilon 3.21 NOT PRIVATE  1 client  1.0 kB  0.00 s"),
        (experiment_with(None), PLAIN, "round 2/8  test accuracy 0.5000  1 client  1.0 kB  0.00 s"),
    ],
)
def test_plain_lines_tell_epsilon(
    experiment: Experiment, record: RoundRecord, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_observer(experiment, quiet=False, as_json=False) as observer:
        observer.round_finished(record)
    assert capsys.readouterr().out == line + "\n"


def test_json_lines_carry_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    with make_observer(SECRET, quiet=False, as_json=True) as observer:
        observer.round_finished(PRIVATE)
    assert json.loads(capsys.readouterr().out)["epsilon"] == 3.2146


def terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> io.StringIO:
    """Stand in for standard output."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    return screen


@pytest.mark.parametrize(("columns", "room"), [("80", False), ("120", True)])
def test_a_terminal_shows_epsilon_above_the_live_line_and_in_it_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, columns: str, room: bool
) -> None:
    screen = terminal(monkeypatch, columns)
    with make_observer(SECRET, quiet=False, as_json=False) as observer:
        observer.round_started(2, 10)
        observer.round_finished(PRIVATE)
        observer.round_started(3, 10)
    above, _, live = screen.getvalue().rpartition("clients in flight")
    assert "round 2/8  test accuracy 0.5000  epsilon 3.21\n" in above
    assert "accuracy 0.5000" in live
    assert ("epsilon 3.21" in live) == room


def test_before_the_first_round_a_server_waits_for_its_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, "80")
    with make_observer(SECRET, quiet=False, as_json=False) as observer:
        observer.clients(())
    assert "waiting for clients" in screen.getvalue()
    screen = terminal(monkeypatch, "80")
    with make_observer(SECRET, quiet=False, as_json=False) as observer:
        observer.round_started(1, 10)
        observer.clients(())
    assert "waiting for clients" not in screen.getvalue()
