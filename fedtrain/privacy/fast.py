"""Clipped gradients by book-keeping: one backward pass, and per example nothing larger than it must be.

References:
    Bu, Wang, Zha, Karypis, "Differentially Private Optimization on Large Foundation Models", ICML 2023, algorithm 1
    (one backward pass; the sum of clipped gradients from what it leaves).
    Goodfellow, "Efficient Per-Example Gradient Computations", 2015 (the norm from inputs and output gradients).
    Bu, Mao, Xu, "Scalable and Efficient Training of Large Convolutional Neural Networks with Differential Privacy",
    NeurIPS 2022, section 3.3 (for each layer the cheaper of two norms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from fedtrain.privacy.clipping import (
    LARGEST_NORM,
    ExampleGradients,
    Layer,
    Subject,
    by_copy,
    squared_norms,
    weighted_sum,
)
from fedtrain.privacy.watching import output_gradients, watched

__all__ = ["FastEngine", "covers"]


class _Part(NamedTuple):
    """What one layer gives."""

    squares: Tensor  # (B,), float64
    weighted: Callable[[Tensor], dict[str, Tensor]]  # factors (B,), float64 -> parameter's name in the module -> sum


def covers(layer: Layer) -> bool:
    """Whether book-keeping knows this layer."""
    module = layer.module
    if layer.shared or type(module) not in _KINDS or not layer.own.keys() <= {"weight", "bias"}:
        return False
    # Other paddings are copies of the input, and "same" may be uneven.
    return not isinstance(module, nn.Conv2d) or (module.padding_mode == "zeros" and not isinstance(module.padding, str))


class FastEngine:
    """Compute what clipping needs of a model whose trained parameters all belong to layers that are covered."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __call__(self, inputs: Tensor, targets: Tensor, copies: int = 1) -> ExampleGradients:
        layers = self._subject.layers
        with watched([(layer.name, layer.module) for layer in layers], len(inputs)) as calls:
            losses = self._subject.loss(self._subject.model(inputs), targets) / copies
        gradients = output_gradients(losses, calls)
        parts: list[tuple[Layer, _Part] | None] = []
        for layer, made, passed in zip(layers, calls, gradients):
            used = by_copy([(call.input, g) for call, g in zip(made, passed) if g is not None], copies)
            parts.append((layer, _KINDS[type(layer.module)](layer, *map(list, zip(*used)))) if used else None)
        nothing = torch.zeros(len(inputs) // copies, dtype=torch.float64, device=losses.device)
        squares = torch.stack([part[1].squares if part else nothing for part in parts])

        def weighted(factors: Tensor) -> list[Tensor]:
            sums: dict[int, Tensor] = {}
            for part, of_layer in zip(parts, factors):
                if part:
                    layer, (_, weigh) = part
                    sums |= {layer.own[name]: total for name, total in weigh(of_layer).items()}
            return [sums[i] if i in sums else torch.zeros_like(p) for i, p in enumerate(self._subject.trained)]

        return ExampleGradients(squares, weighted)


def _linear(layer: Layer, inputs: list[Tensor], gradients: list[Tensor]) -> _Part:
    """Of y = W x + b: the weight's gradient is the sum over positions of g x^T, the bias's that of g."""
    x, g = _sequence(inputs), _sequence(gradients)
    positions, biased = x.shape[1], "bias" in layer.own
    if "weight" not in layer.own:
        return _instantiated(layer, {"bias": g.sum(1)})
    if positions == 1:
        return _one_position(x[:, 0], g[:, 0], biased)
    if 2 * positions**2 >= x.shape[2] * g.shape[2]:
        return _instantiated(layer, {"weight": g.mT @ x} | ({"bias": g.sum(1)} if biased else {}))
    return _few_positions(layer, lambda: (x.double(), g.double()), biased)


def _conv2d(layer: Layer, inputs: list[Tensor], gradients: list[Tensor]) -> _Part:
    """As a linear layer of patches: where there are few of them, else as it is."""
    module: Any = layer.module
    positions = gradients[0][0, 0].numel()
    few = 2 * positions**2 < module.weight.numel() and len(inputs) == module.groups == 1
    if few and "weight" in layer.own:
        return _few_positions(layer, lambda: _patches(module, inputs[0], gradients[0]), "bias" in layer.own)
    found: dict[str, Any] = {}
    if "weight" in layer.own:
        found["weight"] = sum(_conv2d_weights(module, x, g) for x, g in zip(inputs, gradients))
    if "bias" in layer.own:
        found["bias"] = sum(g.sum((2, 3)) for g in gradients)
    return _instantiated(layer, found)


def _patches(module: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.double().mT, g.flatten(2).double().mT


def _conv2d_weights(module: Any, x: Tensor, g: Tensor) -> Tensor:
    """Each example's gradient of the weight `(B, *weight.shape)`: examples are groups of one large convolution."""
    size, shape = len(x), module.weight.shape
    found: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        x.reshape(1, -1, *x.shape[2:]),
        (size * shape[0], *shape[1:]),
        g.reshape(1, -1, *g.shape[2:]),
        module.stride,
        module.padding,
        module.dilation,
        size * module.groups,
    )
    return found.view(size, *shape)


def _embedding(layer: Layer, inputs: list[Tensor], gradients: list[Tensor]) -> _Part:
    module: Any = layer.module
    tokens, g = torch.cat([t.reshape(len(t), -1) for t in inputs], 1), _sequence(gradients)
    if module.padding_idx is not None:
        g = g.masked_fill((tokens == module.padding_idx)[:, :, None], 0)
    # Positions with the same token in the same example add up before they are squared, and weighted.
    examples = torch.arange(len(tokens), device=tokens.device)
    pairs, place = torch.unique(tokens + module.num_embeddings * examples[:, None], return_inverse=True)
    rows = g.new_zeros(len(pairs), g.shape[2]).index_add_(0, place.flatten(), g.flatten(0, 1))
    owners = pairs // module.num_embeddings
    squares = torch.zeros(len(tokens), dtype=torch.float64, device=g.device)
    squares.index_add_(0, owners, squared_norms(rows))

    def weighted(factors: Tensor) -> dict[str, Tensor]:
        scaled = rows * factors.to(rows.dtype)[owners, None]
        return {"weight": torch.zeros_like(module.weight).index_add_(0, pairs % module.num_embeddings, scaled)}

    return _Part(squares, weighted)


def _layer_norm(layer: Layer, inputs: list[Tensor], gradients: list[Tensor]) -> _Part:
    module: Any = layer.module
    shape = module.normalized_shape
    x, g = (torch.cat([t.reshape(len(t), -1, *shape) for t in tensors], 1) for tensors in (inputs, gradients))
    normalized = F.layer_norm(x, shape, eps=module.eps)
    return _affine(layer, (g * normalized).sum(1), g.sum(1))


def _group_norm(layer: Layer, inputs: list[Tensor], gradients: list[Tensor]) -> _Part:
    module: Any = layer.module
    normalized = [F.group_norm(x, module.num_groups, eps=module.eps) for x in inputs]
    channels = [g.reshape(*g.shape[:2], -1) for g in gradients]
    weights = sum((g * n.reshape(g.shape)).sum(2) for g, n in zip(channels, normalized))
    return _affine(layer, weights, sum(g.sum(2) for g in channels))


def _affine(layer: Layer, weights: Any, biases: Any) -> _Part:
    found = {"weight": weights, "bias": biases}
    return _instantiated(layer, {name: found[name] for name in layer.own})


def _instantiated(layer: Layer, gradients: dict[str, Any]) -> _Part:
    """From each example's gradients `(B, *shape)`, as they are."""
    flat: dict[str, Tensor] = {name: g.flatten(1) for name, g in gradients.items()}

    def weighted(factors: Tensor) -> dict[str, Tensor]:
        return {name: weighted_sum(g, factors).view(getattr(layer.module, name).shape) for name, g in flat.items()}

    return _Part(torch.stack([squared_norms(g) for g in flat.values()]).sum(0), weighted)


def _one_position(x: Tensor, g: Tensor, biased: bool) -> _Part:
    """From inputs `(B, d)` and output gradients `(B, p)`: the norm of g x^T is the product of theirs."""
    along, across = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float64).square() for t in (x, g))
    along = along.masked_fill(along > LARGEST_NORM**2, torch.inf)  # times what a tiny gradient's rounding leaves
    # A GPU may have been told to round float32 to TF32, with 11 of 24 bits, before it multiplies matrices.
    dtype = torch.float64 if x.is_cuda else x.dtype

    def weighted(factors: Tensor) -> dict[str, Tensor]:
        scaled = g.to(dtype) * factors.to(dtype)[:, None]
        sums = {"weight": scaled.mT @ x.to(dtype)} | ({"bias": scaled.sum(0)} if biased else {})
        return {name: total.to(x.dtype) for name, total in sums.items()}

    return _Part((along + float(biased)) * across, weighted)


