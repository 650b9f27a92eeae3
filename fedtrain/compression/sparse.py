"""Sparsifiers: a few numbers of the vector, and where they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedtrain.compression.bits import EliasFano, Gaps
from fedtrain.compression.stages import Array, Draw, Field, Floats, Reduced, Reducer

__all__ = ["RandK", "TopK"]


def _count(fraction: float, size: int) -> int:
    """How many numbers a fraction is: rounded up, so that one is left of any tensor."""
    return min(size, math.ceil(fraction * size))


class TopK(Reducer):
    """Keeps the numbers of largest magnitude, over all tensors as one vector; of equal ones, the first.

    Args:
        fraction: of the numbers that are kept.
        size: length of the vector.
        coded: an entropy coder follows, which makes fewer bytes of gaps than Elias and Fano do.

    References:
        Aji and Heafield, Sparse Communication for Distributed Gradient Descent, EMNLP 2017.
    """

    def __init__(self, fraction: float, size: int, coded: bool) -> None:
        self._size, self._count = size, _count(fraction, size)
        self._code = (Gaps if coded else EliasFano)(size, self._count)
        self.pieces, self.fields = (self._count,), self._code.fields

    def reduce(self, vector: Floats, draw: Draw) -> Reduced:
        """Leave the largest numbers, in the order in which they stand."""
        indices = self._largest(np.abs(vector))
        return Reduced(vector[indices], self._code.write(indices))

    def restore(self, numbers: Floats, beside: Sequence[Array]) -> Floats:
        """Put the numbers into their places, and zero into all others."""
        vector = np.zeros(self._size, np.float32)
        vector[self._code.read(beside)] = numbers
        return vector

    def _largest(self, magnitudes: Floats) -> npt.NDArray[np.int64]:
        if not self._count:
            return np.zeros(0, np.int64)
        place = self._size - self._count
        threshold = np.partition(magnitudes, place)[place]
        above = np.flatnonzero(magnitudes > threshold)
        equal = np.flatnonzero(magnitudes == threshold)[: self._count - len(above)]
        return np.sort(np.concatenate([above, equal]))


class RandK(Reducer):
    """Keeps numbers at random places; a seed of 8 bytes travels in place of the indices.

    Without error feedback the numbers are divided by the fraction, so that their expectation is the vector; with it
    they are sent as they are, since a residual of numbers so enlarged would grow from round to round.

    Args:
        fraction: of the numbers that are kept.
        size: length of the vector.

    References:
        Konecny et al., Federated Learning: Strategies for Improving Communication Efficiency, 2016.
        Stich et al., Sparsified SGD with Memory, NeurIPS 2018.
    """

    def __init__(self, fraction: float, size: int) -> None:
        self._size, self._count = size, _count(fraction, size)
        self.pieces, self.fields = (self._count,), (Field(np.dtype("<u8"), 1),)

    def reduce(self, vector: Floats, draw: Draw) -> Reduced:
        """Leave the numbers at the places that a new seed draws."""
        seed = draw.rng.integers(2**64, size=1, dtype=np.uint64)
        numbers = vector[self._drawn(int(seed[0]))]
        if not draw.feedback and self._count:
            numbers = numbers * np.float32(self._size / self._count)
        return Reduced(numbers, [seed])

    def restore(self, numbers: Floats, beside: Sequence[Array]) -> Floats:
        """Put the numbers into their places, and zero into all others."""
        vector = np.zeros(self._size, np.float32)
        vector[self._drawn(int(beside[0][0]))] = numbers
        return vector

    def _drawn(self, seed: int) -> npt.NDArray[np.int64]:
        """Draw the places of the smallest keys.

        NumPy promises that raw keys stay the same in later versions; of `choice` and `permutation` it does not.
        """
        if not self._count:
            return np.zeros(0, np.int64)
        keys = np.random.PCG64(seed).random_raw(self._size)
        threshold = np.partition(keys, self._count - 1)[self._count - 1]
        return np.flatnonzero(keys <= threshold)[: self._count]
