"""What passes through the modules of a model in one forward pass, and the gradients that come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fedtrain.errors import TaskError

__all__ = ["Call", "output_gradients", "watched"]


class Call(NamedTuple):
    """One call of a module."""

    input: Tensor  # (B, ...), detached
    version: int  # of the input: it grows with each change in place
    edge: GradientEdge  # the output's place in the graph, which no change in place of the output moves


@contextmanager
def watched(modules: Sequence[tuple[str, nn.Module]], size: int) -> Iterator[list[list[Call]]]:
    """Note every call of each module that a gradient can pass through.

    Args:
        modules: with their names; what hooks into them is gone at the end of the context.
        size: examples in the batch.

    Raises:
        TaskError: a module takes or gives something whose first dimension is not the batch, or its input is
            overwritten within the context.
    """
    calls: list[list[Call]] = [[] for _ in modules]

    def noting(name: str, made: list[Call]) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [*args, *kwargs.values()]
            for tensor in (*given, output):
                if not isinstance(tensor, Tensor) or not tensor.dim() or tensor.shape[0] != size:
                    shown = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                    raise TaskError(
                        f"DP-SGD cannot tell the examples apart in {name}",
                        got=f"{shown} for {size} examples",
                        expected="one tensor in and one out, whose first dimension is the batch",
                    )
            if output.requires_grad:
                made.append(Call(given[0].detach(), given[0]._version, get_gradient_edge(output)))

        return note

    # First, for a hook of the model's own may put another output in place.
    handles = [
        module.register_forward_hook(noting(name, made), prepend=True, with_kwargs=True)
        for (name, module), made in zip(modules, calls)
    ]
    try:
        yield calls
        for (name, _), made in zip(modules, calls):
            if any(call.input._version != call.version for call in made):
                raise TaskError(
                    f"the input of {name} is changed in place after its use, which hides the layer's gradient",
                    hint="Write x = x + y in place of x += y there",
                )
    finally:
        for handle in handles:
            handle.remove()


def output_gradients(losses: Tensor, calls: list[list[Call]], keep_graph: bool = False) -> list[list[Tensor | None]]:
    """Differentiate the sum of losses by the output of each call, and by nothing else: no weight's gradient is made.

    Returns:
        In the order of `calls`; None where the losses do not depend on an output.
    """
    edges = [call.edge for made in calls for call in made]
    gradients = torch.autograd.grad(losses.sum(), edges, allow_unused=True, retain_graph=keep_graph) if edges else ()
    found = iter(gradients)
    return [[next(found) for _ in made] for made in calls]
