"""Names, dtypes and shapes of what is encoded, and the error of all codecs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedtrain.errors import CodecError
from fedtrain.params import Params

__all__ = ["Schema", "check", "nbytes", "schema_of"]

Schema = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def schema_of(params: Params) -> Schema:
    """Names, dtypes and shapes of tensors, in their order."""
    return {name: (t.dtype, tuple(t.shape)) for name, t in params.items()}


def nbytes(schema: Schema) -> int:
    """Bytes of the tensors of a schema."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in schema.values())


def check(params: Params, schema: Schema) -> None:
    """Compare tensors with a schema; their order does not matter.

    Raises:
        CodecError: a name, a dtype or a shape differs.
    """
    if params.keys() != schema.keys():
        raise CodecError("a tensor is missing or not known", got=sorted(params.keys() ^ schema.keys())[0])
    for name, (dtype, shape) in schema.items():
        tensor = params[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise CodecError(f"the tensor {name!r} is wrong", got=got, expected=f"{dtype} {list(shape)}")
