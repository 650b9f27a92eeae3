"""Augmentation multiplicity (De et al. 2022): an example's gradient is the mean over its copies, and then clipped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import TaskSection
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.rng import NoiseSource
from fedtrain.privacy.sample import PrivateGradients
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks import make_task

pytest.importorskip("opacus")

MODES = ("fast", "hooks", "functorch")
TASKS = {
    "logistic": (DataSpec((13,), "class", 2), {}),
    "mlp": (DataSpec((1, 8, 8), "class", 5), {"hidden": [7, 6]}),
    "simple-cnn": (DataSpec((1, 16, 16), "class", 4), {}),
    "char-lstm": (DataSpec((6,), "tokens", 11), {"hidden": 5, "embedding": 3}),
    "transformer": (DataSpec((6,), "tokens", 11), {"width": 8}),
}


class Noted:
    """A change of inputs that can be looked up: rows are stored as they left."""

    def __init__(self) -> None:
        self.rng, self.given = torch.Generator().manual_seed(3), []

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.dtype == torch.int64:
            found = (rows + torch.randint(0, 11, rows.shape, generator=self.rng)) % 11
        else:
            found = rows + torch.randn(rows.shape, generator=self.rng)
        self.given.append(found)
        return found


def gradients_of(model: nn.Module, loss, copies: int, **options) -> PrivateGradients:
    section = SamplePrivacy(noise_multiplier=1.0, delta=1e-5, augmentations=copies, **options)
    return PrivateGradients(model, loss, list(model.parameters()), section)


def step(gradients: PrivateGradients, inputs: Tensor, targets: Tensor, augment) -> list[Tensor]:
    """The sum of clipped gradients, without noise."""
    (found,) = gradients.steps(inputs, targets, Spend(0, 1.0, 1), NoiseSource(), augment)
    return [g * len(inputs) for g in found]


def looped(model: nn.Module, loss, batches: list[Tensor], targets: Tensor, bound: float, per_layer: bool):
    """The same by a loop over examples and copies; also the largest norm before clipping."""
    total, largest, first = [torch.zeros_like(p) for p in model.parameters()], 0.0, 0
    layers = [list(m.parameters(recurse=False)) for m in model.modules() if list(m.parameters(recurse=False))]
    for batch, copies in batches:
        for copied in batch.unflatten(0, (copies, -1)).transpose(0, 1):  # (copies, ...) of one example
            losses = loss(model(copied), targets[first].expand(copies, *targets.shape[1:]))
            mean = torch.autograd.grad(losses.mean(), list(model.parameters()), materialize_grads=True)
            place = {id(p): g for p, g in zip(model.parameters(), mean)}
            for group in layers if per_layer else [list(model.parameters())]:
                norm = float(torch.cat([place[id(p)].flatten() for p in group]).norm())
                most = bound / math.sqrt(len(layers)) if per_layer else bound
                for p in group:
                    place[id(p)] = place[id(p)] * min(1.0, most / norm) if norm else place[id(p)]
                largest = max(largest, norm)
            for t, p in zip(total, model.parameters()):
                t += place[id(p)]
            first += 1
    return total, largest


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TASKS)
def test_every_mode_equals_a_loop_over_examples_and_copies(name, mode):
    spec, options = TASKS[name]
    with global_torch_seed(1):
        task = make_task(TaskSection(name=name, options=options), spec, Path())
        model = task.model().train()
        inputs, targets = torch.randn(5, *spec.input_shape), torch.randint(spec.num_classes, (5,))
        if spec.target == "tokens":
            inputs, targets = torch.randint(11, (2, 5, *spec.input_shape))
    for clipping in ("flat", "per-layer"):
        augment = Noted()
        gradients = gradients_of(model, task.loss, 3, mode=mode, clipping=clipping, max_grad_norm=0.3)
        found = step(gradients, inputs, targets, augment)
        assert gradients.mode == mode
        expected, largest = looped(
            model, task.loss, [(batch, 3) for batch in augment.given], targets, 0.3, clipping == "per-layer"
        )
        assert largest > 0.3
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def linear_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten(1).sum(1)


@pytest.mark.parametrize("mode", MODES)
def test_two_copies_by_hand(mode):
    # The gradient of w x is x. Example a has copies (3, 0) and (0, 4): mean (1.5, 2), norm 2.5, clipped to half its
    # length. Example b has (0, 1) and (0, -1), with mean 0. Example c has (1, 0) and (0, 0): (0.5, 0) stays as it is.
    model = nn.Linear(2, 1, bias=False)
    copies = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 4.0], [0.0, -1.0], [0.0, 0.0]])
    gradients = gradients_of(model, linear_loss, 2, mode=mode, max_grad_norm=1.25)
    (found,) = step(gradients, torch.zeros(3, 2), torch.zeros(3), lambda _: copies)
    torch.testing.assert_close(found, torch.tensor([[1.25, 1.0]]))


@pytest.mark.parametrize("mode", MODES)
def test_one_example_adds_no_more_than_the_bound_whatever_its_copies(mode):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(3 * 16, 2))
    inputs = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    gradients = gradients_of(model, linear_loss, 8, mode=mode, max_grad_norm=0.7)

    def total(count: int) -> Tensor:
        rng = torch.Generator().manual_seed(9)  # the first examples' copies stay, whoever comes behind them
        noise = 100 * torch.randn(8, 4, 1, 6, 6, generator=rng)
        found = step(gradients, inputs[:count], torch.zeros(count), lambda x: x + noise[:, :count].reshape(-1, 1, 6, 6))
        return torch.cat([g.flatten() for g in found])

    assert float(total(1).norm()) == pytest.approx(0.7, rel=1e-4)
    for count in (2, 3, 4):
        assert float((total(count) - total(count - 1)).norm()) <= 0.7 * (1 + 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_an_example_with_one_copy_that_is_not_finite_counts_as_zero(mode):
    model = nn.Linear(2, 1, bias=False)
    copies = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, math.inf]])
    gradients = gradients_of(model, linear_loss, 2, mode=mode, max_grad_norm=5.0)
    (found,) = step(gradients, torch.zeros(2, 2), torch.zeros(2), lambda _: copies)
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.0]]))


@pytest.mark.parametrize("size", [1, 2, 6, 7, 64])
def test_physical_batches_count_copies(size):
    model = nn.Linear(3, 1)
    augment = Noted()
    gradients = gradients_of(model, linear_loss, 3, physical_batch_size=size)
    found = step(gradients, torch.randn(5, 3), torch.zeros(5), augment)
    assert max(map(len, augment.given)) <= max(size, 3)
    assert sum(map(len, augment.given)) == 15
    expected, _ = looped(model, linear_loss, [(batch, 3) for batch in augment.given], torch.zeros(5), 1.0, False)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_without_a_change_there_are_no_copies():
    model, inputs = nn.Linear(3, 1), torch.randn(4, 3)
    shown = []
    gradients = gradients_of(model, lambda outputs, _: shown.append(len(outputs)) or outputs[:, 0], 5)
    found = step(gradients, inputs, torch.zeros(4), None)
    assert shown[-1] == 4
    alone = step(gradients_of(model, linear_loss, 1), inputs, torch.zeros(4), None)
    assert all(torch.equal(a, b) for a, b in zip(found, alone))


def test_ghost_is_refused_with_the_reason():
    with pytest.raises(ValidationError, match="the norms of single copies"):
        SamplePrivacy(noise_multiplier=1.0, delta=1e-5, mode="ghost", augmentations=2)
    assert SamplePrivacy(noise_multiplier=1.0, delta=1e-5, mode="ghost").augmentations == 1
