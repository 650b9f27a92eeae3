"""What the training recipe remembers between rounds survives an interruption, and does not depend on the processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtrain.cli.progress import RunObserver
from fedtrain.errors import InterruptedRunError
from fedtrain.experiment import load
from fedtrain.records import RoundRecord
from fedtrain.rundir import RunFolder
from fedtrain.simulations.run import Places, simulate

pytest.importorskip("sklearn")

STATE = ("clients={}", "training.local_steps=5")  # everybody comes back, with what it kept
CASES = {
    "kept moments, easy examples first, the average of the best rounds": (
        "task.options={hidden=[8], dropout=0.3}",
        'training.optimizer={name="adam", lr=0.05}',
        "training.optimizer_state=keep",
        'training.layer_lr={"fc1.*"=0.5}',
        'training.schedule={name="cosine", by="step", warmup_rounds=1}',
        'training.augment=["flip", {name="noise", std=0.1}, "mixup"]',
        "training.balance=oversample",
        "training.curriculum={rounds=3, start=0.4}",
        "training.penalty={l1=1e-4, l2=1e-3}",
        "training.clip_norm=1.0",
        "training.micro_batch_size=8",
        'training.loss={name="focal", gamma=1.0}',
        'training.early_stopping={metric="accuracy", patience=2}',
        "training.average={name='ema', decay=0.3}",
        'model={init={name="lsuv"}, unfreeze={"fc1.*"=2}}',
        'evaluation.metrics=["balanced-accuracy", "auroc"]',
    ),
    "averaged moments, adapters, a plateau, a plain average": (
        "task.options={hidden=[8], dropout=0.3}",
        "training.optimizer.momentum=0.9",
        "training.optimizer_state=average",
        'training.schedule={name="plateau", metric="accuracy", patience=1, gamma=0.5}',
        "training.average={name='swa', start_round=2}",
        'model.lora={rank=2, dropout=0.2, train=["fc2.bias"]}',
    ),
    "a loss of batches": (
        "task.name=kmeans",
        "task.options={clusters=4}",
        'training.optimizer={name="adamw"}',
        "training.optimizer_state=keep",
        "training.early_stopping={patience=4}",
        "training.average={name='ema', start_round=2}",
    ),
}


class Interrupting(RunObserver):
    """Ctrl-C when the third round starts."""

    def round_started(self, round_number: int, clients: int) -> None:
        if round_number == 3:
            raise KeyboardInterrupt


def run(file: Path, folder: Path, overrides: tuple[str, ...], observer: RunObserver | None = None) -> RunFolder:
    places = Places(file.parent, folder, None)
    return simulate(load(file, (*STATE, *overrides)), places, observer or RunObserver())


def outcome(folder: RunFolder) -> tuple[dict[str, bytes], list[RoundRecord], int | None]:
    """The model and what clients keep at the end; what rounds were like, but for the clock; the result's round."""
    kept = {path.parent.name: path for path in sorted(folder.clients.glob("*/*"))}
    clock = {"seconds_train": 0.0, "seconds_evaluate": 0.0, "finished_at": ""}
    files = {"model": folder.model.read_bytes()} | {name: path.read_bytes() for name, path in kept.items()}
    records = [record.model_copy(update=clock) for record in folder.read_rounds()]
    return files, records, folder.read_manifest().result_round


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_in_the_same_bytes(case: str, tiny: Path, tmp_path: Path) -> None:
    whole = run(tiny, tmp_path / "whole", CASES[case])
    with pytest.raises(InterruptedRunError, match="2 of 4 rounds are kept"):
        run(tiny, tmp_path / "resumed", CASES[case], Interrupting())
    resumed = run(tiny, tmp_path / "resumed", CASES[case])
    assert resumed.read_manifest().resumed == 1
    assert outcome(resumed) == outcome(whole)
    assert (whole.read_manifest().result_round or 0) >= 2  # what was remembered counts


def test_workers_and_one_process_agree(tiny: Path, tmp_path: Path) -> None:
    most, *_ = CASES.values()
    one, two = (run(tiny, tmp_path / count, (*most, f"run.workers={count}")) for count in "02")
    assert outcome(two) == outcome(one)