def _few_positions(layer: Layer, sequences: Callable[[], tuple[Tensor, Tensor]], biased: bool) -> _Part:
    """From inputs `(B, T, d)` and output gradients `(B, T, p)`, without the sums over positions of each example.

    In float64: where an example's positions almost cancel, its norm is tiny and its factor large, and what float32's
    rounding leaves of its positions in the sum could be many times the bound. What float64's leaves of them, in the
    square here and in the sum, is less than what is added to the square.

    Args:
        layer: its weight is `(p, ...)`, d numbers in each row.
        sequences: makes both in float64, large as they are: once for the norms, once more for the sum.
        biased: count the bias's gradient too, as if each input had one more entry, which is 1.
    """
    x, g = sequences()
    alike, across = x @ x.mT + float(biased), g @ g.mT
    lengths = (torch.diagonal(alike, 0, 1, 2) * torch.diagonal(across, 0, 1, 2)).sqrt().sum(1)
    rounding = sum(x.shape[1:], g.shape[2]) * torch.finfo(x.dtype).eps

    def weighted(factors: Tensor) -> dict[str, Tensor]:
        parameter: Any = layer.module.weight
        x, g = sequences()
        scaled = (g * factors[:, None, None]).flatten(0, 1)
        sums = {"weight": (scaled.mT @ x.flatten(0, 1)).view(parameter.shape)}
        sums |= {"bias": scaled.sum(0)} if biased else {}
        return {name: total.to(parameter.dtype) for name, total in sums.items()}

    return _Part((alike * across).sum((1, 2)).clamp(min=0) + rounding * lengths.square(), weighted)


def _sequence(tensors: Sequence[Tensor]) -> Tensor:
    """All calls of a layer as one sequence of positions: `(B, T, width)`."""
    rows = [t.reshape(len(t), -1, t.shape[-1]) for t in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


_KINDS: dict[type[nn.Module], Callable[[Layer, list[Tensor], list[Tensor]], _Part]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
