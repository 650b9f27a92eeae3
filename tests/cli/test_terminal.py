import io
import re
import sys
from pathlib import Path

import pytest

from fedtrain.cli.progress import make_observer
from fedtrain.cli.terminal import fold, say
from fedtrain.experiment import load
from fedtrain.records import RoundRecord


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard output one; not as a fixture, because pytest replaces the output before each test."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_fold_breaks_between_words_and_hangs_the_rest() -> None:
    assert fold("name  one two three", 12, indent=6) == "name  one\n      two\n      three"
    assert fold("fault\n  a: got b\n\nend", 8) == "fault\n  a: got\n    b\n\nend"


def test_fold_keeps_a_path_whole() -> None:
    assert fold("see /a/very-long/path/to.html now", 10) == "see\n  /a/very-long/path/to.html\n  now"


def test_say_folds_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = terminal_of_80_columns(monkeypatch)
    text = "word " * 30
    say(text)
    assert max(map(len, terminal.getvalue().splitlines())) <= 80
    say(text, err=True)
    assert capsys.readouterr().err == f"{text}\n"


def test_the_live_view_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    terminal = terminal_of_80_columns(monkeypatch)
    experiment = load(tiny, ["rounds=1000", "evaluation.clients_every=50"])
    scores = {"loss": 0.1234, "accuracy": 0.9876}
    with make_observer(experiment, quiet=False, as_json=False) as observer:
        observer.opening(Path("runs/tiny-01234567"))
        observer.round_finished(RoundRecord(round_number=0, central=scores))
        for number in (1, 50):
            observer.round_started(number, clients=100)
            observer.client_finished(number)
            record = RoundRecord(round_number=number, participants=["a"], train={"loss": 0.5}, central=scores)
            observer.round_finished(record.model_copy(update={"clients": scores if number == 50 else {}}))
        own = {"personal_loss": 0.1, "personal_accuracy": 0.9999}
        observer.round_finished(record.model_copy(update={"round_number": 100, "clients": scores | own}))
        wordy = {"area under the curve": 0.5}
        observer.round_finished(record.model_copy(update={"round_number": 150, "central": wordy, "clients": wordy}))
        observer.notice("round 50: update of a not used: " + "it holds NaN " * 5)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, shown)) <= 80
    assert "round   50/1000  loss 0.5000  test accuracy 0.9876  clients' accuracy 0.9876" in shown
    assert "round  100/1000  test accuracy 0.9876  clients' accuracy 0.9876  personal 0.9999" in shown
    assert any(line.startswith("round  150/1000  ") and line.endswith("…") for line in shown)
    assert any(line.startswith("round 50/1000 ") and "99/100 clients in flight" in line for line in shown)


def test_a_line_of_a_pipe_has_all_that_was_measured(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = RoundRecord(
        round_number=3,
        participants=["a", "b"],
        late=["c"],
        train={"loss": 0.5},
        clients={"loss": 0.25, "personal_loss": 0.125},
        bytes_up=1_000,
        bytes_down=2_400,
        staleness=1.5,
        virtual_seconds=80.0,
        seconds_train=1.0,
        seconds_evaluate=0.5,
    )
    with make_observer(load(tiny), quiet=False, as_json=False) as observer:
        observer.round_finished(record)
    assert capsys.readouterr().out == (
        "round 3/4  train loss 0.5000  clients' loss 0.2500  personal loss 0.1250  "
        "2 clients  1 late  staleness 1.5  3.4 kB  80.00 s virtual  1.50 s\n"
    )
