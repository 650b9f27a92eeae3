"""Steps of DP-SGD: sampling, physical batches, noise, and what is refused."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

from fedtrain.errors import InputError, RunError, TaskError
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.rng import NoiseSource
from fedtrain.privacy.sample import PrivateGradients

MODES = ("fast", "hooks", "ghost", "functorch")
CLIPPINGS = [(mode, clipping) for mode in MODES for clipping in ("flat", "per-layer")]
CLIPPINGS.remove(("ghost", "per-layer"))  # refused


def output(outputs: Tensor, _: Tensor) -> Tensor:
    """A loss whose gradient by a bias is 1, and by a weight its input."""
    return outputs.flatten(1).sum(1)


def private(model: nn.Module, loss=output, **options) -> PrivateGradients:
    section = SamplePrivacy(**{"noise_multiplier": 1.0, "delta": 1e-5, **options})
    return PrivateGradients(model, loss, [p for p in model.parameters() if p.requires_grad], section)


def linear(width: int) -> nn.Module:
    return nn.Linear(width, 1, bias=False)


def steps(gradients: PrivateGradients, inputs: Tensor, noise: float, rate: float, count: int) -> Tensor:
    """The first trained tensor's gradients, a row per step."""
    charge, targets = Spend(noise, rate, count), torch.zeros(len(inputs))
    return torch.stack([found[0].flatten() for found in gradients.steps(inputs, targets, charge, NoiseSource())])


def test_each_example_is_included_by_a_coin_of_its_own():
    # Example i has gradient 1 at place i alone, so the gradient times q n is the coins.
    count, n, rate = 1500, 6, 0.3
    coins = steps(private(linear(n)), torch.eye(n), 0, rate, count) * rate * n
    assert set(coins.round(decimals=3).unique().tolist()) == {0.0, 1.0}
    tolerance = 4.9 * math.sqrt(rate * (1 - rate) / count)
    assert (coins.mean(0) - rate).abs().max() < tolerance
    assert (torch.corrcoef(coins.T) - torch.eye(n)).abs().max() < 4.9 / math.sqrt(count)


def test_the_denominator_is_the_expected_batch_not_the_drawn_one():
    # 2 of 10 expected; every drawn example adds 1 / 2, however many come.
    found = steps(private(linear(1)), torch.ones(10, 1), 0, 0.2, 300)
    assert set((found * 2).round(decimals=3).flatten().tolist()) >= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert set((found * 2).round(decimals=3).flatten().tolist()) <= set(map(float, range(11)))


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_noise_is_on_the_sum_and_scales_with_the_norm(clipping):
    # Standard deviation 1.5 * 0.2 on the sum, over 0.5 * 4.
    d, count = 2000, 20
    gradients = private(linear(d), max_grad_norm=0.2, clipping=clipping)
    found = steps(gradients, torch.zeros(4, d), 1.5, 0.5, count).double()
    expected, numbers = 1.5 * 0.2 / 2, d * count
    assert float(found.std()) == pytest.approx(expected, rel=4.9 / math.sqrt(2 * numbers))
    assert abs(float(found.mean())) < 4.9 * expected / math.sqrt(numbers)
    below = float((found < expected).double().mean())
    assert below == pytest.approx(NormalDist().cdf(1), abs=4.9 * 0.5 / math.sqrt(numbers))


def test_every_trained_tensor_has_noise_of_the_same_size():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    (found,) = private(model).steps(torch.zeros(1, 100), torch.zeros(1), Spend(2.0, 1e-9, 1), NoiseSource())
    for gradient in found:
        sigma = 2.0 / 1e-9
        assert float(gradient.std()) == pytest.approx(sigma, rel=4.9 / math.sqrt(2 * gradient.numel()))


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_is_a_noise_only_step(mode):
    model = nn.Sequential(nn.Linear(30, 30), nn.GroupNorm(1, 30))
    charge = Spend(1.0, 1e-12, 3)
    found = list(private(model, mode=mode).steps(torch.ones(2, 30), torch.zeros(2), charge, NoiseSource()))
    assert len(found) == 3
    assert all(bool(g.isfinite().all()) and bool(g.all()) for gradients in found for g in gradients)
    silent = private(model, mode=mode).steps(torch.ones(2, 30), torch.zeros(2), Spend(0, 1e-12, 1), NoiseSource())
    assert not any(g.any() for g in next(silent))


@pytest.mark.parametrize(("mode", "clipping"), CLIPPINGS)
def test_physical_batches_change_nothing(mode, clipping):
    torch.manual_seed(2)
    model, inputs = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(7, 5)
    found = []
    for size in (1, 3, 7, 64):
        gradients = private(model, mode=mode, clipping=clipping, physical_batch_size=size, max_grad_norm=0.5)
        found.append(next(gradients.steps(inputs, torch.zeros(7), Spend(0, 1, 1), NoiseSource())))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize(("mode", "clipping"), CLIPPINGS)
