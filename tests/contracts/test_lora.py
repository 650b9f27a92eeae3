"""Adapters under everything that handles updates: only they travel, and the model beside them stays as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtrain.cli.progress import RunObserver
from fedtrain.errors import InterruptedRunError, RunFolderError
from fedtrain.experiment import load
from fedtrain.predict import predictions
from fedtrain.records import RoundRecord
from fedtrain.rundir import RunFolder
from fedtrain.simulations.run import Places, simulate
from fedtrain.strategies.registry import STRATEGIES
from fedtrain.tasks.lora import merged

pytest.importorskip("sklearn")

LORA = ("rounds=1", "model.lora={rank=2}", "data.partition={kind='iid'}", "training.optimizer.lr=0.01")
ALL = ("clients={}",)
STRATEGY = {name: (f"strategy.name={name}",) for name in STRATEGIES} | {
    "fedopt": ("strategy.name=fedopt", "strategy.optimizer=Adam", "strategy.options={lr=0.01}"),
    "krum": ("strategy={name='krum', byzantine=1}", *ALL),
    "multi-krum": ("strategy={name='multi-krum', byzantine=1}", *ALL),
    "bulyan": ("strategy={name='bulyan', byzantine=0}", *ALL),
    "fedbuff": ("strategy={name='fedbuff', buffer_size=2, max_in_flight=4}", *ALL, "clients.duration.seconds=1"),
}
BESIDE = {
    "top-k and int8 up": ('compression.up=["topk:0.5", "int8"]', "compression.error_feedback=true"),
    "change down": ('compression.down=["int8"]', 'compression.down_of="change"'),
    "full up": ('compression.up=["bf16"]', 'compression.up_of="full"'),
    "private head": ('personalization.private=["fc2.lora_*"]', "personalization.fine_tune_epochs=1"),
    "unfrozen later": ("rounds=2", 'model.unfreeze={"fc1.*"=2}'),
    "dropout": ("model.lora.dropout=0.2",),
}
SAMPLE = 'privacy={unit="sample", noise_multiplier=0.5, delta=1e-3, noise_seed=1, mode="%s"}'
NO_TEST = ("data.test=0.0",)
PRIVATE = {mode: (SAMPLE % mode, *NO_TEST) for mode in ("auto", "fast", "hooks", "ghost", "functorch")} | {
    "layer by layer": (SAMPLE.replace("}", ', clipping="per-layer"}') % "auto", *NO_TEST),
    "clients": (
        'privacy={unit="client", noise_multiplier=0.5, delta=1e-3, noise_seed=1}',
        "clients={per_round=3, sampling='poisson'}",
    ),
}
CASES = STRATEGY | BESIDE
ADAPTERS = {f"fc{layer}.lora_{half}.weight" for layer in (1, 2) for half in "ab"}


def run(file: Path, folder: Path, *overrides: str, observer: RunObserver | None = None) -> Path:
    places = Places(file.parent, folder, None)
    return simulate(load(file, (*LORA, *overrides)), places, observer or RunObserver()).path


def records(folder: Path) -> list[RoundRecord]:
    return RunFolder(folder).read_rounds()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base weights that are known."""
    rng = torch.Generator().manual_seed(2)
    shapes = {"fc1.weight": (8, 64), "fc1.bias": (8,), "fc2.weight": (10, 8), "fc2.bias": (10,)}
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_file({name: 0.2 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}, path)
    return path


def check(folder: Path, start: Path) -> None:
    """Every update was used; the adapters have learned, and nothing else has."""
    assert not any(record.quarantined for record in records(folder))
    model, base = load_file(folder / "model.safetensors"), load_file(start)
    assert model.keys() == base.keys() | ADAPTERS
    assert all(torch.equal(model[name], t) for name, t in base.items())
    assert model["fc1.lora_b.weight"].any()


@pytest.mark.parametrize("case", CASES)
def test_a_round_changes_the_adapters_alone(case: str, tiny: Path, start: Path, tmp_path: Path) -> None:
    folder = run(tiny, tmp_path / "run", f"model.start='{start}'", *CASES[case])
    check(folder, start)


