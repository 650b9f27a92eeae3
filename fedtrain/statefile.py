"""Nested state in one file: tensors and numbers, whole or refused, without pickle."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedtrain.disk import atomic_write

__all__ = ["DamagedStateError", "UnsavableStateError", "copy_state", "read_state", "write_state"]

_Place = tuple[str | int, ...]  # names, and positions in lists
_STATE = "a state maps names to tensors, numbers, texts, lists of numbers or texts, or to mappings of such"


class DamagedStateError(ValueError):
    """A file is not whole; the reader decides what to do without it."""


class UnsavableStateError(TypeError):
    """A state holds what would not come back as it was; the message says where."""


def copy_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a state down to its tensors, as `read_state` would give it back.

    Raises:
        UnsavableStateError: `write_state` would refuse it.
    """
    tensors, rest = _split(state)
    return _joined(tensors, json.loads(json.dumps(rest)))


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state all or nothing, with a SHA-256 over all of it.

    Args:
        path: the file; its folder must exist.
        state: names to tensors, to what JSON gives back as it was, or to mappings of such.

    Raises:
        UnsavableStateError: it is no such state.
        OSError: from the file system; the old file stays as it was.
    """
    tensors, rest = _split(state)
    # One entry: safetensors writes several in any order, and equal states should be equal files.
    content = safetensors.torch.save(tensors, {"state": json.dumps({"sha256": _digest(tensors, rest), "rest": rest})})
    atomic_write(path, lambda file: file.write(content))


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        DamagedStateError: the file is not whole.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header["__metadata__"]["state"])
        whole: dict[str, Any] = metadata["rest"]
        expected = metadata["sha256"]
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DamagedStateError(str(error)) from error
    if _digest(tensors, whole) != expected:
        raise DamagedStateError("its checksum does not match")
    return _joined(tensors, whole)


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested mappings into tensors, named by their path as JSON, and the rest in its nesting."""
    if not isinstance(state, Mapping):
        raise _unsavable((), f"is of type {_kind(state)}")
    tensors: dict[str, Tensor] = {}
    return tensors, _rest(state, (), tensors)


def _joined(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Put tensors into their places in the rest."""
    for place, tensor in tensors.items():
        *parents, name = json.loads(place)
        functools.reduce(lambda level, key: level[key], parents, rest)[name] = tensor
    return rest


def _rest(value: Any, place: _Place, tensors: dict[str, Tensor] | None) -> Any:
    """Copy a value without its tensors, which go to `tensors`; None in a list, which holds none."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise _unsavable(place, f"has a name of type {_kind(name)}: {name!r}")
        return {name: _rest(inner, (*place, name), tensors) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rest(item, (*place, i), None) for i, item in enumerate(value)]
    if isinstance(value, Tensor) and tensors is not None:
        if value.layout != torch.strided or value.dtype in (torch.complex32, torch.complex128):
            raise _unsavable(place, f"is a tensor of {value.dtype} and {value.layout}, which safetensors cannot hold")
        # Cloned: a state may hold the very tensors of the parameters, which safetensors refuses.
        tensors[json.dumps(place)] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        return None  # keeps its place: sums over tensors depend on their order
    if value is None or isinstance(value, str | int | float):
        return value
    raise _unsavable(place, f"is of type {_kind(value)}")


def _unsavable(place: _Place, problem: str) -> UnsavableStateError:
    return UnsavableStateError(f"state{''.join(f'[{key!r}]' for key in place)} {problem}; {_STATE}")


def _kind(value: object) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__name__}".removeprefix("builtins.")


def _digest(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(rest).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