def test_an_example_that_is_not_finite_counts_as_zero(mode, clipping, bad):
    torch.manual_seed(3)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    gradients = private(model, mode=mode, clipping=clipping, max_grad_norm=0.1)
    charge = Spend(0, 1, 1)
    expected = next(gradients.steps(inputs[[0, 2, 4]], torch.zeros(3), charge, NoiseSource()))
    inputs[1, 2] = inputs[3, 0] = bad
    found = next(gradients.steps(inputs, torch.zeros(5), charge, NoiseSource()))
    torch.testing.assert_close(found, [g * 3 / 5 for g in expected])
    only_bad = next(gradients.steps(inputs[[1, 3]], torch.zeros(2), charge, NoiseSource()))
    assert not any(g.any() for g in only_bad)


def test_the_trial_is_of_the_first_round_alone():
    calls = []
    gradients = private(linear(1), lambda outputs, _: calls.append(1) or outputs[:, 0])
    steps(gradients, torch.ones(2, 1), 0, 1, 3)
    first = len(calls)
    steps(gradients, torch.ones(2, 1), 0, 1, 3)
    assert len(calls) == first + 3
    assert first > 3


def test_a_gradient_of_zero_is_no_division_by_zero():
    assert not steps(private(linear(3)), torch.zeros(2, 3), 0, 1, 1).any()


def test_each_gradient_is_of_the_model_as_it_then_stands():
    # Loss w^2 / 2 has gradient w; a step of 1 takes w to 0.
    model = linear(1)
    nn.init.constant_(model.weight, 0.5)
    gradients = private(model, lambda outputs, _: outputs[:, 0].square() / 2)
    taken = gradients.steps(torch.ones(1, 1), torch.zeros(1), Spend(0, 1, 2), NoiseSource())
    assert next(taken)[0].item() == 0.5
    with torch.no_grad():
        model.weight.zero_()
    assert next(taken)[0].item() == 0.0
    assert next(taken, None) is None


class Enlarged(nn.Module):
    """The outputs of a layer, or the difference of those at two positions, times a number."""

    def __init__(self, layer: nn.Module, positions: int | None = None) -> None:
        super().__init__()
        self.layer, self.positions, self.factor = layer, positions, 1.0

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x).flatten(2) if self.positions else self.layer(x)
        if self.positions:
            first, second = out.unbind(self.positions)
            out = first - second
        return out * self.factor


def last_is(values: Tensor) -> Tensor:
    """Five random examples, then the given one."""
    return torch.cat([torch.randn(5, *values.shape, generator=torch.Generator().manual_seed(1)), values[None]])


ALIKE = torch.linspace(0.1, 1.7, 8)
ATTACKS = {  # a model, its inputs with the attacker as the last one, the factor, max_grad_norm
    "positions cancel": (
        lambda: Enlarged(nn.Linear(8, 8), positions=1),
        last_is(ALIKE.expand(2, 8)),
        1e18,
        1.0,
    ),
    "pixels cancel": (
        lambda: Enlarged(nn.Conv2d(8, 8, 1), positions=2),
        last_is(ALIKE[:, None, None].expand(8, 1, 2)),
        1e18,
        1.0,
    ),
    "tokens cancel": (
        lambda: Enlarged(nn.Embedding(3, 8), positions=1),
        torch.tensor([[1, 2]] * 5 + [[1, 1]]),
        1e18,
        1.0,
    ),
    "tiny factor": (lambda: Enlarged(nn.Linear(1, 1)), last_is(torch.tensor([1e25])), 1e20, 1.0),
    "tiny gradient": (lambda: Enlarged(nn.Linear(2, 1, bias=False)), last_is(torch.full((2,), 3.2e38)), 1e-38, 1e-6),
}


@pytest.mark.parametrize("mode", ["fast", "hooks", "functorch"])  # ghost is for servers that do not attack
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_weights_give_an_example_more_influence_than_the_bound(attack, mode):
    build, inputs, factor, bound = ATTACKS[attack]
    model = build()
    gradients = private(model, mode=mode, max_grad_norm=bound)

    def total(rows: Tensor) -> Tensor:
        (found,) = gradients.steps(rows, torch.zeros(len(rows)), Spend(0, 1, 1), NoiseSource())
        return torch.cat([g.double().flatten() for g in found]) * len(rows)

    total(inputs)  # the trial is of an honest model
    model.factor = factor
    assert float((total(inputs) - total(inputs[:-1])).norm()) <= bound * (1 + 1e-5)


