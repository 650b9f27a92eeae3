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

__all__ = ["DamagedStateError", "read_state", "write_state"]


class DamagedStateError(ValueError):
    """A file is not whole; the reader decides what to do without it."""


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state all or nothing, with a SHA-256 over all of it.

    Args:
        path: the file; its folder must exist.
        state: names to tensors, to what JSON can hold, or to mappings of such.

    Raises:
        OSError: from the file system; the old file stays as it was.
    """
    tensors, rest = _flatten(state)
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
    for place, tensor in tensors.items():
        *parents, name = json.loads(place)
        functools.reduce(lambda level, key: level[key], parents, whole)[name] = tensor
    return whole


def _flatten(level: Mapping[str, Any], parents: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested mappings into tensors, named by their path as JSON, and the rest in its nesting."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in level.items():
        if isinstance(value, Tensor):
            # Cloned: a state may hold the very tensors of the parameters, which safetensors refuses.
            tensors[json.dumps([*parents, name])] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
            rest[name] = None  # keeps its place: sums over tensors depend on their order
        elif isinstance(value, Mapping):
            inner, rest[name] = _flatten(value, (*parents, name))
            tensors |= inner
        else:
            rest[name] = value
    return tensors, rest


def _digest(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(rest).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
