"""What is wrong with a training recipe is told before the run: one message, exit code 2, and no folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("sklearn")

LOSSES = """
def mean(outputs, targets):
    return outputs.mean()

def broken(outputs, targets):
    raise KeyError("weights")
"""
NUMBERS_PY = """
import torch
from fedtrain.data.base import DataSpec, Dataset

def rows():
    return Dataset("numbers", DataSpec((3,), "number"), torch.rand(60, 3), torch.rand(60))
"""
SAMPLE = 'privacy={unit="sample", noise_multiplier=1.0, delta=1e-3, noise_seed=1}'
TABLE = ("data.name=breast-cancer", "data.scaling=none")
NUMBERS = ("task.name=regressor", "data.name=numbers.py:rows", "data.partition={}")
KMEANS = ("task.name=kmeans", "task.options={}")
NO_TEST = "data.test=0.0"
NO_CENTRAL = ("data.central_test=0.0", NO_TEST)
PRIVATE = (SAMPLE, NO_TEST)
START = "model.start=start.safetensors"

# (overrides, what the message says of field and value)
VALUES = {
    "a negative rate": (("training.optimizer.lr=-1",), "training.optimizer.lr: got -1"),
    "a negative rate of a layer": (('training.layer_lr={"fc1.*"=-1.0}',), "training.layer_lr"),
    "a momentum of 1": (("training.optimizer.momentum=1.0",), "training.optimizer.momentum: got 1.0"),
    "no such optimiser": (("training.optimizer.name=lion",), "training.optimizer"),
    "an optimiser that takes closures": (("training.optimizer.name=lbfgs",), "evaluates the loss several times"),
    "no such option": (('training.optimizer={name="rmsprop", options={alpah=1}}',), "got alpah"),
    "an option of a wrong value": (('training.optimizer={name="rmsprop", options={alpha=-1}}',), 'name = "rmsprop"'),
    "an optimiser of matrices alone": (("training.optimizer.name=muon",), 'training.optimizer.name = "muon"'),
    "no such schedule": (("training.schedule.name=polynomial",), "training.schedule"),
    "a fall to a negative rate": (('training.schedule={name="step", every=1, gamma=-1.0}',), "schedule.gamma: got -1"),
    "no such loss": (('training.loss={name="poisson"}',), "training.loss"),
    "no such augmentation": (('training.augment=["jitter"]',), "training.augment"),
    "no such metric": (('evaluation.metrics=["mcc"]',), "evaluation.metrics"),
    "no such state": (("training.optimizer_state=forget",), 'training.optimizer_state: got "forget"'),
    "a negative penalty": (("training.penalty.l1=-1.0",), "training.penalty.l1: got -1"),
    "a gradient clipped to nothing": (("training.clip_norm=0.0",), "training.clip_norm: got 0"),
    "a dropout above 1": (("task.options={dropout=1.5}",), "dropout"),
    "an average of rounds that never come": (("training.average={start_round=9}",), "training.average.start_round = 9"),
    "unfrozen after the last round": (('model.unfreeze={"fc1.*"=9}',), 'model.unfreeze would train "fc1.*"'),
    "epochs and steps": (("training.local_epochs=1", "training.local_steps=1"), "local_epochs and local_steps"),
}
PATTERNS = {
    "model.freeze": ('model.freeze=["nix*"]',),
    "model.unfreeze": ('model.unfreeze={"nix*"=2}',),
    "model.drop": (START, 'model.drop=["nix*"]'),
    "training.layer_lr": ('training.layer_lr={"nix*"=0.1}',),
    "model.lora.layers": ('model.lora={layers=["nix*"]}',),
    "model.lora.train": ('model.lora={train=["nix*"]}',),
    "model.checkpoint": ('model.checkpoint=["nix*"]',),
    "personalization.private": ('personalization.private=["nix*"]',),
}
DATA = {
    "weights of other classes": (
        ('training.loss={name="cross-entropy", class_weights=[1.0, 2.0]}',),
        "training.loss.class_weights needs one number for each class: got 2 numbers",
    ),
    "alphas of other classes": (('training.loss={name="focal", alpha=[0.5]}',), "training.loss.alpha"),
    "a loss of numbers": (('training.loss={name="mse"}',), 'training.loss.name = "mse"'),
    "a loss of classes": ((*NUMBERS, 'training.loss={name="hinge"}'), 'training.loss.name = "hinge"'),
    "classes of numbers": ((*NUMBERS, "training.balance=weight"), 'training.balance = "weight"'),
    "an own loss of a batch": (('training.loss={name="own", path="own.py:mean"}',), "loss"),
    "an own loss that raises": (('training.loss={name="own", path="own.py:broken"}',), "KeyError"),
    "an own loss that is not there": (('training.loss={name="own", path="own.py:nix"}',), "own.py"),
    "an own loss in no file": (('training.loss={name="own", path="nix.py:mean"}',), "nix.py"),
    "an own score in no file": (('training.curriculum={score="nix.py:mean"}',), "nix.py"),
    "an own optimiser in no file": (('training.optimizer={name="own", path="nix.py:Mine"}',), "nix.py"),
    "a head of another size": ((START,), "fc2"),
    "weights in no file": (("model.start=nix.safetensors",), "nix.safetensors"),
    "gains in no file": ((*TABLE, "model.gains=nix.csv"), "nix.csv"),
    "tokens of images": (('training.augment=["replace"]',), 'training.augment = "replace" is for tokens'),
    "images of a table": ((*TABLE, 'training.augment=["flip"]'), 'training.augment = "flip" is for images'),
    "a shift of the whole image": (('training.augment=[{name="crop", padding=8}]',), "padding = 8"),
    "colours of grey images": (('training.augment=[{name="colour", saturation=0.5}]',), "saturation = 0.5"),
    "mixup before the last": (('training.augment=["mixup", "flip"]',), "training.augment"),
    "errors of classes": (('evaluation.metrics=["rmse"]',), "got rmse"),
    "two classes of ten": (('evaluation.metrics=["f1"]',), "got f1"),
    "no such group": ((*TABLE, 'evaluation.group={column="sex"}'), "evaluation.group.column = sex"),
    "groups of images": (('evaluation.group={column="sex"}',), "evaluation.group"),
    "stopping without a test set": ((*NO_CENTRAL, "training.early_stopping={}"), "training.early_stopping"),
    "a plateau without a test set": ((*NO_CENTRAL, 'training.schedule={name="plateau"}'), "training.schedule"),
    "stopping by clients that hold nothing out": (
        (NO_TEST, "evaluation.clients_every=1", 'training.early_stopping={on="clients"}'),
        "training.early_stopping.on",
    ),
    "a plateau of clients that are not asked": (
        ('training.schedule={name="plateau", on="clients"}',),
        "training.schedule.on",
    ),
    "stopping by what is not measured": (('training.early_stopping={metric="auroc"}',), "got auroc"),
    "a plateau of what is not measured": (('training.schedule={name="plateau", metric="auroc"}',), "got auroc"),
    "half precision on a CPU": (("training.precision=float16",), "training.precision"),
    "several devices and workers": (("run.gpus=2", "run.workers=2"), "run.gpus = 2"),
    "a loss beside a loss of batches": ((*KMEANS, 'training.loss={name="mse"}'), "batch_loss, and training.loss"),
    "several devices and a loss of batches": ((*KMEANS, "run.gpus=2"), "batch_loss, and run.gpus"),
    "privacy and a loss of batches": ((*PRIVATE, *KMEANS), 'batch_loss, and privacy.unit = "sample"'),
    "two ways to compute again": (("training.compile=true", 'model.checkpoint=["fc1"]'), "model.checkpoint"),
}
UNDER_PRIVACY = {
    "run.gpus": "run.gpus=2",
    'training.augment = "mixup"': 'training.augment=["mixup"]',
    "training.curriculum": "training.curriculum={}",
    'training.balance = "oversample"': "training.balance=oversample",
    'training.balance = "weight"': "training.balance=weight",
    "training.clip_norm": "training.clip_norm=1.0",
    "training.clip_value": "training.clip_value=1.0",
    "training.micro_batch_size": "training.micro_batch_size=4",
    "training.compile": "training.compile=true",
    "training.precision": "training.precision=bfloat16",
    "model.checkpoint": 'model.checkpoint=["fc1"]',
    'training.optimizer_state = "average"': "training.optimizer_state=average",
    "data.test": "data.test=0.2",
}
CASES = (
    VALUES
    | {f"a pattern of nothing in {field}": (overrides, field) for field, overrides in PATTERNS.items()}
    | DATA
    | {f"privacy and {text}": ((*PRIVATE, text), field) for field, text in UNDER_PRIVACY.items()}
)


@pytest.fixture
def refused(fedtrain: Callable, tiny: Path, tmp_path: Path) -> Callable[..., str]:
    """Try to simulate with overrides; the message in one line."""

    def simulate(*overrides: str) -> str:
        out = tmp_path / "out"
        flags = [part for text in overrides for part in ("--set", text)]
        result = fedtrain("simulate", tiny, "--out", out, "--quiet", *flags)
        assert (result.code, result.out) == (2, ""), result
        assert result.err.startswith("fedtrain: ")
        assert "Traceback" not in result.err
        assert len(result.err) < 1500
        assert not out.exists()
        return " ".join(result.err.split())

    return simulate


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_and_nothing_is_written(case: str, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LOSSES)
    (tmp_path / "numbers.py").write_text(NUMBERS_PY)
    shapes = {"fc1.weight": (8, 64), "fc1.bias": (8,), "fc2.weight": (5, 8), "fc2.bias": (5,)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "start.safetensors")
    overrides, words = CASES[case]
    assert words in refused(*overrides)
