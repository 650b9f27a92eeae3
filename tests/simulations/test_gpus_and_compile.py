"""Other ways to compute a step, end to end: several devices, compiled, deterministic algorithms alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn")

SHORT = ("rounds=1", "clients.per_round=2", "training.local_steps=3", "data.test=0.0")
# A process of its own: the compiler keeps state that is no other test's business.
COMPILED = """
import sys, torch
from fedtrain.cli import main
try:
    main()
finally:
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
"""


def differs(one: Path, other: Path, start: Path) -> float:
    """Largest difference of two models' weights, as a share of the way that training went."""
    models = [load_file(folder / "model.safetensors") for folder in (one, other, start)]
    first, second, before = (torch.cat([model[name].flatten() for name in sorted(models[0])]) for model in models)
    return float((first - second).abs().max() / (first - before).abs().max())


@pytest.fixture
def start(tiny: Path, simulated: Callable) -> Path:
    """The run's first model, all but untrained."""
    folder: Path = simulated(tiny, "start", *SHORT, "training.optimizer.lr=1e-9")[0]
    return folder


def test_two_devices_train_as_one_does(tiny: Path, start: Path, simulated: Callable) -> None:
    folders = [simulated(tiny, f"on{gpus}", *SHORT, f"run.gpus={gpus}")[0] for gpus in (1, 2)]
    assert differs(*folders, start) < 1e-5


@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="needs a C++ compiler")
def test_a_compiled_model_trains_alike(tiny: Path, start: Path, tmp_path: Path, simulated: Callable) -> None:
    plain = simulated(tiny, "plain", *SHORT)[0]
    flags = [part for text in (*SHORT, "training.compile=true") for part in ("--set", text)]
    command = [sys.executable, "-c", COMPILED, "simulate", str(tiny), "--quiet", "--out", str(tmp_path / "compiled")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert differs(plain, tmp_path / "compiled", start) < 1e-5


def test_deterministic_algorithms_give_the_same_bytes_on_a_cpu(
    tiny: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)  # is put back, for the run sets it
    plain, strict = (simulated(tiny, on, *SHORT, f"run.deterministic={on}")[0] for on in ("false", "true"))
    assert (strict / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert not torch.are_deterministic_algorithms_enabled(), "the setting is put back"
