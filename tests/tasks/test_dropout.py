from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import TaskSection
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.rng import NoiseSource
from fedtrain.privacy.sample import PrivateGradients
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.base import Task
from fedtrain.tasks.dropout import chance
from fedtrain.tasks.registry import make_task

IMAGES, TEXT = DataSpec((1, 16, 16), "class", 3), DataSpec((6,), "tokens", 11)
SMALL = {
    "mlp": (IMAGES, {"hidden": [8, 8]}),
    "cnn": (IMAGES, {}),
    "simple-cnn": (IMAGES, {}),
    "char-lstm": (TEXT, {"hidden": 8}),
    "transformer": (TEXT, {"width": 8}),
}


def built(name: str, **options: float) -> tuple[Task, nn.Module]:
    spec, small = SMALL[name]
    task = make_task(TaskSection(name=name, options={**small, **options}), spec, Path())
    with global_torch_seed(3):
        return task, task.model()


@pytest.mark.parametrize("name", SMALL)
def test_dropout_changes_training_alone(name, draw):
    _, plain = built(name)
    _, model = built(name, dropout=0.5)
    assert not any(isinstance(module, nn.Dropout) for module in plain.modules())
    assert [*dict(plain.named_modules())] == [*dict(built(name, dropout=0.0)[1].named_modules())]
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    inputs = draw(SMALL[name][0], 4).inputs
    assert torch.equal(plain.eval()(inputs), model.eval()(inputs))
    model.train()
    with global_torch_seed(1):
        first, second = model(inputs), model(inputs)
    with global_torch_seed(1):
        again = model(inputs)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", SMALL)
def test_dp_sgd_takes_models_with_dropout_on_its_fast_way(name, draw):
    task, model = built(name, dropout=0.5)
    trained = list(model.parameters())
    examples = draw(SMALL[name][0], 4)
    clipless = SamplePrivacy(unit="sample", noise_multiplier=1.0, delta=1e-5, max_grad_norm=1e6)
    private = PrivateGradients(model.train(), task.loss, trained, clipless)
    assert private.mode == "fast"
    every = Spend(noise_multiplier=0.0, sample_rate=1.0, steps=1)
    (first,) = private.steps(examples.inputs, examples.targets, every, NoiseSource(1))  # tries the model once
    with global_torch_seed(1):
        (found,) = private.steps(examples.inputs, examples.targets, every, NoiseSource(1))
    # Unclipped and without noise it is the gradient of the mean loss, with the same units left out. The LSTM's fused
    # kernel lays its output out otherwise in memory, where dropout draws: with a hook it goes step by step here too.
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    with global_torch_seed(1):
        loss = task.loss(model(examples.inputs), examples.targets).mean()
    torch.testing.assert_close(list(found), list(torch.autograd.grad(loss, trained)), atol=1e-5, rtol=1e-4)
    assert not all(torch.equal(one, other) for one, other in zip(first, found, strict=True))


@pytest.mark.parametrize("value", [1, -0.1, "0.5", True])
def test_what_is_no_chance_is_refused(value):
    with pytest.raises(TaskError, match="'dropout'"):
        chance(value)
