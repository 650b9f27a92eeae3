"""Small integers in few bits, and sorted indices in few bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedtrain.compression.stages import Array, Field
from fedtrain.errors import CodecError

__all__ = ["EliasFano", "Gaps", "IndexCode", "pack", "packed_size", "unpack"]

Indices = npt.NDArray[np.int64]
_BYTE = np.dtype(np.uint8)


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many integers of so many bits each."""
    return -(-count * bits // 8)


def pack(values: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Write unsigned integers below `2**bits` without gaps, the lowest bit first."""
    if bits in (2, 4, 8):
        in_byte = 8 // bits
        padded = np.zeros(packed_size(len(values), bits) * in_byte, np.uint8)
        padded[: len(values)] = values
        packed = padded[::in_byte].copy()
        for i in range(1, in_byte):
            packed |= padded[i::in_byte] << (i * bits)
        return packed
    width = -(-bits // 8)
    octets = np.ascontiguousarray(values, np.dtype("<u4")).view(np.uint8).reshape(-1, 4)[:, :width]
    return np.packbits(np.unpackbits(octets, axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack(packed: Array, count: int, bits: int) -> Array:
    """Read what `pack` wrote.

    Raises:
        CodecError: bits after the last integer are set.
    """
    if bits in (2, 4, 8):
        in_byte = 8 // bits
        spread = np.empty((len(packed), in_byte), np.uint8)
        for i in range(in_byte):
            spread[:, i] = packed >> (i * bits) & (2**bits - 1)
        values, rest = np.split(spread.reshape(-1), [count])
    else:
        flat, rest = np.split(np.unpackbits(packed, bitorder="little"), [count * bits])
        values = flat if bits == 1 else _gathered(flat.reshape(count, bits))
    if rest.any():
        raise CodecError("there is something after the last number")
    return values


def _gathered(bits: npt.NDArray[np.uint8]) -> Array:
    """Make an integer of each row of bits."""
    octets = np.packbits(bits, axis=1, bitorder="little")
    if octets.shape[1] == 1:
        return octets[:, 0]
    wide = np.zeros((len(octets), 4), np.uint8)
    wide[:, : octets.shape[1]] = octets
    return wide.view(np.dtype("<u4"))[:, 0]


class IndexCode(ABC):
    """Writes `count` different indices below `size`, in ascending order.

    Attributes:
        fields: the arrays it writes.
    """

    fields: tuple[Field, ...]

    def __init__(self, size: int, count: int) -> None:
        assert size < 2**32, "a gap between indices has 32 bits"
        self.size, self.count = size, count

    @abstractmethod
    def write(self, indices: Indices) -> list[Array]:
        """Write the indices as arrays of `fields`."""

    @abstractmethod
    def read(self, arrays: Sequence[Array]) -> Indices:
        """Read the indices.

        Raises:
            CodecError: they are out of range, repeated or too few.
        """


class Gaps(IndexCode):
    """The distance of each index from the one before, less one: mostly small, which an entropy coder makes use of."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__(size, count)
        self.fields = (Field(np.dtype("<u4"), count),)

    def write(self, indices: Indices) -> list[Array]:
        """Write one integer per index."""
        return [(np.diff(np.concatenate([[-1], indices])) - 1).astype(np.dtype("<u4"))]

    def read(self, arrays: Sequence[Array]) -> Indices:
        """Add the gaps up: the result ascends whatever they are, so that only its end can be wrong."""
        indices = np.cumsum(arrays[0].astype(np.int64) + 1) - 1
        if self.count and indices[-1] >= self.size:
            raise CodecError("an index is out of range", got=int(indices[-1]), expected=f"less than {self.size}")
        return indices


class EliasFano(IndexCode):
    """Low bits as they are, high bits in unary: a fixed size, at most half a bit per index above the least possible.

    References:
        Elias, Efficient Storage and Retrieval by Content and Address of Static Files, Journal of the ACM 1974.
        Vigna, Quasi-Succinct Indices, WSDM 2013.
    """

    def __init__(self, size: int, count: int) -> None:
        super().__init__(size, count)
        self._low = max(0, (size // count).bit_length() - 1) if count else 0
        self._places = count + (size >> self._low) if count else 0
        self.fields = (
            Field(_BYTE, packed_size(count, self._low)),
            Field(_BYTE, packed_size(self._places, 1)),
        )

    def write(self, indices: Indices) -> list[Array]:
        """Write the low bits, and a row of bits in which the i-th one stands at place `high bits + i`."""
        places = np.zeros(self._places, np.uint8)
        places[(indices >> self._low) + np.arange(self.count)] = 1
        low = pack(indices & ((1 << self._low) - 1), self._low) if self._low else np.zeros(0, np.uint8)
        return [low, pack(places, 1)]

    def read(self, arrays: Sequence[Array]) -> Indices:
        """Find the ones; low bits can still repeat an index or put it out of order."""
        places = np.flatnonzero(unpack(arrays[1], self._places, 1))
        if len(places) != self.count:
            raise CodecError("the number of indices is wrong", got=len(places), expected=str(self.count))
        indices = (places - np.arange(self.count)) << self._low
        if self._low:
            indices |= unpack(arrays[0], self.count, self._low)
        if self.count and (indices[-1] >= self.size or (np.diff(indices) <= 0).any()):
            raise CodecError("indices are repeated, unsorted or out of range")
        return indices
