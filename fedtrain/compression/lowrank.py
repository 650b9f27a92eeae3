"""PowerSGD: each matrix as the product of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtrain.compression.stages import Array, Draw, Floats, Reduced, Reducer
from fedtrain.errors import CodecError

__all__ = ["PowerSgd"]


class _Part(NamedTuple):
    """One tensor of the vector; rank 0 if it is sent as it is."""

    start: int
    rows: int
    columns: int
    rank: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def pieces(self) -> tuple[int, ...]:
        return (self.rows * self.rank, self.columns * self.rank) if self.rank else (self.size,)


class PowerSgd(Reducer):
    """One power iteration per update, from where the last one ended.

    Tensors of less than two dimensions, and those that have no fewer numbers as a product, are sent as they are. Unlike
    in the paper, where all workers share one basis, each client has its own: the server needs no second exchange.

    Args:
        rank: columns of the thin matrices.
        shapes: of the tensors in the vector, one after another; each is a matrix of its first dimension by the rest.

    References:
        Vogels et al., PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization, NeurIPS 2019.
    """

    def __init__(self, rank: int, shapes: Sequence[tuple[int, ...]]) -> None:
        self._parts: list[_Part] = []
        self._size = 0
        for shape in shapes:
            rows = shape[0] if len(shape) > 1 else 1
            columns = math.prod(shape[len(shape) > 1 :])
            least = min(rank, rows, columns)
            pays = least * (rows + columns) < rows * columns
            self._parts.append(_Part(self._size, rows, columns, least if pays else 0))
            self._size += rows * columns
        self.pieces = tuple(piece for part in self._parts for piece in part.pieces)
        self._kept = sum(part.columns * part.rank for part in self._parts)

    def reduce(self, vector: Floats, draw: Draw) -> Reduced:
        """Multiply each matrix with its last right factor, make that orthonormal, and project on it."""
        if draw.memory is None:
            warm = torch.from_numpy(draw.rng.standard_normal(self._kept, dtype=np.float32))
        else:
            warm = draw.memory
        if warm.shape != (self._kept,):
            raise CodecError("the kept state is of another model", got=list(warm.shape), expected=str([self._kept]))
        numbers: list[Tensor] = []
        kept: list[Tensor] = []
        place = 0
        for part in self._parts:
            values = torch.from_numpy(vector[part.start : part.start + part.size])
            if not part.rank:
                numbers.append(values)
                continue
            length = part.columns * part.rank
            right = warm[place : place + length].view(part.columns, part.rank)
            place += length
            left, right, next_right = _iterated(values.view(part.rows, part.columns), right)
            numbers += [left.reshape(-1), right.reshape(-1)]
            kept.append(next_right.reshape(-1))
        return Reduced(_joined(numbers).numpy(), [], _joined(kept) if kept else None)

    def restore(self, numbers: Floats, beside: Sequence[Array]) -> Floats:
        """Multiply the factors."""
        vector = torch.empty(self._size)
        pieces = iter(torch.split(torch.from_numpy(numbers), list(self.pieces)))
        for part in self._parts:
            target = vector[part.start : part.start + part.size]
            if part.rank:
                left, right = next(pieces).view(part.rows, part.rank), next(pieces).view(part.columns, part.rank)
                torch.mm(left, right.T, out=target.view(part.rows, part.columns))
            else:
                target.copy_(next(pieces))
        return vector.numpy()


def _iterated(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One power iteration: the left and the right factor, and what the next iteration starts from.

    The matrix and what is kept are scaled to magnitudes of at most 1, so that neither overflows. An all-zero matrix
    moves nothing.
    """
    peak = matrix.abs().max()
    scale = peak if peak > 0 else torch.ones(())
    unit = matrix / scale
    left = torch.linalg.qr(unit @ right).Q  # orthonormal also where the product has a lower rank
    projected = unit.T @ left
    most = projected.abs().max()
    return left, projected * scale, projected / most if most > 0 else right


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0)
