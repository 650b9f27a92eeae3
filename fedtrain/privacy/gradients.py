"""Gradients of single examples by Opacus's three ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtrain.errors import MissingExtraError, TaskError
from fedtrain.privacy.clipping import ExampleGradients, Layer, squared_norms
from fedtrain.privacy.watching import Call, output_gradients, watched

__all__ = ["OpacusEngine"]

_Formula = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]
"""(layer, its inputs, its output's gradient) -> per parameter, each example's gradient, or its norm."""


class OpacusEngine:
    """Compute gradients of examples with Opacus, which is in the model only meanwhile.

    Args:
        model: it stays as it is, names and hooks included.
        loss: (outputs, targets) -> `(B,)`.
        trained: leaf parameters.
        layers: whose parameters these are.
        mode: hooks, GradSampleModule with its formulas per layer; functorch, the same with vmap in every layer; ghost,
            GradSampleModuleFastGradientClipping, which knows norms alone and finds the sum by a second backward pass.

    References:
        Yousefpour et al., "Opacus: User-Friendly Differential Privacy Library in PyTorch", 2021.
        Li, Tramer, Liang, Hashimoto, "Large Language Models Can Be Strong Differentially Private Learners", ICLR 2022
        (ghost clipping).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        trained: Sequence[Tensor],
        layers: Sequence[Layer],
        mode: str,
    ) -> None:
        self._model, self._loss, self._trained, self._layers, self._mode = model, loss, trained, layers, mode
        self._wrapper = _wrapper(mode)
        self._refuse()
        names = {module: f"{path or 'the model'} ({type(module).__name__})" for path, module in model.named_modules()}
        self._hooked: list[tuple[str, nn.Module]] = []
        with self._wrapped() as wrapped:
            self._hooked = [(names[module], module) for module in wrapped.iterate_submodules(model)]

    def __call__(self, inputs: Tensor, targets: Tensor) -> ExampleGradients:
        # Opacus copies layers for vmap, hooks included, so its own must come first.
        with self._wrapped() as wrapped, watched(self._hooked, len(inputs)) as calls, _quiet():
            losses = self._loss(self._forward(wrapped, inputs, calls), targets)
            ghost = self._mode == "ghost"
            output_gradients(losses, calls, keep_graph=ghost)
            kind = "_norm_sample" if ghost else "grad_sample"
            found: list[Tensor | None] = [getattr(p, kind, None) for p in self._trained]
        squares = [None if t is None else squared_norms(t) for t in found]
        nothing = torch.zeros(len(inputs), dtype=torch.float64, device=losses.device)
        per_layer = [
            torch.stack([nothing, *(s for place in layer.own.values() if (s := squares[place]) is not None)]).sum(0)
            for layer in self._layers
        ]
        weigh = self._by_second_pass(losses) if ghost else self._by_samples(found)
        return ExampleGradients(torch.stack(per_layer), weigh)

    def _forward(self, wrapped: nn.Module, inputs: Tensor, calls: list[list[Call]]) -> Tensor:
        try:
            outputs: Tensor = wrapped(inputs)
        except NotImplementedError as exc:
            often = [name for (name, _), made in zip(self._hooked, calls) if len(made) > 1]
            if self._mode != "ghost" or not often:
                raise
            raise _unsuited(often[0], "is called more than once", "ghost") from exc
        if self._mode == "ghost":
            for (name, module), made in zip(self._hooked, calls):
                if isinstance(module, nn.Linear) and any(call.input.dim() > 3 for call in made):
                    raise _unsuited(name, "takes more than three dimensions", "ghost")
        return outputs

    def _by_second_pass(self, losses: Tensor) -> Callable[[Tensor], list[Tensor]]:
        def weighted(factors: Tensor) -> list[Tensor]:
            total = (factors[0].to(losses.dtype) * losses).sum()
            with _quiet():  # hooks stay in a graph from which they have been removed
                return list(torch.autograd.grad(total, self._trained, materialize_grads=True))

        return weighted

    def _by_samples(self, samples: list[Tensor | None]) -> Callable[[Tensor], list[Tensor]]:
        of_layer = {place: number for number, layer in enumerate(self._layers) for place in layer.own.values()}

        def weighted(factors: Tensor) -> list[Tensor]:
            return [
                torch.zeros_like(p)
                if sample is None
                else (factors[of_layer[place]].to(sample.dtype) @ sample.reshape(len(sample), -1)).view(p.shape)
                for place, (p, sample) in enumerate(zip(self._trained, samples))
            ]

        return weighted

    def _refuse(self) -> None:
        """Refuse layers for which Opacus's formulas are wrong."""
        for layer in self._layers:
            module: Any = layer.module
            if next(module.buffers(), None) is not None:
                raise _unsuited(layer.name, "has buffers", self._mode)
            if self._mode == "ghost" and layer.shared:
                raise _unsuited(layer.name, "shares a parameter", self._mode)
            if self._mode == "functorch":
                continue
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                raise _unsuited(layer.name, "has a padding_idx", self._mode)
            if isinstance(module, nn.LayerNorm) and module.bias is None:
                raise _unsuited(layer.name, "has no bias", self._mode)
            if isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros":
                raise _unsuited(layer.name, f"pads with {module.padding_mode}", self._mode)

    @contextmanager
    def _wrapped(self) -> Iterator[Any]:
        """Hang Opacus's hooks into the model, and take them and all else of its off again."""
        wrapped = self._wrapper(self._model, loss_reduction="sum", force_functorch=self._mode == "functorch")
        try:
            yield wrapped
        finally:
            wrapped.to_standard_module()
            for _, module in self._hooked:
                for trace in ("activations", "max_batch_len"):
                    vars(module).pop(trace, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let torch not warn of what is as it should be.

    Hooks of the first layer fire though its input has no gradient; and Opacus asks for autocast to the tokens' dtype.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing|In C.* autocast", UserWarning)
        yield


def _wrapper(mode: str) -> Callable[..., Any]:
    """Opacus's wrapper for a mode, with its formulas made right where they are not."""
    try:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    except ModuleNotFoundError as exc:
        raise MissingExtraError("opacus", "privacy", f'[privacy] mode = "{mode}"') from exc

    def plainly_laid_out(formula: _Formula) -> _Formula:
        # Opacus takes patches of images, and views of tokens, as if all tensors were contiguous. Of images in channels
        # last it would silently take the wrong ones.
        return lambda layer, inputs, gradient: formula(layer, [t.contiguous() for t in inputs], gradient.contiguous())

    def in_float64(formula: _Formula) -> _Formula:
        # In float32 a tiny gradient times a huge input vanishes before the two meet: the norm would be too small.
        return lambda layer, inputs, gradient: formula(
            layer, [t.double() if t.is_floating_point() else t for t in inputs], gradient.double()
        )

    class Samples(GradSampleModule):  # type: ignore[misc]
        GRAD_SAMPLERS = _each(plainly_laid_out, GradSampleModule.GRAD_SAMPLERS)

    class Norms(GradSampleModuleFastGradientClipping):  # type: ignore[misc]
        GRAD_SAMPLERS = Samples.GRAD_SAMPLERS
        NORM_SAMPLERS = _each(in_float64, _each(plainly_laid_out, GradSampleModuleFastGradientClipping.NORM_SAMPLERS))

    return Norms if mode == "ghost" else Samples


def _each(change: Callable[[_Formula], _Formula], formulas: Mapping[Any, _Formula]) -> dict[Any, _Formula]:
    return {kind: change(formula) for kind, formula in formulas.items()}


def _unsuited(layer: str, why: str, mode: str) -> TaskError:
    others = '"fast" or "hooks"' if mode == "ghost" else '"fast" or "functorch"'
    return TaskError(f'[privacy] mode = "{mode}" is not right for {layer}, which {why}', hint=f"Use mode = {others}")
