"""Gradients of single examples by Opacus's formulas, in three ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtrain.errors import MissingExtraError, TaskError
from fedtrain.privacy.clipping import ExampleGradients, Subject, by_copy, squared_norms, weighted_sum
from fedtrain.privacy.watching import Call, output_gradients, watched

__all__ = ["OpacusEngine"]

_Formula = Callable[[Any, list[Tensor], Tensor], Mapping[nn.Parameter, Tensor]]
"""(module, its inputs, its output's gradient) -> per parameter, each example's gradient, or the norm of that."""


class _Unit(NamedTuple):
    """A module whose gradients one formula gives: a layer, or all that is in a module of no known kind."""

    name: str
    module: nn.Module
    formula: _Formula
    gives_norms: bool


class OpacusEngine:
    """Compute gradients of examples with Opacus's formulas per layer, without its wrapper.

    The wrapper would stay in the model, or be put on and off in each step; it computes weights' gradients that nobody
    needs; and it hands convolutions in channels last to a formula that takes the wrong patches of them.

    Args:
        subject: what to differentiate; the model stays as it is.
        mode: hooks, formulas per layer and vmap where there is none; functorch, vmap everywhere; ghost, norms alone
            where there are formulas for them, and the sum by a second backward pass. Ghost is for an honest server: the
            second pass rounds otherwise than the norms were made, and weights chosen for it make that many times the
            bound. With TF32 on a GPU, honest weights can pass the bound by 1e-3.

    References:
        Yousefpour et al., "Opacus: User-Friendly Differential Privacy Library in PyTorch", 2021.
        Li, Tramer, Liang, Hashimoto, "Large Language Models Can Be Strong Differentially Private Learners", ICLR 2022
        (ghost clipping).
    """

    def __init__(self, subject: Subject, mode: str) -> None:
        self._subject, self._mode = subject, mode
        self._places = {id(p): place for place, p in enumerate(subject.trained)}
        self._units = list(self._find_units())

    def __call__(self, inputs: Tensor, targets: Tensor, copies: int = 1) -> ExampleGradients:
        ghost = self._mode == "ghost"
        with watched([(unit.name, unit.module) for unit in self._units], len(inputs)) as calls:
            losses = self._subject.loss(self._subject.model(inputs), targets) / copies
        gradients = output_gradients(losses, calls, keep_graph=ghost)
        samples: dict[int, Tensor] = {}
        squares: dict[int, Tensor] = {}
        for unit, made, passed in zip(self._units, calls, gradients):
            if unit.gives_norms:
                self._refuse_calls(unit, made)
            used = by_copy([(call.input, g) for call, g in zip(made, passed) if g is not None], copies)
            for place, found in self._found(unit, used):
                if unit.gives_norms:
                    squares[place] = found.double().square()
                else:
                    samples[place] = samples[place] + found if place in samples else found
        squares |= {place: squared_norms(sample) for place, sample in samples.items()}
        nothing = torch.zeros(len(inputs) // copies, dtype=torch.float64, device=losses.device)
        of_layers = [
            sum((squares.get(place, nothing) for place in layer.own.values()), nothing)
            for layer in self._subject.layers
        ]
        weighted = self._by_second_pass(losses) if ghost else self._by_samples(samples)
        return ExampleGradients(torch.stack(of_layers), weighted)

    def _found(self, unit: _Unit, used: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        for x, g in used:
            with torch.no_grad():
                found = unit.formula(unit.module, [x.contiguous()], g.contiguous())
            yield from ((self._places[id(p)], value) for p, value in found.items() if id(p) in self._places)

    def _by_second_pass(self, losses: Tensor) -> Callable[[Tensor], list[Tensor]]:
        def weighted(factors: Tensor) -> list[Tensor]:
            total = losses.dot(factors[0].to(losses.dtype))
            return list(torch.autograd.grad(total, self._subject.trained, materialize_grads=True))

        return weighted

    def _by_samples(self, samples: Mapping[int, Tensor]) -> Callable[[Tensor], list[Tensor]]:
        layer_of = {place: number for number, layer in enumerate(self._subject.layers) for place in layer.own.values()}

        def total(place: int, p: Tensor, factors: Tensor) -> Tensor:
            if place not in samples:
                return torch.zeros_like(p)
            return weighted_sum(samples[place].reshape(factors.shape[1], -1), factors[layer_of[place]]).view(p.shape)

        return lambda factors: [total(place, p, factors) for place, p in enumerate(self._subject.trained)]

    def _refuse_calls(self, unit: _Unit, made: Sequence[Call]) -> None:
        """Norms of several calls do not add up, and Opacus has none for more than three dimensions."""
        if len(made) > 1:
            raise _unsuited(unit.name, "is called more than once", "ghost")
        if isinstance(unit.module, nn.Linear) and any(call.input.dim() > 3 for call in made):
            raise _unsuited(unit.name, "takes more than three dimensions", "ghost")

    def _find_units(self) -> Iterator[_Unit]:
        samples, norms = _formulas(self._mode)
        inside: set[nn.Module] = set()
        for path, module in self._subject.model.named_modules():
            name = f"{path or 'the model'} ({type(module).__name__})"
            if module in inside or not any(id(p) in self._places for p in module.parameters(recurse=False)):
                continue
            if self._mode == "ghost" and any(layer.shared and layer.module is module for layer in self._subject.layers):
                raise _unsuited(name, "shares a parameter", "ghost")
            if self._mode != "functorch" and type(module) in samples:
                _refuse_layer(name, module, self._mode)
                yield _Unit(name, module, norms.get(type(module), samples[type(module)]), type(module) in norms)
            else:
                inside.update(module.modules())
                if next(module.buffers(), None) is not None:
                    raise _unsuited(name, "has buffers", self._mode)
                yield _Unit(name, module, _by_vmap(module), False)


def _formulas(mode: str) -> tuple[Mapping[Any, _Formula], Mapping[Any, _Formula]]:
    """Opacus's formulas for the gradients of layers, and in mode ghost for their norms."""
    try:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    except ModuleNotFoundError as exc:
        raise MissingExtraError("opacus", "privacy", f'[privacy] mode = "{mode}"') from exc

    def in_float64(formula: _Formula) -> _Formula:
        # In float32 a tiny gradient times a huge input vanishes before the two meet: the norm would be too small.
        return lambda module, inputs, g: formula(
            module, [t.double() if t.is_floating_point() else t for t in inputs], g.double()
        )

    norms = GradSampleModuleFastGradientClipping.NORM_SAMPLERS if mode == "ghost" else {}
    return GradSampleModule.GRAD_SAMPLERS, {kind: in_float64(formula) for kind, formula in norms.items()}


def _by_vmap(module: nn.Module) -> _Formula:
    from opacus.grad_sample.functorch import prepare_layer

    prepare_layer(module)
    of_batch = vars(module).pop("ft_compute_sample_grad")

    def formula(module: nn.Module, inputs: list[Tensor], g: Tensor) -> Mapping[nn.Parameter, Tensor]:
        parameters = list(module.parameters())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In C.* autocast", UserWarning)  # Opacus asks for it in the tokens' dtype
            return dict(zip(parameters, of_batch(parameters, inputs[0], g)))

    return formula


def _refuse_layer(name: str, module: Any, mode: str) -> None:
    """Refuse layers that Opacus's formulas are wrong for."""
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        raise _unsuited(name, "has a padding_idx", mode)
    if isinstance(module, nn.LayerNorm) and module.bias is None:
        raise _unsuited(name, "has no bias", mode)
    if isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros":
        raise _unsuited(name, f"pads with {module.padding_mode}", mode)


def _unsuited(name: str, why: str, mode: str) -> TaskError:
    others = {"hooks": '"fast" or "functorch"', "ghost": '"fast" or "hooks"', "functorch": '"fast"'}[mode]
    return TaskError(f'[privacy] mode = "{mode}" is not right for {name}, which {why}', hint=f"Use mode = {others}")