def test_positions_that_do_not_cancel_are_not_clipped_for_their_rounding():
    # 6 positions of one gradient: the norm is their sum's to 1e-10, and half of it the bound.
    model = nn.Linear(20, 30, bias=False).double()
    found = []
    for bound in (1e9, 0.5 * 6 * math.sqrt(600)):
        gradients = private(model, max_grad_norm=bound)
        inputs = torch.ones(1, 6, 20, dtype=torch.float64)
        found.append(next(gradients.steps(inputs, torch.zeros(1), Spend(0, 1, 1), NoiseSource()))[0])
    torch.testing.assert_close(found[1], found[0] / 2, rtol=1e-10, atol=0)


def test_steps_come_in_the_order_of_trained_and_leave_others_alone():
    model = nn.Linear(2, 1)
    section = SamplePrivacy(noise_multiplier=1.0, delta=1e-5, max_grad_norm=10.0)
    gradients = PrivateGradients(model, output, [model.bias, model.weight], section)
    (found,) = gradients.steps(torch.tensor([[3.0, 4.0]]), torch.zeros(1), Spend(0, 1, 1), NoiseSource())
    assert [g.tolist() for g in found] == [[1.0], [[3.0, 4.0]]]


class Centred(nn.Module):
    """A batch normalisation by another name."""

    def __init__(self, affine: nn.Module) -> None:
        super().__init__()
        self.affine = affine

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x - x.mean(0))


class Counting(nn.Module):
    """It keeps a mean of what it has seen, outside of what is exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean(0)
        return self.fc(x)


def with_buffer() -> nn.Module:
    model = nn.Linear(2, 1)
    model.register_buffer("scale", torch.ones(1))
    return model


def beside(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), module)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: beside(nn.BatchNorm1d(2)), r"1 \(BatchNorm1d\).*GroupNorm"),
        (lambda: beside(nn.BatchNorm2d(2).requires_grad_(False)), r"1 \(BatchNorm2d\).*GroupNorm"),
        (lambda: beside(nn.BatchNorm3d(2, affine=False)), r"1 \(BatchNorm3d\).*GroupNorm"),
        (lambda: beside(nn.BatchNorm1d(2, affine=False, track_running_stats=False)), r"BatchNorm1d"),
        (lambda: beside(nn.SyncBatchNorm(2)), r"SyncBatchNorm"),
        (lambda: beside(nn.InstanceNorm2d(2, track_running_stats=True)), r"1 \(InstanceNorm2d\).*GroupNorm"),
        (lambda: beside(nn.LSTM(2, 2)), r"1 \(LSTM\).*fedtrain/tasks/text.py"),
        (lambda: beside(nn.GRUCell(2, 2)), r"1 \(GRUCell\).*fedtrain/tasks/text.py"),
        (lambda: nn.TransformerEncoderLayer(2, 1), r"self_attn \(MultiheadAttention\).*fedtrain/tasks/text.py"),
        (lambda: nn.Sequential(nn.EmbeddingBag(2, 2)), r"0 \(EmbeddingBag\).*nn.Embedding"),
        (lambda: nn.Sequential(nn.Embedding(2, 2, max_norm=1.0)), r"0 \(Embedding\).*max_norm"),
        (with_buffer, r"buffer scale.*persistent=False"),
        (lambda: nn.Linear(2, 1).half(), r"parameter weight: got torch.float16"),
        (lambda: nn.Linear(2, 1).requires_grad_(False), "no parameter to train"),
    ],
)
def test_models_are_refused_by_name(build, words):
    with pytest.raises(TaskError, match=words):
        private(build())


class Doubled(nn.Module):
    """An example's output grows with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * len(x)


class Mixed(nn.Module):
    """Each example is added to those after it, or before."""

    def __init__(self, layer: nn.Module, backwards: bool = False) -> None:
        super().__init__()
        self.layer, self.backwards = layer, backwards

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out.flip(0).cumsum(0).flip(0) if self.backwards else out.cumsum(0)


