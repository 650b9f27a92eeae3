"""Sums of clipped gradients, in every mode, beside a loop over the examples."""

from __future__ import annotations

import copy
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtrain.data.base import DataSpec
from fedtrain.errors import InputError, MissingExtraError, TaskError
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import TaskSection
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.rng import NoiseSource
from fedtrain.privacy.sample import PrivateGradients
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks import TASKS, make_task

pytest.importorskip("opacus")

MODES = ("fast", "hooks", "ghost", "functorch")
SMALL = {
    "logistic": (DataSpec((13,), "class", 2), {}),
    "mlp": (DataSpec((1, 8, 8), "class", 5), {"hidden": [7, 6]}),
    "cnn": (DataSpec((1, 8, 8), "class", 4), {}),
    "simple-cnn": (DataSpec((1, 16, 16), "class", 4), {}),
    "resnet18-gn": (DataSpec((3, 8, 8), "class", 3), {}),
    "char-lstm": (DataSpec((6,), "tokens", 11), {"hidden": 5, "embedding": 3}),
    "transformer": (DataSpec((6,), "tokens", 11), {"width": 8}),
    "regressor": (DataSpec((4,), "number"), {"hidden": [5]}),
}


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1) - targets[:, None]).square().sum(1)


@lru_cache(maxsize=1)
def small(name: str):
    """A built-in task of small size: its model, loss and a few examples."""
    spec, options = SMALL[name]
    with global_torch_seed(1):
        task = make_task(TaskSection(name=name, options=options), spec, Path())
        model, size = task.model().train(), 2 if name == "resnet18-gn" else 3
        inputs = torch.randn(size, *spec.input_shape)
        if spec.target == "tokens":
            inputs, targets = torch.randint(spec.num_classes, (2, size, *spec.input_shape))
        else:
            targets = torch.randn(size) if spec.target == "number" else torch.randint(spec.num_classes, (size,))
    return model, task.loss, inputs, targets


