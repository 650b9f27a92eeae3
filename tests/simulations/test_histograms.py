"""Histograms of a run's model: in its folder, and in TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.rundir import RunFolder

pytest.importorskip("sklearn")

LAYERS = {"fc1.weight": 64 * 8, "fc1.bias": 8, "fc2.weight": 8 * 10, "fc2.bias": 10}


def test_every_so_many_rounds_are_looked_into(tiny: Path, simulated: Callable) -> None:
    folder = RunFolder(simulated(tiny, "run", "rounds=3", "run.histograms_every=2")[0])
    assert [path.name for path in folder.histograms.iterdir()] == ["round-0000002.json"]
    found = folder.read_histograms(2)
    for name, numbers in LAYERS.items():
        for tag in (f"weights/{name}", f"changes/{name}"):
            assert sum(found[tag].counts) == numbers
            assert len(found[tag].edges) == len(found[tag].counts) + 1
    # Changes are of one round, and far smaller than the weights.
    assert 0 < found["changes/fc1.weight"].edges[-1] < found["weights/fc1.weight"].edges[-1]
    assert [tag for tag in found if tag.startswith("activations/")]


def test_none_are_made_unless_asked_for_and_they_change_nothing(tiny: Path, simulated: Callable) -> None:
    plain = RunFolder(simulated(tiny, "plain", "rounds=1")[0])
    looked = RunFolder(simulated(tiny, "looked", "rounds=1", "run.histograms_every=1")[0])
    assert not plain.histograms.exists()
    assert looked.model.read_bytes() == plain.model.read_bytes()


def test_tensorboard_shows_them(tiny: Path, tmp_path: Path, fedtrain: Callable) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ("rounds=2", "run.histograms_every=1", 'run.trackers=["tensorboard"]')
    flags = [part for text in settings for part in ("--set", text)]
    assert fedtrain("simulate", tiny, "--out", tmp_path / "out", "--quiet", *flags).code == 0
    found = EventAccumulator(str(tmp_path / "out" / "tensorboard"), {"histograms": 0}).Reload()
    expected = RunFolder(tmp_path / "out").read_histograms(1).keys()
    assert expected
    assert set(found.Tags()["histograms"]) == set(expected)
    weights = found.Histograms("weights/fc1.weight")
    assert [event.step for event in weights] == [1, 2]
    assert weights[0].histogram_value.num == LAYERS["fc1.weight"]