MIXING = {
    "centred": (lambda: Centred(nn.Linear(2, 1)), output, "depends on the others"),
    "centred loss": (lambda: nn.Linear(2, 1), lambda out, _: out[:, 0] - out.mean(), "depends on the others"),
    "mean": (lambda: nn.Linear(2, 1), lambda out, _: out[:, 0] / len(out), "depends on the others"),
    "number": (Doubled, output, "depends on the others"),
    "mean behind dropout": (
        lambda: nn.Sequential(nn.Linear(2, 9), nn.Dropout(), nn.Linear(9, 1)),
        lambda out, _: out[:, 0] / len(out),
        "depends on the others",
    ),
    "those before": (lambda: Mixed(nn.Linear(2, 1)), output, "depends on the others"),
    "those after": (lambda: Mixed(nn.Linear(2, 1), backwards=True), output, "depends on the others"),
    "behind noise": (lambda: nn.Sequential(Noisy(), Mixed(nn.Linear(2, 1))), output, "depends on the others"),
    "targets": (lambda: nn.Linear(2, 1), lambda out, t: out[:, 0] * (t - t.mean()), "depends on the others"),
    "buffer": (Counting, output, "buffer seen"),
    "one loss": (lambda: nn.Linear(2, 1), lambda out, _: out.mean(), "one number per example"),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("examples", [torch.randn(4, 2), torch.ones(4, 2), torch.ones(1, 2)])
def test_what_mixes_or_keeps_examples_is_refused_before_the_first_step(name, examples):
    build, loss, words = MIXING[name]
    targets = torch.zeros(len(examples))
    with pytest.raises(TaskError, match=words):
        next(private(build(), loss).steps(examples, targets, Spend(1, 0.5, 1), NoiseSource()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_the_trial_sees_nothing_of_the_examples(dtype):
    seen = []

    class Spying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return self.fc(x.float())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets.clone())
        return outputs[:, 0] * (1.0 + targets)

    trials = []
    for inputs in (torch.zeros(2, 3), torch.full((20, 3), 9.0)):
        seen.clear()
        first = private(Spying(), loss).steps(inputs.to(dtype), inputs[:, 0].to(dtype), Spend(0, 1, 1), NoiseSource())
        next(first)
        trials.append(seen[:-2])  # without the step itself
    assert len(trials[0]) == len(trials[1]) > 0
    for one, other in zip(*trials):
        assert one.dtype == dtype
        assert torch.equal(one, other)


def test_tokens_of_the_trial_have_a_row_in_every_embedding():
    class Typed(nn.Module):
        """Of its embeddings one has a single row, and takes no tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.token, self.position, self.kind = nn.Embedding(50, 4), nn.Embedding(3, 4), nn.Embedding(1, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.token(tokens) + self.position(tokens % 3) + self.kind(torch.zeros_like(tokens))

    tokens, charge = torch.tensor([[40, 1], [2, 30]]), Spend(0, 1, 1)
    assert next(private(Typed()).steps(tokens, tokens, charge, NoiseSource()))[0][40].any()
    centred = private(Typed(), lambda out, _: output(out, _) - output(out, _).mean())
    with pytest.raises(TaskError, match="depends on the others"):  # so they are not all the same
        next(centred.steps(tokens, tokens, charge, NoiseSource()))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda out, _: (out[:, 0] - 1e9).log(), "got a loss of nan"),
        (lambda out, t: out[:, 0] + torch.tensor([0.0])[(t * 1e9).long()], "got IndexError"),
    ],
)
def test_a_model_that_cannot_be_tried_is_refused_with_the_reason(loss, words):
    with pytest.raises(TaskError, match=rf"cannot try.*{words}.*from 0 to 1"):
        next(private(nn.Linear(2, 1), loss).steps(torch.ones(3, 2), torch.ones(3), Spend(1, 0.5, 1), NoiseSource()))


class Noisy(nn.Module):
    """Dropout by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


def test_other_randomness_than_dropout_is_no_reason_to_refuse():
    model = nn.Sequential(nn.Linear(2, 3), Noisy(), nn.Linear(3, 1))
    for mode in MODES:
        next(private(model, mode=mode).steps(torch.ones(4, 2), torch.zeros(4), Spend(0, 1, 1), NoiseSource()))


def test_dropout_is_no_reason_to_refuse_and_its_stream_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 50), nn.Dropout(), nn.Linear(50, 1)).train()
    data = torch.randn(4, 2), torch.zeros(4)
    for mode in MODES:
        gradients = private(model, mode=mode)
        torch.manual_seed(1)
        first = next(gradients.steps(*data, Spend(0, 1, 1), NoiseSource()))
        torch.manual_seed(1)
        again = next(gradients.steps(*data, Spend(0, 1, 1), NoiseSource()))  # without the trial of the first time
        torch.testing.assert_close(first, again)


def test_a_buffer_of_constants_that_is_not_saved_is_allowed():
    model = nn.Linear(2, 1)
    model.register_buffer("scale", torch.ones(1), persistent=False)
    assert private(model).mode == "fast"


def test_numbers_that_cannot_work_are_refused():
    with pytest.raises(InputError, match=r"max_grad_norm.*1e-06"):
        private(linear(1), max_grad_norm=1e-7)
    with pytest.raises(RunError, match="nothing to sample"):
        steps(private(linear(1)), torch.ones(3, 1), 1, 0, 1)
    with pytest.raises(TaskError, match="not the model's own"):
        PrivateGradients(linear(1), output, [nn.Parameter(torch.ones(1))], SamplePrivacy(epsilon=1, delta=0.1))