def plain(model: nn.Module, loss, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """The gradient of the sum of losses."""
    return list(torch.autograd.grad(loss(model(inputs), targets).sum(), trained(model), materialize_grads=True))


def looped(model: nn.Module, loss, inputs: Tensor, targets: Tensor, bound=1.0, per_layer=False) -> list[Tensor]:
    """The mean of clipped gradients, one example at a time."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = [name.rpartition(".")[0] if per_layer else "" for name in names]
    most = bound / len(set(layers)) ** 0.5
    total = [torch.zeros_like(p) for p in trained(model)]
    for x, y in zip(inputs, targets):
        one = plain(model, loss, x[None], y[None])
        for layer in set(layers):
            mine = [k for k, name in enumerate(layers) if name == layer]
            norm = float(torch.cat([one[k].double().flatten() for k in mine]).norm())
            for k in mine:
                total[k] += one[k] * most / max(norm, most)
    return [t / len(inputs) for t in total]


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def private(model: nn.Module, loss=squared_error, **options) -> PrivateGradients:
    section = SamplePrivacy(**{"noise_multiplier": 1.0, "delta": 1e-5, **options})
    return PrivateGradients(model, loss, trained(model), section)


def noiseless(gradients: PrivateGradients, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """The mean of the clipped gradients of all examples."""
    (found,) = gradients.steps(inputs, targets, Spend(0, 1, 1), NoiseSource())
    return found


def median_norm(model: nn.Module, loss, inputs: Tensor, targets: Tensor) -> float:
    """A bound that clips some examples and leaves others."""
    norms = [
        torch.cat([g.flatten() for g in plain(model, loss, x[None], y[None])]).norm() for x, y in zip(inputs, targets)
    ]
    return float(torch.stack(norms).median())


def assert_equal(found: list[Tensor], expected: list[Tensor], relative: float = 1e-5) -> None:
    scale = float(torch.cat([g.flatten() for g in expected]).norm())
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        assert float((got - want).norm()) <= relative * scale


def test_small_instances_cover_every_built_in_task():
    assert SMALL.keys() == TASKS.keys()


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("name", SMALL)
def test_every_mode_equals_a_loop_over_examples(name, clipping):
    model, loss, inputs, targets = small(name)
    bound = median_norm(model, loss, inputs, targets)
    expected = looped(model, loss, inputs, targets, bound, clipping == "per-layer")
    assert float(torch.cat([g.flatten() for g in expected]).norm()) > 0
    for mode in MODES:
        if mode == "ghost" and (clipping == "per-layer" or name == "char-lstm"):
            continue  # refused, below
        if name == "resnet18-gn" and clipping == "per-layer" and mode != "fast":
            continue  # takes seconds
        gradients = private(model, loss, mode=mode, clipping=clipping, max_grad_norm=bound)
        assert gradients.mode == mode
        assert_equal(noiseless(gradients, inputs, targets), expected)


@pytest.mark.parametrize("name", SMALL)
def test_auto_is_fast_for_every_built_in_task(name):
    model, loss, _, _ = small(name)
    assert private(model, loss).mode == "fast"


@pytest.mark.parametrize("mode", MODES)
def test_channels_last_images(mode):
    model, loss, inputs, targets = small("cnn")
    expected = looped(model, loss, inputs, targets)
    laid_out = copy.deepcopy(model).to(memory_format=torch.channels_last)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    assert_equal(noiseless(private(laid_out, loss, mode=mode), inputs, targets), expected)


@pytest.mark.parametrize("mode", MODES)
def test_huge_bound_gives_the_plain_mean_gradient(mode):
    model, loss, inputs, targets = small("mlp")
    mean = [g / len(inputs) for g in plain(model, loss, inputs, targets)]
    assert_equal(noiseless(private(model, loss, mode=mode, max_grad_norm=1e9), inputs, targets), mean, 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_two_examples_by_hand(mode):
    # y = w x, loss (y - t)^2: gradient 2 (w x - t) x. With w = 1: 2 (1 - 0) 1 = 2 -> 1; 2 (0.5 - 0) 0.5 = 0.5 stays.
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    found = noiseless(private(model, mode=mode), torch.tensor([[1.0], [0.5]]), torch.zeros(2))
    assert found[0].item() == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize("mode", ["fast", "hooks", "functorch"])
def test_per_layer_by_hand(mode):
    # y = v w x with w = 1, v = 2, x = t + 1 = 1: dy = 2, so w has 2 v x = 4 and v has 2 w x = 2; each bound 1 / sqrt 2.
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    nn.init.constant_(model[1].weight, 2.0)
    data = torch.ones(1, 1), torch.ones(1)
    found = noiseless(private(model, mode=mode, clipping="per-layer"), *data)
    assert [g.item() for g in found] == pytest.approx([0.5**0.5, 0.5**0.5])
    found = noiseless(private(model, mode=mode), *data)
    assert [g.item() for g in found] == pytest.approx([4 / 20**0.5, 2 / 20**0.5])


class Scaled(nn.Module):
    """Parameters of its own, one without dimensions, around a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class Adapted(nn.Module):
    """A frozen linear layer beside two small ones, as LoRA has them."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class Repeated(nn.Module):
    """One layer called three times, once with its input by name."""

    def __init__(self, layer: nn.Module, by_name: bool = False) -> None:
        super().__init__()
        self.layer, self.by_name = layer, by_name

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x).tanh()).tanh()
        return self.layer(input=x) if self.by_name else self.layer(x)


class Tied(nn.Module):
    """The embedding is the output layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.fc = nn.Linear(3, 5, bias=False)
        self.fc.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.embedding(tokens).mean(1))


class Borrowed(nn.Module):
    """The embedding's weight is used behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embedding(tokens).mean(1), self.embedding.weight)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.spare, self.idle = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        return self.fc(x)


class ChangedInput(nn.Module):
    """The input of a layer is overwritten once it has been used."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        x += 1
        return y


def hooked() -> nn.Module:
    """A hook of the model's own doubles the output."""
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


