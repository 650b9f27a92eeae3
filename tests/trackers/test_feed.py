from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from fedtrain.errors import MissingExtraError
from fedtrain.experiment.sections import Experiment
from fedtrain.records import RoundRecord
from fedtrain.trackers import feed as feed_module
from fedtrain.trackers.base import TrackedRun
from fedtrain.trackers.feed import Feed, chosen

EXPERIMENT = Experiment.model_validate({"name": "x", "data": {"name": "digits", "clients": 3}})


class Fake:
    """Fails in the given round, or when it is closed."""

    def __init__(self, fails_in: int = -1, fails_to_close: bool = False) -> None:
        self.fails_in, self.fails_to_close = fails_in, fails_to_close
        self.rounds: list[int] = []
        self.closed = ""

    def log(self, numbers: Mapping[str, float], round_number: int) -> None:
        if round_number == self.fails_in:
            raise OSError("no space\x1b[2J left")
        self.rounds.append(round_number)

    def close(self, status: str) -> None:
        self.closed = status
        if self.fails_to_close:
            raise OSError("gone")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake | Exception]:
    """Name -> the tracker that is opened for it, or the error that opening raises."""
    known: dict[str, Fake | Exception] = {}

    def open_one(name: str, run: TrackedRun) -> Fake:
        tracker = known[name]
        if isinstance(tracker, Exception):
            raise tracker
        return tracker

    monkeypatch.setattr(feed_module, "_tracker", open_one)
    return known


def fed(names: list[str], folder: Path, rounds: int = 4) -> list[str]:
    notices: list[str] = []
    feed = Feed(names, TrackedRun(EXPERIMENT, folder), notices.append)
    for number in range(rounds):
        feed.round_finished(RoundRecord(round_number=number))
    feed.close("complete")
    return notices


def test_every_tracker_gets_every_record(made: dict, tmp_path: Path) -> None:
    made |= {"a": Fake(), "b": Fake()}
    assert fed(["a", "b"], tmp_path) == []
    assert [(made[name].rounds, made[name].closed) for name in "ab"] == [([0, 1, 2, 3], "complete")] * 2


def test_one_that_fails_is_told_of_once_and_the_others_go_on(made: dict, tmp_path: Path) -> None:
    made |= {"bad": Fake(fails_in=1), "dead": RuntimeError("no server"), "good": Fake()}
    notices = fed(["bad", "dead", "good"], tmp_path)
    assert notices == [
        "the tracker dead is left out from here on: RuntimeError: no server",
        "the tracker bad is left out from here on: OSError: no space\N{REPLACEMENT CHARACTER}[2J left",
    ]
    assert (made["bad"].rounds, made["bad"].closed) == ([0], "failed")
    assert (made["good"].rounds, made["good"].closed) == ([0, 1, 2, 3], "complete")


def test_one_that_fails_at_the_end_is_told_of(made: dict, tmp_path: Path) -> None:
    made["a"] = Fake(fails_to_close=True)
    assert fed(["a"], tmp_path) == ["the tracker a is left out from here on: OSError: gone"]


def test_nothing_is_opened_for_a_run_without_records(made: dict, tmp_path: Path) -> None:
    made["a"] = RuntimeError("opened")
    assert fed(["a"], tmp_path, rounds=0) == []


def test_auto_is_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(feed_module, "_is_installed", lambda name, there=there: there)
        assert chosen("auto") == (["tensorboard"] if there else [])


def test_one_that_is_asked_for_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_is_installed", lambda name: name == "wandb")
    assert chosen(["wandb", "wandb"]) == ["wandb"]
    assert chosen([]) == []
    with pytest.raises(MissingExtraError, match=r"mlflow.*fedtrain\[mlflow\]"):
        chosen(["wandb", "mlflow"])
