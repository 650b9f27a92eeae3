"""Moments of local optimisers that the server averages: they are buffers of the model, and travel as those do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedtrain.experiment.training import TrainingSection
from fedtrain.params import snapshot
from fedtrain.training.optimizer import LocalOptimizer

__all__ = ["read_moments", "register_moments", "write_moments"]

_PREFIX = "optimizer-"
# A count of steps is no weight: in millions it adds nothing to the norm by which the server judges updates.
_COUNTS, _UNIT = "step", 1e-6


def register_moments(model: nn.Module, training: TrainingSection) -> None:
    """Give a model a buffer of zeros for each moment that its local optimiser has, if these are to be averaged.

    Args:
        model: as its task builds it.
        training: says which optimiser; `rooted`.
    """
    if training.optimizer_state != "average":
        return
    params = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = LocalOptimizer(training, params)
    optimizer.step([torch.zeros_like(p) for p in params.values()], 1.0)
    for name, state in optimizer.state().items():
        for key, value in state.items():
            model.register_buffer(_buffer(name, key), torch.zeros_like(value))


def read_moments(model: nn.Module) -> dict[str, Any]:
    """Read what `LocalOptimizer` takes for its state from a model's buffers; a parameter never stepped has none."""
    names = {_plain(name): name for name, _ in model.named_parameters()}
    state: dict[str, dict[str, Tensor]] = {}
    for buffer, value in model.named_buffers():
        if buffer.startswith(_PREFIX):
            key, _, plain = buffer.removeprefix(_PREFIX).partition("-")
            state.setdefault(names[plain], {})[key] = value.clone() if key != _COUNTS else value / _UNIT
    used = {name: values for name, values in state.items() if any(bool(value.any()) for value in values.values())}
    return {name: snapshot(values) for name, values in used.items()}


def write_moments(model: nn.Module, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write what `LocalOptimizer.state` gave into a model's buffers; those of other parameters stay."""
    buffers = dict(model.named_buffers())
    for name, values in state.items():
        for key, value in values.items():
            buffers[_buffer(name, key)].copy_(value * _UNIT if key == _COUNTS else value)


def _buffer(name: str, key: str) -> str:
    return f"{_PREFIX}{key}-{_plain(name)}"


def _plain(name: str) -> str:
    return name.replace(".", "-")  # a buffer's name has no dots
