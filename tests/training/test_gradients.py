import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrain.errors import TaskError
from fedtrain.experiment.training import TrainingSection
from fedtrain.tasks.base import Metric
from fedtrain.training.batches import Batch
from fedtrain.training.device import deterministic
from fedtrain.training.gradients import BatchGradients, Losses, LossScale, PlainGradients
from fedtrain.training.rules import Tensors

CPU = torch.device("cpu")


class Squares:
    def model(self) -> nn.Module:
        raise NotImplementedError

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs.flatten(), targets, reduction="none")

    def metrics(self) -> dict[str, Metric]:
        return {}


def draw(count: int = 10) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, generator=rng), torch.randn(count, generator=rng)


def perceptron() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor], **fields: object) -> tuple[Tensors, float]:
    training = TrainingSection.model_validate(fields)
    own = BatchGradients(model, Squares(), training, CPU)
    losses = Losses(torch.device("cpu"))
    return PlainGradients(own, training).of(Batch(*batch), list(model.parameters()), losses), losses.mean()


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_micro_batches_add_up_to_the_whole(size: int) -> None:
    model, batch = perceptron(), draw()
    whole, loss = gradients(model, batch)
    pieces, same = gradients(model, batch, micro_batch_size=size)
    assert same == pytest.approx(loss, rel=1e-6)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


class Watched(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 1)
        self.sizes: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs))
        return super().forward(inputs)


def test_no_forward_pass_is_larger_than_asked() -> None:
    model = Watched()
    gradients(model, draw(), micro_batch_size=4)
    assert model.sizes == [4, 4, 2]


class Summed(nn.Module):
    """Its two parameters get one and the same tensor of gradients from autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ (self.a + self.b)


@pytest.mark.parametrize("fields", [{"micro_batch_size": 2}, {"clip_norm": 0.1}, {"precision": "float16"}])
def test_gradients_that_share_memory_are_counted_once(fields: dict[str, object]) -> None:
    inputs, targets = torch.ones(4, 3), torch.zeros(4)
    (a, b), _ = gradients(Summed(), (inputs, targets), **fields)
    # d/da of (6)^2 is 2 * 6 * 1 in each of six entries; their norm is 12 sqrt(6).
    expected = 0.1 / math.sqrt(6) if "clip_norm" in fields else 12.0
    assert a.tolist() == pytest.approx([expected] * 3, rel=1e-3)
    assert b.tolist() == pytest.approx([expected] * 3, rel=1e-3)


@pytest.mark.parametrize("most", [0.01, 0.3, 100.0])
def test_the_norm_is_clipped_as_torch_clips_it(most: float) -> None:
    model, batch = perceptron(), draw()
    clipped, _ = gradients(model, batch, clip_norm=most)
    Squares().loss(model(batch[0]), batch[1]).mean().backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), most)
    for one, p in zip(clipped, model.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(one, p.grad, rtol=1e-6, atol=1e-8)
    assert norm(clipped) <= most


def test_values_are_clipped_before_the_norm() -> None:
    model, batch = perceptron(), draw()
    plain, _ = gradients(model, batch)
    by_value, _ = gradients(model, batch, clip_value=0.05)
    for one, other in zip(plain, by_value, strict=True):
        assert torch.equal(one.clamp(-0.05, 0.05), other)
    assert any(float(t.abs().max()) > 0.05 for t in plain)
    both, _ = gradients(model, batch, clip_value=0.05, clip_norm=0.01)
    factor = 0.01 / norm(by_value)
    for one, other in zip(by_value, both, strict=True):
        torch.testing.assert_close(one * factor, other, rtol=1e-4, atol=1e-8)


def test_the_scale_moves_as_that_of_torch() -> None:
    ours = LossScale(8.0, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    p = nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([p], lr=0.0)
    for finite in [True, True, False, True, True, True, True, False, False, True, True, True]:
        theirs.scale(torch.ones(1))  # creates its state
        p.grad = torch.tensor([1.0 if finite else math.inf])
        theirs.step(sgd)
        theirs.update()
        ours.update(finite=finite)
        assert ours.value == theirs.get_scale()


def test_float16_finds_the_gradient_that_would_vanish() -> None:
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    batch = torch.ones(1, 3), torch.tensor([1e-9])  # its slope is -2e-9, below float16's smallest number, 6e-8
    (full,), _ = gradients(model, batch)
    (scaled,), _ = gradients(model, batch, precision="float16")
    torch.testing.assert_close(scaled, full, rtol=1e-2, atol=0)


class Steep(nn.Module):
    """Multiplies the gradient that comes back in float16 until it overflows, unless the loss was scaled down enough."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.weight, self.slope, self.passes = nn.Parameter(torch.full((1, 3), 1e-5)), slope, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        return F.linear(inputs, self.weight) * self.slope


def test_a_batch_that_overflows_is_taken_with_a_smaller_scale() -> None:
    training = TrainingSection(precision="float16")
    model = Steep(64.0)
    plain = PlainGradients(BatchGradients(model, Squares(), training, CPU), training)
    batch, losses = (torch.ones(2, 3), torch.full((2,), 100.0)), Losses(torch.device("cpu"))
    (first,) = plain.of(Batch(*batch), [model.weight], losses)
    passes = model.passes
    (second,) = plain.of(Batch(*batch), [model.weight], losses)
    assert passes > 1
    assert model.passes == passes + 1  # the scale is remembered
    expected = 2 * (3e-5 * 64 - 100) * 64
    assert first[0].tolist() == pytest.approx([expected] * 3, rel=5e-3)
    assert torch.equal(first, second)
    assert losses.mean() == pytest.approx((3e-5 * 64 - 100) ** 2, rel=1e-3)  # each batch counts once


def test_a_loss_that_is_not_finite_is_shown_and_not_tried_for_ever() -> None:
    model = Steep(math.nan)
    (gradient,), loss = gradients(model, draw(2), precision="float16")
    assert gradient.isnan().all()
    assert math.isnan(loss)


class Unpooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        pooled, places = F.max_pool2d((inputs * self.weight)[:, None], (1, 3), return_indices=True)
        return F.max_unpool2d(pooled, places, (1, 3)).sum((1, 2, 3))


def test_what_cannot_be_deterministic_is_one_error() -> None:
    batch = draw()[0][:, None], draw()[1]
    gradients(Unpooled(), batch)
    with deterministic(True), pytest.raises(TaskError, match=r"run\.deterministic.*max_unpooling2d"):
        gradients(Unpooled(), batch)
    assert not torch.are_deterministic_algorithms_enabled()