@pytest.mark.parametrize("case", PRIVATE)
def test_a_private_round_changes_the_adapters_alone(case: str, tiny: Path, start: Path, tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    folder = run(tiny, tmp_path / "run", f"model.start='{start}'", *PRIVATE[case])
    check(folder, start)


@pytest.mark.parametrize("case", ["scaffold", "ditto", "unfrozen later"])
def test_an_interrupted_run_and_workers_end_in_the_same_bytes(case: str, tiny: Path, tmp_path: Path) -> None:
    class Interrupting(RunObserver):
        def client_finished(self, round_number: int) -> None:
            if round_number == 2:
                raise KeyboardInterrupt

    rounds = (*CASES[case], "rounds=2", "model.lora.dropout=0.2")
    whole = run(tiny, tmp_path / "whole", *rounds, "run.workers=2")
    with pytest.raises(InterruptedRunError):
        run(tiny, tmp_path / "resumed", *rounds, observer=Interrupting())
    resumed = run(tiny, tmp_path / "resumed", *rounds)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_only_adapters_travel_as_planned(tiny: Path, tmp_path: Path, fedtrain: Callable) -> None:
    def planned(*overrides: str) -> dict:
        flags = [part for text in ("rounds=1", "evaluation.max_clients=0", *overrides) for part in ("--set", text)]
        return json.loads(fedtrain("plan", tiny, "--json", *flags).out)

    full, lora = planned(), planned("model.lora={rank=2}")
    assert (full["parameters"], full["parameters_in_all"]) == (610, 610)
    assert (lora["parameters"], lora["parameters_in_all"]) == (2 * (64 + 8 + 8 + 10), 610 + 180)
    frozen = planned('model.freeze=["fc1.*"]')
    assert (frozen["parameters"], frozen["parameters_in_all"]) == (90, 610)
    for overrides, numbers in {("model.lora={rank=2}",): 180, ("model={freeze=['fc1.*']}",): 90}.items():
        shown = fedtrain("plan", tiny, "--set", *overrides).out
        update = int(re.search(r"Update +.*\(([\d,]+) bytes\)", shown)[1].replace(",", ""))
        assert 4 * numbers < update < 4 * numbers + 260  # names and shapes
        folder = run(tiny, tmp_path / str(numbers), *overrides, "evaluation.max_clients=0")
        assert [record.bytes_up for record in records(folder)] == [0, 3 * update]
    shown = fedtrain("plan", tiny, "--set", "model.lora={rank=2}").out
    assert "adapters: 180 of 790 parameters are trained and travel\n" in shown


def test_predictions_need_no_start_and_merged_tensors_predict_alike(tiny: Path, start: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(start.read_bytes())
    folder = run(tiny, tmp_path / "run", "model.start=copied.safetensors")
    manifest = RunFolder(folder).read_manifest()
    assert manifest.own_files.keys() == {"copied.safetensors"}
    assert manifest.parameters == 180
    copied.unlink()
    np.save(tmp_path / "inputs.npy", np.random.default_rng(1).integers(0, 16, (5, 1, 8, 8)).astype(np.float32))
    adapted = list(predictions(folder, tmp_path / "inputs.npy").rows)
    plain = merged(load_file(folder / "model.safetensors"), load(folder / "experiment.toml").model.lora)
    save_file(plain, tmp_path / "plain.safetensors")
    # Steps too small to speak of: this run's model is what it started from.
    tiny_steps = ("model={start='plain.safetensors'}", "training.optimizer.lr=1e-7")
    again = run(tiny, tmp_path / "again", *tiny_steps)
    for one, other in zip(adapted, predictions(again, tmp_path / "inputs.npy").rows, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose([float(p) for p in one[2:]], [float(p) for p in other[2:]], atol=1e-3)


def test_another_start_is_another_run(tiny: Path, start: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(start.read_bytes())
    run(tiny, tmp_path / "run", "model.start=copied.safetensors")
    save_file({name: 2 * t for name, t in load_file(start).items()}, copied)
    with pytest.raises(RunFolderError, match="other contents of the files"):
        run(tiny, tmp_path / "run", "model.start=copied.safetensors")
