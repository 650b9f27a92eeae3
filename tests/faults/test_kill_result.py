"""Runs that end early and average their models: really killed and started again, they have the same result."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILL_AT = Path(__file__).with_name("kill_at.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
RECIPE = """
[training.early_stopping]
metric = "accuracy"
patience = 3
min_delta = 0.1
[training.average]
decay = 0.5
"""
OVERRIDES = (
    "rounds=9",
    "training.optimizer.lr=0.5",
    "training.average.decay=0.5",
    'training.early_stopping={metric="accuracy", patience=1, min_delta=0.02}',
)


def outcome(folder: Path) -> tuple[str, int, str, list[float]]:
    """What a run has come to: its model, of which round, why it ended, and the central accuracy of its rounds."""
    manifest = json.loads((folder / "manifest.json").read_text())
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return digest, manifest["result_round"], manifest["ended"], [line["central"]["accuracy"] for line in lines]


@pytest.mark.parametrize("point", ["checkpoint", "after-last-round"])
def test_a_killed_run_has_the_same_result(point: str, tiny: Path, tmp_path: Path, simulated: Callable) -> None:
    tiny.write_text(tiny.read_text().replace("rounds = 4", "rounds = 9") + RECIPE)
    command = [sys.executable, str(KILL_AT), point, "simulate", str(tiny), "--out", str(tmp_path / "killed")]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = outcome(simulated(tiny, "whole")[0])
    assert outcome(simulated(tiny, "killed")[0]) == whole
    _, result_round, ended, accuracies = whole
    assert 0 < result_round < len(accuracies) - 1 < 9
    assert "got no better in 3 evaluations" in ended


@pytest.mark.parametrize("point", ["checkpoint_3", "model_1"])
def test_a_killed_server_has_the_same_result(deployment: Any, point: str) -> None:
    deployment.clients(flags=())
    deployment.server(*OVERRIDES, **{point: "die"}).ends(-signal.SIGKILL)
    deployment.ends_well(deployment.server(*OVERRIDES), *OVERRIDES)
    _, result_round, ended, accuracies = outcome(deployment.folder / "run")
    assert 0 < result_round < len(accuracies) - 1 < 9
    assert ended
