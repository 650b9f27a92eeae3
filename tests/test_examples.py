"""Examples of what can be learned: each loads, and a round of it runs and is measured."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.experiment import load
from fedtrain.rundir import RunFolder
from fedtrain.simulations.run import Places, simulate

EXAMPLES = Path(__file__).parents[1] / "examples"
OFFLINE = ["regression", "multi-label", "multi-task", "sequence-lstm", "sequence-transformer", "semi-supervised"]
OFFLINE += ["self-supervised", "anomaly", "kmeans", "vae", "reinforcement"]
SMALL = {
    "sequence-lstm": ["data.options={rows=20, test_rows=5}"],
    "sequence-transformer": ["data.options={rows=20, test_rows=5}"],
    "reinforcement": ["task.options={moves=20}"],
}

pytest.importorskip("sklearn")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunFolder]:
    def run(name: str, *overrides: str) -> RunFolder:
        from fedtrain.cli.progress import RunObserver

        class Silent(RunObserver):
            def notice(self, text: str) -> None: ...

        experiment = load(EXAMPLES / f"{name}.toml", ["run.workers=0", "run.device=cpu", *overrides])
        folder: RunFolder = simulate(experiment, Places(EXAMPLES, tmp_path / name, None), Silent())
        return folder

    return run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_is_an_experiment_that_says_what_it_is(path: Path) -> None:
    load(path)
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("name", OFFLINE)
def test_a_round_runs_and_is_measured(run: Callable[..., RunFolder], name: str) -> None:
    before, after = run(name, "rounds=1", "training.local_epochs=1", *SMALL.get(name, [])).read_rounds()
    assert not after.quarantined
    assert all(math.isfinite(value) for value in [*before.central.values(), *after.central.values()])


def test_a_probe_starts_from_the_pre_trained_encoder(run: Callable[..., RunFolder]) -> None:
    encoder = run("self-supervised", "rounds=1", "training.local_epochs=1")
    start = f"model.start={encoder.path / 'model.safetensors'}"
    probe = run("linear-probe", "rounds=1", "training.local_epochs=1", start)
    kept = encoder.read_model()["encoder.fc1.weight"]
    assert probe.read_model()["encoder.fc1.weight"].equal(kept)


def test_pseudo_labels_go_on_from_a_model_of_the_labelled_rows(
    run: Callable[..., RunFolder], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The class of no label stays where its rows are left out, so the shapes are the same."""
    place = tmp_path_factory.mktemp("first")
    alone = ["task={name='mlp', options={hidden=[128]}}", "data.options={labelled=0.05, unlabelled='empty'}"]
    first = run("semi-supervised", "rounds=15", *alone)
    first.model.rename(place / "start.safetensors")
    shutil.rmtree(first.path)
    records = run("semi-supervised", "rounds=1", f"model.start={place / 'start.safetensors'}").read_rounds()
    assert records[0].central["accuracy"] > 0.5  # of the start; an untrained model guesses one in ten
