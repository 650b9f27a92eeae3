import math
from pathlib import Path

import pytest
import torch

from fedtrain import params as P
from fedtrain.data.base import DataSpec, Examples
from fedtrain.experiment.sections import TaskSection
from fedtrain.experiment.training import TrainingSection
from fedtrain.tasks import TASKS, make_task
from fedtrain.training.loop import Assignment, LocalResult, Recipe, Trainer

SPECS = {
    "cnn": DataSpec((1, 28, 28), "class", 10),
    "simple-cnn": DataSpec((1, 28, 28), "class", 10),
    "resnet18-gn": DataSpec((3, 32, 32), "class", 10),
    "char-lstm": DataSpec((12,), "tokens", 20),
    "transformer": DataSpec((12,), "tokens", 20),
    "regressor": DataSpec((6,), "number"),
}


def trained(name: str, precision: str) -> LocalResult:
    spec = SPECS.get(name, DataSpec((6,), "class", 3))
    task = make_task(TaskSection(name=name), spec, Path())
    training = TrainingSection.model_validate({"precision": precision, "local_steps": 2, "batch_size": 4})
    trainer = Trainer(task, Recipe(training), 1, torch.device("cpu"))
    make = torch.Generator().manual_seed(1)
    if spec.target == "tokens":
        inputs = torch.randint(0, spec.num_classes, (8, *spec.input_shape), generator=make)
        examples = Examples(inputs, inputs.roll(-1, 1))
    else:
        inputs = torch.rand((8, *spec.input_shape), generator=make)
        targets = torch.arange(8) % max(1, spec.num_classes)
        examples = Examples(inputs, targets if spec.target == "class" else inputs.sum(1))
    return trainer.train(Assignment(1, "a", P.snapshot(P.exchanged(trainer.model))), examples)


@pytest.mark.parametrize("name", TASKS)
def test_mixed_precision_is_near_full_precision(name: str) -> None:
    full, mixed = trained(name, "float32"), trained(name, "bfloat16")
    assert {t.dtype for t in mixed.delta.values() if t.is_floating_point()} == {torch.float32}
    assert mixed.loss == pytest.approx(full.loss, rel=0.02)
    one, other = (torch.cat([t.flatten().double() for t in result.delta.values()]) for result in (full, mixed))
    assert 0 < float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one)) < 0.25
    assert math.isfinite(mixed.loss)