TOKENS = torch.tensor([[1, 1, 0, 2], [2, 0, 0, 0], [4, 3, 2, 1]])
FEATURES = torch.linspace(-1, 2, 9).reshape(3, 3)
IMAGES = torch.linspace(0, 90, 3 * 4 * 6 * 5).sin().reshape(3, 4, 6, 5)
NOT_GHOST, NOT_FAST = ("fast", "hooks", "functorch"), ("hooks", "ghost", "functorch")
MODELS = {
    "one embedding": (lambda: nn.Embedding(5, 3), TOKENS, MODES),
    "one token per example": (lambda: nn.Embedding(5, 3), TOKENS[:, 0], MODES),
    "padded tokens": (lambda: nn.Embedding(5, 3, padding_idx=0), TOKENS, ("fast", "functorch")),
    "tied weights": (Tied, TOKENS, ("hooks", "functorch")),
    "0-d parameter": (Scaled, FEATURES, NOT_FAST),
    "adapters": (Adapted, FEATURES, MODES),
    "unused layers": (Unused, FEATURES, MODES),
    "own hook": (hooked, FEATURES, ("fast", "hooks", "ghost")),
    "first layer in place": (lambda: nn.Sequential(nn.ReLU(True), nn.Linear(3, 2)), FEATURES + 1, MODES),
    "bias alone": (lambda: frozen(nn.Linear(3, 2), "weight"), FEATURES, MODES),
    "four dimensions": (lambda: nn.Linear(5, 2), IMAGES, NOT_GHOST),
    "few positions": (lambda: nn.Linear(20, 30), IMAGES.reshape(3, 6, 20), MODES),
    "many positions": (lambda: nn.Linear(3, 2), IMAGES.reshape(3, 40, 3), MODES),
    "repeated linear": (lambda: Repeated(nn.Linear(3, 3)), FEATURES, NOT_GHOST),
    "by name": (lambda: Repeated(nn.Linear(3, 3), by_name=True), FEATURES, ("fast",)),
    "ReLU in place": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(True), nn.Linear(4, 1)), FEATURES, ("fast",)),
    "convolution": (lambda: nn.Conv2d(4, 3, (2, 3), (2, 1), (1, 0), (1, 2)), IMAGES, MODES),
    "convolution to few pixels": (lambda: nn.Conv2d(4, 8, (5, 4), padding=(0, 1)), IMAGES, MODES),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), IMAGES, MODES),
    "convolution's bias": (lambda: frozen(nn.Conv2d(4, 2, 3), "weight"), IMAGES, ("fast",)),
    "repeated convolution": (lambda: Repeated(nn.Conv2d(4, 4, 3, padding=1)), IMAGES, NOT_GHOST),
    "circular padding": (lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), IMAGES, ("functorch",)),
    "uneven padding": (lambda: nn.Conv2d(4, 2, 3, padding="same"), IMAGES, NOT_FAST),
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGES, MODES),
    "group norm of features": (lambda: nn.GroupNorm(1, 3), FEATURES, MODES),
    "repeated group norm": (lambda: Repeated(nn.GroupNorm(2, 4)), IMAGES, NOT_GHOST),
    "repeated layer norm": (lambda: Repeated(nn.LayerNorm([6, 5])), IMAGES, NOT_GHOST),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), IMAGES, ("fast", "functorch")),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGES, NOT_FAST),
}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, (_, _, modes) in MODELS.items() for mode in modes])
def test_kinds_of_layers(name, mode):
    build, inputs, _ = MODELS[name]
    with global_torch_seed(5):
        model = build()
    data = inputs, torch.tensor([0.5, 1.0, -2.0])
    bound = median_norm(model, squared_error, *data)
    gradients = private(model, mode=mode, max_grad_norm=bound)
    assert gradients.mode == mode
    assert_equal(noiseless(gradients, *data), looped(model, squared_error, *data, bound))


