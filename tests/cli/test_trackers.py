from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.cli import running
from fedtrain.cli.progress import RunObserver
from fedtrain.cli.running import tracked
from fedtrain.errors import InterruptedRunError, RunError
from fedtrain.experiment import load
from fedtrain.records import RoundRecord
from fedtrain.trackers import feed
from fedtrain.trackers.base import TrackedRun

SHORT = ("--set", "rounds=2", "--quiet")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the only tracker is told."""
    told: list[str] = []

    class Fake:
        def log(self, numbers, round_number: int) -> None:
            told.append(f"round {round_number}")
            if (numbers.keys() >= {"central/accuracy"}) is False:
                told.append("without numbers")

        def close(self, status: str) -> None:
            told.append(status)

    def opened(name: str, run: TrackedRun) -> Fake:
        assert (run.folder / "manifest.json").exists(), "opened before the folder is the run's"
        told.append(f"{name} of {run.folder.name}")
        return Fake()

    monkeypatch.setattr(feed, "_tracker", opened)
    monkeypatch.setattr(running, "chosen", lambda names: ["fake"])
    return told


def test_a_run_feeds_its_trackers(fedtrain: Callable, tiny: Path, tmp_path: Path, log: list[str]) -> None:
    command = ("simulate", tiny, "--out", tmp_path / "out", *SHORT)
    assert fedtrain(*command).code == 0
    assert log == ["fake of out", "round 0", "round 1", "round 2", "complete"]
    assert fedtrain(*command).code == 0
    assert len(log) == 5  # a run that is complete opens nothing


def test_a_folder_that_is_refused_is_not_written_to(
    fedtrain: Callable, tiny: Path, tmp_path: Path, log: list[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    assert fedtrain("simulate", tiny, "--out", tmp_path, *SHORT).code == 2
    assert log == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(InterruptedRunError("x"), "interrupted"), (KeyboardInterrupt(), "interrupted"), (RunError("x"), "failed")],
)
def test_trackers_learn_how_a_run_ended(
    tiny: Path, tmp_path: Path, log: list[str], error: BaseException, status: str
) -> None:
    (tmp_path / "manifest.json").touch()

    def run() -> None:
        with tracked(RunObserver(), TrackedRun(load(tiny), tmp_path), ["fake"]) as observer:
            observer.round_finished(RoundRecord(round_number=0, central={"accuracy": 0.5}))
            raise error

    with pytest.raises(type(error)):
        run()
    assert log[-1] == status


def test_who_watches_is_told_everything_and_what_fails(tiny: Path, tmp_path: Path) -> None:
    told: list[object] = []

    class Watcher(RunObserver):
        def __getattribute__(self, name: str) -> object:
            return lambda *arguments: told.append((name, *arguments))

    record = RoundRecord(round_number=0)
    with tracked(Watcher(), TrackedRun(load(tiny), tmp_path / "nowhere"), ["tensorboard"]) as observer:
        observer.opening(tmp_path)
        observer.round_started(1, 2)
        observer.client_finished(1)
        observer.round_finished(record)
        observer.notice("n")
        observer.clients(())
    notice = told.pop(4)
    assert told == [
        ("opening", tmp_path),
        ("round_started", 1, 2),
        ("client_finished", 1),
        ("round_finished", record),
        ("notice", "n"),
        ("clients", ()),
    ]
    assert notice[0] == "notice"
    assert str(notice[1]).startswith("the tracker tensorboard is left out from here on: ")


def test_tensorboard_is_fed_unless_told_otherwise(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    assert fedtrain("simulate", tiny, "--out", out, *SHORT).err == ""
    found = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("central/accuracy")] == [0, 1, 2]
