"""The attributes of a flwr Strategy as a state that a checkpoint can hold, and back."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedtrain import flower
from fedtrain.errors import RunError
from fedtrain.params import snapshot
from fedtrain.strategies.base import State

__all__ = ["attributes", "restore"]

_NEVER_STATE = (
    logging.Logger, PurePath, functools.partial, type,
    types.BuiltinFunctionType, types.FunctionType, types.MethodType, types.ModuleType,
)  # fmt: skip


def attributes(strategy: Strategy) -> dict[str, Any]:
    """Copy a strategy's attributes, those of a strategy that it wraps included.

    Functions, classes, paths and loggers are left out: they are the strategy's configuration.

    Raises:
        RunError: an attribute could not be saved, so that a resumed run would silently go on without it.
    """
    return {
        name: {"strategy": attributes(value)} if isinstance(value, Strategy) else _saved(value, strategy, name)
        for name, value in vars(strategy).items()
        if not isinstance(value, _NEVER_STATE)
    }


def restore(strategy: Strategy, state: State) -> None:
    """Set the attributes that `attributes` copied; the strategy keeps no tie to the state."""
    for name, saved in state.items():
        if isinstance(inner := getattr(strategy, name, None), Strategy):
            restore(inner, saved["strategy"])
        else:
            setattr(strategy, name, _restored(saved))


def _saved(value: object, strategy: Strategy, name: str) -> Any:
    """One value as a number, text or None, or as a mapping from its kind to its content."""

    def numbered(values: Iterable[object]) -> dict[str, Any]:
        return {str(i): _saved(item, strategy, name) for i, item in enumerate(values)}

    # First, because np.float64 is a float too, and a float would not promote float32 as it does.
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        return snapshot({"array": torch.from_numpy(np.array(value, order="C"))})
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return snapshot({"tensor": value})
    if isinstance(value, ArrayRecord):
        tensors = flower.tensors(value)
        return {"record": {"keys": list(tensors), "values": numbered(tensors.values())}}
    # Not those that inherit from these: they would come back as one of these.
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return {type(value).__name__: numbered(value)}
    if isinstance(value, dict) and type(value) is dict and all(isinstance(key, str | int) for key in value):
        return {"dict": {"keys": list(value), "values": numbered(value.values())}}
    raise RunError(
        f"{type(strategy).__name__}.{name} cannot be saved in a checkpoint",
        got=type(value).__name__,
        expected="numbers, texts, NumPy arrays, tensors, ArrayRecords, or lists and dicts of them",
    )


def _restored(saved: Any) -> Any:
    if not isinstance(saved, Mapping):
        return saved
    [(kind, content)] = saved.items()
    match kind:
        case "array":
            return content.numpy().copy()
        case "tensor":
            return content.clone()
        case "list" | "tuple":
            values = [_restored(content[str(i)]) for i in range(len(content))]
            return values if kind == "list" else tuple(values)
        case _:
            pairs = {key: _restored(content["values"][str(i)]) for i, key in enumerate(content["keys"])}
            return pairs if kind == "dict" else flower.array_record(pairs)