REFUSED = {
    "ghost: char-lstm": (lambda: small("char-lstm")[0], small("char-lstm")[2], "ghost", "lstm1.recurrent"),
    "ghost: tied": (Tied, TOKENS, "ghost", r"embedding \(Embedding\), which shares"),
    "ghost: dimensions": (lambda: nn.Linear(5, 2), IMAGES, "ghost", "three dimensions"),
    "hooks: padding": (lambda: nn.Embedding(5, 3, padding_idx=0), TOKENS, "hooks", "padding_idx"),
    "hooks: layer norm": (lambda: nn.Sequential(nn.LayerNorm(5, bias=False)), IMAGES, "hooks", r"0 \(LayerNorm\)"),
    "hooks: circular": (lambda: nn.Conv2d(4, 2, 3, padding_mode="circular"), IMAGES, "hooks", "pads with circular"),
    "fast: borrowed": (Borrowed, TOKENS, "fast", r"embedding \(Embedding\)"),
    "hooks: borrowed": (Borrowed, TOKENS, "hooks", r"embedding \(Embedding\)"),
    "fast: input in place": (ChangedInput, FEATURES, "fast", r"fc \(Linear\) is changed in place"),
    "hooks: input in place": (ChangedInput, FEATURES, "hooks", r"fc \(Linear\) is changed in place"),
    "positions first": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(5, 1), nn.Unflatten(0, (-1, 6))),
        IMAGES[:, 0],
        "fast",
        r"apart in 1 \(Linear\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_mode_gets_wrong_is_refused_by_name(name):
    build, inputs, mode, words = REFUSED[name]
    with pytest.raises(TaskError, match=words):
        noiseless(private(build(), lambda outputs, _: outputs.flatten(1).square().sum(1), mode=mode), inputs, inputs)


def test_a_formula_with_too_small_a_norm_is_refused(monkeypatch):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    formulas = GradSampleModuleFastGradientClipping.NORM_SAMPLERS
    right = formulas[nn.Linear]
    halved = lambda *layer: {p: norms / 2 for p, norms in right(*layer).items()}  # noqa: E731
    monkeypatch.setitem(formulas, nn.Linear, halved)
    with pytest.raises(TaskError, match="not autograd's"):
        noiseless(private(nn.Linear(3, 1), mode="ghost"), FEATURES, torch.ones(3))


def test_ghost_cannot_clip_per_layer():
    with pytest.raises(InputError, match="per layer"):
        private(nn.Linear(1, 1), mode="ghost", clipping="per-layer")


@pytest.mark.parametrize("mode", ["auto", "fast"])
def test_layers_that_fast_does_not_cover_are_left_to_hooks(mode):
    assert private(nn.Conv1d(1, 1, 1), mode=mode).mode == "hooks"
    assert private(Tied(), mode=mode).mode == "hooks"


def test_missing_opacus_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    assert private(nn.Linear(1, 1)).mode == "fast"
    with pytest.raises(MissingExtraError, match=r"fedtrain\[privacy\]"):
        private(nn.Linear(1, 1), mode="hooks")


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_left_as_it_was(mode):
    model, loss, inputs, targets = small("transformer")
    names = [name for name, _ in model.named_parameters()]
    attributes = [set(vars(part)) for part in [*model.modules(), *model.parameters()]]
    steps = private(model, loss, mode=mode).steps(inputs, targets, Spend(0, 1, 2), NoiseSource())
    next(steps)  # the second is still to come
    assert [name for name, _ in model.named_parameters()] == names
    assert [set(vars(part)) for part in [*model.modules(), *model.parameters()]] == attributes
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, kind) for module in model.modules() for kind in hooks)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_tiny_gradient_of_a_huge_input_is_clipped(mode):
    # Squared on its own, the output's gradient of 1e-25 is 0 in float32; times the input it is 1e-6 per entry.
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    inputs = torch.full((1, 4), 1e19)
    found = noiseless(private(model, lambda out, _: out[:, 0] * 1e-23, mode=mode, max_grad_norm=1e-6), inputs, inputs)
    assert float(found[0].norm()) == pytest.approx(1e-6, rel=1e-5)


@pytest.mark.parametrize("mode", ["fast", "hooks"])
def test_the_norm_of_millions_of_numbers_is_right(mode):
    # A million entries of 1e-3 each: a norm of 1, to be halved.
    model = nn.Linear(1000, 1000, bias=False)
    inputs = torch.ones(1, 1, 1000).expand(1, 24, 1000) / 24
    loss = lambda outputs, _: outputs.sum((1, 2)) * 1e-3  # noqa: E731
    found = noiseless(private(model, loss, mode=mode, max_grad_norm=0.5), inputs, inputs)
    torch.testing.assert_close(found[0], torch.full((1000, 1000), 5e-4), rtol=2e-6, atol=0)
