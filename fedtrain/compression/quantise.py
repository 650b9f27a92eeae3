"""Quantisers: every number in 16, 8 or fewer bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedtrain.compression.bits import pack, packed_size, unpack
from fedtrain.compression.stages import Array, Field, Floats, Quantiser
from fedtrain.errors import CodecError

__all__ = ["BFloat16", "Float16", "Sign", "Uniform"]

_FLOAT32, _BYTE = np.dtype("<f4"), np.dtype(np.uint8)
_LEAST, _MOST = np.finfo(np.float32).tiny, np.finfo(np.float32).max
_FIXED_BUCKET, _CODED_BUCKET = 256, 8192  # numbers; measured, see docs/compression.md


class Float16(Quantiser):
    """IEEE half precision: rounded to nearest, and to the largest half where it would be infinite."""

    def __init__(self, size: int) -> None:
        self.fields = (Field(np.dtype("<f2"), size),)

    def quantise(self, numbers: Floats, rng: np.random.Generator) -> list[Array]:
        """Round."""
        most = np.float32(np.finfo(np.float16).max)
        return [np.clip(numbers, -most, most).astype(np.float16)]

    def restore(self, arrays: Sequence[Array]) -> Floats:
        """Widen."""
        return arrays[0].astype(np.float32)


class BFloat16(Quantiser):
    """The upper half of a float32: rounded to nearest, and to the largest one where it would be infinite."""

    def __init__(self, size: int) -> None:
        self.fields = (Field(np.dtype("<u2"), size),)

    def quantise(self, numbers: Floats, rng: np.random.Generator) -> list[Array]:
        """Round."""
        most = torch.finfo(torch.bfloat16).max
        rounded = torch.from_numpy(numbers).clamp(-most, most).to(torch.bfloat16)
        return [rounded.view(torch.int16).numpy().view(np.uint16)]

    def restore(self, arrays: Sequence[Array]) -> Floats:
        """Widen: the lower half is zero."""
        return (arrays[0].astype(np.uint32) << 16).view(np.float32)


class _Buckets:
    """Runs of numbers that share a scale.

    Args:
        pieces: lengths; no run goes beyond its piece.
        longest: numbers in a run; None for whole pieces.
    """

    def __init__(self, pieces: Sequence[int], longest: int | None = None) -> None:
        starts: list[int] = []
        end = 0
        for length in pieces:
            starts += range(end, end + length, longest or max(1, length))
            end += length
        self._starts = np.array(starts, np.int64)
        self._lengths = np.array([*starts[1:], end], np.int64)[: len(starts)] - self._starts
        self.fields = (Field(_FLOAT32, len(starts)),)

    def reduce(self, ufunc: np.ufunc, numbers: Floats) -> npt.NDArray[np.float64]:
        """Sum or maximum over each run, in float64."""
        if not len(self._starts):
            return np.zeros(0)
        return np.asarray(ufunc.reduceat(numbers, self._starts, dtype=np.float64))

    def mean(self, numbers: Floats) -> npt.NDArray[np.float64]:
        """Mean over each run, in float64."""
        return self.reduce(np.add, numbers) / self._lengths

    def spread(self, scales: Array) -> Floats:
        """Repeat each run's scale for its numbers.

        Raises:
            CodecError: a scale is not a positive, finite number.
        """
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise CodecError("a scale is wrong", expected="positive, finite numbers")
        return np.repeat(scales, self._lengths)


class Uniform(Quantiser):
    """Stochastic uniform quantisation, QSGD: a number goes to one of its two neighbours so that its mean stays.

    The largest magnitude of a bucket takes the last level, rather than the bucket's l2 norm: at 4 bits and buckets of
    512, the error of a real update is 0.25 of its norm, and 1.1 with the l2 norm.

    Args:
        bits: per number, 2 to 8; `2**bits - 1` levels, zero among them.
        pieces: lengths of the parts of the vector.
        bucket: numbers that share a scale; None for the default.
        coded: an entropy coder follows. It makes the most of equal steps for all numbers, so that buckets are large by
            default; and codes that do not fill a byte evenly get a byte each.

    References:
        Alistarh et al., QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding, NeurIPS 2017.
    """

    def __init__(self, bits: int, pieces: Sequence[int], bucket: int | None, coded: bool) -> None:
        if bucket is None and not (coded and bits == 8):
            bucket = _CODED_BUCKET if coded else _FIXED_BUCKET
        self._size = sum(pieces)
        self._levels = 2 ** (bits - 1) - 1
        self._width = 8 if coded and 8 % bits else bits
        self._buckets = _Buckets(pieces, bucket)
        self.fields = (*self._buckets.fields, Field(_BYTE, packed_size(self._size, self._width)))

    def quantise(self, numbers: Floats, rng: np.random.Generator) -> list[Array]:
        """Draw one of the two nearest levels for each number."""
        most = np.nextafter(np.float32(_MOST / self._levels), np.float32(0))  # the last level must be finite
        peaks = self._buckets.reduce(np.maximum, np.abs(numbers))
        scales = np.clip(peaks / self._levels, _LEAST, most).astype(np.float32)
        codes = numbers / self._buckets.spread(scales)
        codes += rng.random(self._size, dtype=np.float32)
        np.floor(codes, out=codes)
        np.clip(codes, -self._levels, self._levels, out=codes)
        codes += self._levels
        return [scales, pack(codes.astype(np.uint8), self._width)]

    def restore(self, arrays: Sequence[Array]) -> Floats:
        """Multiply codes by scales."""
        scales, packed = arrays
        codes = unpack(packed, self._size, self._width)
        if self._size and codes.max() > 2 * self._levels:
            raise CodecError("a code is out of range", got=int(codes.max()), expected=f"at most {2 * self._levels}")
        numbers = codes.astype(np.float32)
        numbers -= self._levels
        numbers *= self._buckets.spread(scales)
        return numbers


class Sign(Quantiser):
    """One bit per number, and the mean magnitude of each piece.

    References:
        Bernstein et al., signSGD: Compressed Optimisation for Non-Convex Problems, ICML 2018.
        Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient Compression Schemes, ICML 2019.
    """

    def __init__(self, pieces: Sequence[int]) -> None:
        self._size = sum(pieces)
        self._buckets = _Buckets(pieces)
        self.fields = (*self._buckets.fields, Field(_BYTE, packed_size(self._size, 1)))

    def quantise(self, numbers: Floats, rng: np.random.Generator) -> list[Array]:
        """Take the signs; zero counts as positive."""
        scales = np.maximum(self._buckets.mean(np.abs(numbers)), _LEAST).astype(np.float32)
        return [scales, pack(numbers >= np.float32(0), 1)]

    def restore(self, arrays: Sequence[Array]) -> Floats:
        """Give each sign its piece's mean magnitude."""
        scales, packed = arrays
        magnitudes = self._buckets.spread(scales)
        return np.where(unpack(packed, self._size, 1), magnitudes, -magnitudes)
