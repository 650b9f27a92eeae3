"""Every optimiser, schedule and way to train: it takes a round and resumes to the same bytes, or says why it does not.

Run as a script, this writes the table of docs/training.md.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from fedtrain.errors import InputError
from fedtrain.experiment.optimizers import AdamSection, OtherOptimizer
from fedtrain.experiment.sections import Experiment
from fedtrain.records import RoundRecord
from fedtrain.simulations.run import Places, simulate

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
BEGIN, END = "<!-- recipes: begin -->\n", "<!-- recipes: end -->\n"

OPTIMIZERS: dict[str, dict[str, Any]] = {"sgd": {"name": "sgd"}, "sgd with momentum": {"name": "sgd", "momentum": 0.9}}
OPTIMIZERS |= {
    name: {"name": name}
    for section in (AdamSection, OtherOptimizer)
    for name in get_args(section.model_fields["name"].annotation)
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant"},
    "warm-up": {"name": "constant", "warmup_rounds": 2},
    "step": {"name": "step", "every": 1},
    "exponential": {"name": "exponential"},
    "cosine": {"name": "cosine"},
    "cosine by step": {"name": "cosine", "by": "step"},
    "linear": {"name": "linear"},
    "triangular": {"name": "triangular", "period": 2.0},
    "cosine-restarts": {"name": "cosine-restarts", "period": 1},
    "one-cycle": {"name": "one-cycle", "by": "step"},
    "plateau": {"name": "plateau", "patience": 1},
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DP-SGD": {
        "privacy": {"unit": "sample", "noise_multiplier": 1.0, "delta": 1e-3, "max_grad_norm": 1.0, "noise_seed": 1}
    },
    "LoRA": {"model": {"lora": {"rank": 2}}},
}


ROWS = """
import torch
from fedtrain.data.base import Dataset, DataSpec

def rows():
    labels = torch.arange(60) % 2
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(1)) + labels[:, None]
    return Dataset("rows", DataSpec((6,), "class", 2), inputs, labels)
"""


def document(optimizer: str, schedule: str, way: str) -> dict[str, Any]:
    training = {"local_steps": 2, "batch_size": 8, "optimizer": OPTIMIZERS[optimizer], "schedule": SCHEDULES[schedule]}
    data = {"name": "rows.py:rows", "clients": 2, "central_test": 0.1}
    task = {"name": "mlp", "options": {"hidden": [8]}}
    run = {"workers": 0, "device": "cpu", "checkpoint_seconds": 0.0}
    return {"rounds": 2, "task": task, "data": data, "training": training, "run": run, **WAYS[way]}


class Watcher:
    """Copies a run's folder after the first round: what a kill would leave."""

    def __init__(self, folder: Path, copy: Path) -> None:
        self._folder, self._copy = folder, copy

    def client_finished(self, round_number: int) -> None: ...
    def notice(self, text: str) -> None: ...
    def round_finished(self, record: RoundRecord) -> None: ...

    def round_started(self, round_number: int, clients: int) -> None:
        if round_number == 2 and not self._copy.exists():
            shutil.copytree(self._folder, self._copy)


def outcome(optimizer: str, schedule: str, way: str, folder: Path) -> str:
    """ "yes", or why not; an error that is not the user's is raised."""
    (folder / "rows.py").write_text(ROWS)
    try:
        experiment = Experiment.model_validate(document(optimizer, schedule, way))
        watcher = Watcher(folder / "whole", folder / "cut")
        whole = simulate(experiment, Places(folder, folder / "whole", None), watcher)
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    except InputError as error:
        return str(error)
    assert whole.read_rounds()[-1].update_norm > 0
    assert not (folder / "cut" / "model.safetensors").exists()
    assert list((folder / "cut" / "checkpoints").iterdir()), "it would begin anew"
    cut = simulate(experiment, Places(folder, folder / "cut", None), watcher)
    assert cut.read_manifest().resumed == 1
    assert cut.model.read_bytes() == whole.model.read_bytes(), f"{optimizer}, {schedule}, {way}: other bytes"
    return "yes"


REFUSED = {("muon", way): 'training.optimizer.name = "muon" cannot train this model' for way in ("plain", "DP-SGD")}
"""(optimiser, way) -> a part of the reason; of all schedules. Muon is for matrices alone, and adapters are such."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_recipe_takes_rounds_and_resumes_or_is_refused(optimizer: str, way: str, tmp_path: Path) -> None:
    told = {}
    for schedule in SCHEDULES:
        (tmp_path / schedule).mkdir()
        told[schedule] = outcome(optimizer, schedule, way, tmp_path / schedule)
    expected = REFUSED.get((optimizer, way))
    for schedule, words in told.items():
        assert words == "yes" if expected is None else expected in words, f"{schedule}: {words}"
    assert f"| {_row(optimizer, way, told)} |" in DOCS.read_text(encoding="utf-8")


def _row(optimizer: str, way: str, told: dict[str, str]) -> str:
    by_words: dict[str, list[str]] = {}
    for schedule, words in told.items():
        by_words.setdefault(words, []).append(schedule)
    if set(by_words) == {"yes"}:
        words = "all schedules"
    elif len(by_words) == 1:
        words = f"no: {next(iter(by_words))}"
    else:
        words = "; ".join(f"{', '.join(which)}: {words}" for words, which in by_words.items())
    return f"{optimizer} | {way} | {' '.join(words.split())}"


def table() -> str:
    """Try all of them."""
    lines = ["| optimiser | way | schedules |", "|---|---|---|"]
    for optimizer in OPTIMIZERS:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                told = {}
                for schedule in SCHEDULES:
                    (Path(folder) / schedule).mkdir()
                    told[schedule] = outcome(optimizer, schedule, way, Path(folder) / schedule)
            lines.append(f"| {_row(optimizer, way, told)} |")
    tried = ", ".join(SCHEDULES)
    return "\n".join([*lines, "", f"Schedules tried: {tried}.", ""])


if __name__ == "__main__":
    text = DOCS.read_text(encoding="utf-8")
    pattern = f"(?s)(?<={re.escape(BEGIN)}).*(?={re.escape(END)})"
    DOCS.write_text(re.sub(pattern, lambda _: table(), text), encoding="utf-8")
