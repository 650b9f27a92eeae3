"""Activation checkpointing: a part of a model keeps its input alone, and is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from fedtrain.errors import TaskError
from fedtrain.tasks.patterns import matching

__all__ = ["checkpoint_modules"]


def checkpoint_modules(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let submodules forget what they compute until the backward pass; names and values stay as they are.

    Of modules one inside the other, the outer one is taken.

    Args:
        model: is changed.
        patterns: names of submodules, or patterns such as "block*".

    Raises:
        TaskError: no submodule has such a name, or one keeps running statistics, which would move twice a step.

    References:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    chosen = matching(patterns, modules, "model.checkpoint")
    taken: list[str] = []
    for name, module in modules.items():  # an outer module comes before those inside it
        if name in chosen and not any(name.startswith(f"{outer}.") for outer in taken):
            _refuse_statistics(name, module)
            module.forward = partial(_recomputed, module.forward)
            taken.append(name)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _refuse_statistics(name: str, module: nn.Module) -> None:
    for path, inner in module.named_modules(prefix=name):
        if isinstance(inner, _NormBase) and inner.track_running_stats:
            raise TaskError(
                f"model.checkpoint cannot take {name}: the running statistics of {path} would move twice a step",
                hint="Leave it out, or use nn.GroupNorm or nn.LayerNorm",
            )
