"""The real packages, as far as they are installed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fedtrain.experiment.sections import Experiment
from fedtrain.records import Histogram, RoundRecord
from fedtrain.rundir import RunFolder
from fedtrain.trackers import tensorboard
from fedtrain.trackers.base import TrackedRun
from fedtrain.trackers.feed import Feed

EXPERIMENT = Experiment.model_validate({"name": "x", "data": {"name": "digits", "clients": 3}})


def feed_rounds(name: str, folder: Path, rounds: range, status: str = "complete") -> None:
    """One start of a run: feed its records to one tracker, and make sure that it had nothing to complain of."""
    notices: list[str] = []
    feed = Feed([name], TrackedRun(EXPERIMENT, folder), notices.append)
    for number in rounds:
        losses = {"loss": 1.0 / (number + 1), "odd / name": float("nan")}
        feed.round_finished(RoundRecord(round_number=number, central=losses))
    feed.close(status)
    assert notices == []


def test_tensorboard_shows_each_round_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    feed_rounds("tensorboard", tmp_path, range(6), "interrupted")
    feed_rounds("tensorboard", tmp_path, range(3, 8))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = found.Scalars("central/loss")
    assert [event.step for event in losses] == list(range(8))
    assert losses[7].value == pytest.approx(1 / 8)
    assert found.Scalars("seconds/train")[0].step == 1
    assert [tag for tag in found.Tags()["scalars"] if tag.startswith("central/odd___name-")]


def test_tensorboard_shows_a_resumed_run_whose_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for clock, numbers in ((2000.0, range(6)), (1000.0, range(3, 8))):
        monkeypatch.setattr(tensorboard, "now", lambda clock=clock: clock)
        feed_rounds("tensorboard", tmp_path, numbers)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("central/loss")] == list(range(8))
    first, *_ = sorted((tmp_path / "tensorboard").iterdir())
    first.unlink()  # to save room
    feed_rounds("tensorboard", tmp_path, range(8, 10))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_follows_a_run_that_goes_back_in_the_same_process(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    feed = Feed(["tensorboard"], TrackedRun(EXPERIMENT, tmp_path), pytest.fail)
    for number in (0, 1, 2, 1, 2, 3):
        feed.round_finished(RoundRecord(round_number=number, central={"loss": 1.0}))
    feed.close("complete")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("central/loss")] == [0, 1, 2, 3]


def test_tensorboard_shows_the_histograms_of_a_round(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = Histogram(edges=[-1.0, 0.0, 2.0], counts=[3, 1], total=-1.0, squares=5.0)
    RunFolder(tmp_path).write_histograms(2, {"weights/fc.weight": one})
    feed_rounds("tensorboard", tmp_path, range(4))
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = found.Histograms("weights/fc.weight")
    assert event.step == 2
    shown = event.histogram_value
    assert (shown.min, shown.max, shown.num, shown.sum, shown.sum_squares) == (-1.0, 2.0, 4.0, -1.0, 5.0)
    assert (list(shown.bucket_limit), list(shown.bucket)) == ([0.0, 2.0], [3.0, 1.0])


@pytest.mark.filterwarnings("ignore:::sqlalchemy", "ignore:::mlflow")
def test_mlflow_keeps_one_run_with_each_round_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    feed_rounds("mlflow", folder, range(4), "interrupted")
    feed_rounds("mlflow", folder, range(2, 6))
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri, registry_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("fedtrain").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "central/loss")] == list(range(6))
    assert run.data.params["data.clients"] == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_server_of_mlflow_that_is_away_is_one_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    notices: list[str] = []
    feed = Feed(["mlflow"], TrackedRun(EXPERIMENT, tmp_path), notices.append)
    for number in range(3):
        feed.round_finished(RoundRecord(round_number=number))
    feed.close("complete")
    (notice,) = notices
    assert notice.startswith("the tracker mlflow is left out from here on: ")


def test_wandb_is_offline_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    feed_rounds("wandb", tmp_path, range(4), "interrupted")
    time.sleep(1.1)  # W&B names its folders by the second
    feed_rounds("wandb", tmp_path, range(2, 6))
    offline = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(offline) == 2
    assert len({path.name for path in offline}) == 1  # two parts of one run
    assert _steps(offline) == list(range(6))


def _steps(files: list[Path]) -> list[int]:
    """Steps of the history in W&B's transaction logs, once its service has written them out."""
    steps = []
    for file in files:
        while not (records := _records(file)) or records[-1].WhichOneof("record_type") != "exit":
            time.sleep(0.1)
        steps += [r.history.step.num for r in records if r.WhichOneof("record_type") == "history"]
    return steps


def _records(file: Path) -> list[Any]:
    """A header, then chunks of checksum, length, type and content."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, records = file.read_bytes(), 7, []
    while at < len(content):
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        records.append(Record.FromString(content[at + 7 : at + 7 + length]))
        at += 7 + length
    return records
