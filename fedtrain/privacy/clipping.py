"""What DP-SGD clips: the layers of a model, and the factor by which each example's gradient shrinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedtrain.errors import TaskError

__all__ = [
    "LARGEST_NORM",
    "Clip",
    "Engine",
    "ExampleGradients",
    "Layer",
    "Subject",
    "by_copy",
    "clipped_sum",
    "layers_of",
    "squared_norms",
    "weighted_sum",
]

LARGEST_NORM = 1e30
"""A larger one counts as not finite: the factor that it needs would be too small for float32 to be exact."""
_BLOCK = 4096  # numbers


@dataclass(frozen=True)
class Layer:
    """A module with the trained parameters that it owns directly.

    Attributes:
        name: its path in the model, and its type.
        module: the module itself.
        own: name in the module -> place among all trained parameters.
        shared: whether another module, or another attribute, holds one of the parameters too.
    """

    name: str
    module: nn.Module
    own: dict[str, int]
    shared: bool


@dataclass(frozen=True)
class Subject:
    """What is differentiated.

    Attributes:
        model: in training mode.
        loss: (outputs, targets) -> `(B,)`, each example's by itself.
        trained: leaf parameters, in the order of gradients.
        layers: whose parameters these are.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    trained: list[Tensor]
    layers: list[Layer]


class ExampleGradients(NamedTuple):
    """The gradients of B examples, by what clipping needs of them."""

    squares: Tensor  # (layers, B), float64: squared L2 norms
    weighted: Callable[[Tensor], list[Tensor]]
    """Factors (layers, B), float64 -> the sum of the gradients times these, one tensor per trained parameter."""


class Engine(Protocol):
    """A way to compute the gradients of single examples."""

    def __call__(self, inputs: Tensor, targets: Tensor, copies: int = 1) -> ExampleGradients:
        """Run the model forward and backward on one or more examples; leave no trace in it.

        Args:
            inputs: `(copies * B, ...)`: all examples, then the next copy of each, and so on.
            targets: `(copies * B, ...)`.
            copies: of each example; its gradient is the mean over them.
        """


@dataclass(frozen=True)
class Clip:
    """Bound each example's gradient.

    Attributes:
        max_grad_norm: the most that a whole gradient may measure.
        per_layer: give each of L layers its own bound, max_grad_norm / sqrt(L).

    References:
        Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1.
        McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018 (per-layer clipping).
    """

    max_grad_norm: float
    per_layer: bool = False

    def factors(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Find what to multiply each layer's part of each gradient by.

        Args:
            squares: (layers, B), squared norms.

        Returns:
            (layers, B), from 0 to 1; and bool (B,), whether the gradient is finite: factors of others mean nothing.
        """
        bound = self.max_grad_norm / math.sqrt(len(squares)) if self.per_layer else self.max_grad_norm
        norms = (squares if self.per_layer else squares.sum(0, keepdim=True)).sqrt()
        return (bound / norms.clamp(min=bound)).expand_as(squares), (norms <= LARGEST_NORM).all(0)


def clipped_sum(engine: Engine, inputs: Tensor, targets: Tensor, clip: Clip, copies: int = 1) -> list[Tensor] | None:
    """Add up the clipped gradients of examples; those that are not finite count as zero.

    Args:
        engine: for the model.
        inputs: `(copies * B, ...)`, as the engine takes them.
        targets: `(copies * B, ...)`.
        clip: the bound.
        copies: of each example; the bound is on the mean of their gradients (De et al. 2022).

    Returns:
        One tensor per trained parameter; None if no example has a finite gradient.

    References:
        De, Berrada, Hayes, Smith, Balle, "Unlocking High-Accuracy Differentially Private Image Classification through
        Scale", 2022, section 3.2 (augmentation multiplicity).
    """
    gradients = engine(inputs, targets, copies)
    factors, finite = clip.factors(gradients.squares)
    if finite.all():
        return gradients.weighted(factors)
    if not finite.any():
        return None
    # Zero times infinity is no number: the examples must be left out, not weighted by 0.
    kept = finite.repeat(copies)
    return clipped_sum(engine, inputs[kept], targets[kept], clip, copies)


def by_copy(used: Sequence[tuple[Tensor, Tensor]], copies: int) -> list[tuple[Tensor, Tensor]]:
    """Take the copies of examples apart: to an example's gradient they are as many calls of a layer.

    Args:
        used: of each call of a layer, its input and its output's gradient, both `(copies * B, ...)`.
        copies: of each example.
    """
    return [pair for x, g in used for pair in zip(x.chunk(copies), g.chunk(copies))]


def weighted_sum(rows: Tensor, factors: Tensor) -> Tensor:
    """Add up `(B, n)` rows times `(B,)` factors: a vector's product, which no device rounds to TF32, as a matrix's."""
    return rows.mT.mv(factors.to(rows.dtype))


def layers_of(model: nn.Module, trained: Sequence[Tensor]) -> list[Layer]:
    """Find the modules that own trained parameters, in the model's order; a shared parameter belongs to the first."""
    places = {id(parameter): place for place, parameter in enumerate(trained)}
    owners: dict[int, int] = {}  # by parameter: how many modules hold it
    layers = []
    for path, module in model.named_modules():
        held = {name: places[id(p)] for name, p in module._parameters.items() if id(p) in places}
        own = {name: place for name, place in held.items() if place not in owners}
        for place in held.values():
            owners[place] = owners.get(place, 0) + 1
        if own:
            layers.append((f"{path or 'the model'} ({type(module).__name__})", module, own))
    if len(owners) != len(trained):
        raise TaskError(
            "some trained parameters are not the model's own",
            got=f"{len(trained)} trained, {len(owners)} of them in the model",
        )
    return [Layer(*found, shared=any(owners[place] > 1 for place in found[2].values())) for found in layers]


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norm of each row `(B, ...)`, in float64.

    In float32, torch's norm of a million numbers is 1e-5 too small. So it sums blocks, and float64 adds these up.
    """
    flat = rows.reshape(len(rows), -1)
    whole = flat.shape[1] // _BLOCK * _BLOCK
    norms = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True)
    if whole:
        blocks = torch.linalg.vector_norm(flat[:, :whole].reshape(len(rows), -1, _BLOCK), dim=2)
        norms = torch.cat([blocks, norms], 1)
    squares: Tensor = norms.double().square().sum(1)
    return squares
