"""Randomness that privacy rests on: ChaCha20 keyed by the operating system, apart from every seed of the run.

Whoever knows the noise can take it off again, and whoever knows the coins loses the amplification by sampling. So
neither may follow from the experiment's seed, nor come from a generator whose state can be guessed from its output.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from numpy.typing import NDArray
from torch import Tensor

from fedtrain.errors import RunError

__all__ = ["NoiseSource"]

_BLOCK = 1 << 15  # words, or normal numbers, made at a time: the buffers are 640 KB, which a processor's cache holds
_ZEROS = memoryview(bytes(8 * _BLOCK))  # what is encrypted: the cipher's output is then its key stream
_STREAM = 1 << 37  # bytes drawn under one nonce; the cipher's 32-bit block counter ends at 2^38


class NoiseSource:
    """Draw noise and sampling coins that nobody can predict, or repeat.

    Without a seed, each source has 256 bits of OS entropy as its key; two sources are independent, and a forked child
    takes a new key before it draws. A source cannot be copied or pickled: a copy would draw the same noise twice, and
    the difference of the two releases would be free of it. Threads may share a source.

    Floating-point caveat: the Gaussian mechanism is proved for real numbers. With finite ones some outputs can be
    reached from one data set and not from its neighbour, and low-order bits tell which (Mironov shows it for Laplace
    noise, Jin et al. for Gaussian noise). Here normal numbers are made in float64 from 64-bit words, reach beyond 9
    standard deviations, and `add_noise` adds in float64 and rounds once to the tensor's dtype: in float32, about 2^29
    noise values lead to each typical output, which closes the known attacks, but is no proof. Timing is not hidden.

    Args:
        seed: makes the source repeatable, for simulations alone: what it protects is NOT PRIVATE.

    References:
        Nir, Langley, "ChaCha20 and Poly1305 for IETF Protocols", RFC 8439, 2018.
        Box, Muller, "A Note on the Generation of Random Normal Deviates", Annals of Mathematical Statistics 1958.
        Mironov, "On Significance of the Least Significant Bits for Differential Privacy", CCS 2012.
        Jin, McMurtry, Rubinstein, Ohrimenko, "Are We There Yet? Timing and Floating-Point Attacks on Differential
        Privacy Systems", IEEE S&P 2022.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seeded = seed is not None
        self._lock = threading.Lock()
        self._words = bytearray(8 * _BLOCK)
        self._normal = torch.empty(_BLOCK, dtype=torch.float64)
        self._radius = torch.empty(_BLOCK // 2, dtype=torch.float64)
        self._rekey(os.urandom(32) if seed is None else hashlib.sha256(f"fedtrain noise {seed}".encode()).digest())

    def __getstate__(self) -> object:
        raise TypeError("a NoiseSource cannot be copied or pickled: it would draw the same noise twice")

    def gaussian(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw independent normal numbers of mean 0.

        Args:
            shape: of the result; () for one number.
            std: the standard deviation, at least 0.
            dtype: of the result; the numbers are made in float64 and rounded once.
        """
        out = torch.empty(tuple(shape), dtype=dtype)
        for part, noise in self._noise_for(out, std):
            part.copy_(noise.mul_(std))
        return out

    def add_noise(self, values: Tensor, std: float) -> Tensor:
        """`values` plus independent normal numbers, added in float64 and rounded once to the dtype of `values`.

        Args:
            values: a tensor of floats of any shape, on any device; it stays as it is.
            std: the standard deviation, at least 0.
        """
        out = values.detach().clone(memory_format=torch.contiguous_format)
        for part, noise in self._noise_for(out, std):
            part.copy_(noise.mul_(std).to(part.device).add_(part))
        return out

    def poisson_mask(self, n: int, rate: float) -> Tensor:
        """Toss one coin per example.

        Args:
            n: the number of examples.
            rate: the chance of each to be taken, from 0 to 1; exact to 2^-64.

        Returns:
            bool, shape (n,): who is taken. It can be nobody.
        """
        if not 0 <= rate <= 1:
            raise RunError("the sample rate is no probability", got=rate, expected="a number from 0 to 1")
        taken = np.ones(n, dtype=np.bool_)
        if rate < 1:  # 2^64 is no 64-bit word
            limit = np.uint64(int(rate * 2.0**64))
            with self._lock:
                for start in range(0, n, _BLOCK):
                    part = taken[start : start + _BLOCK]
                    np.less(self._draw(len(part)), limit, out=part)
        return torch.from_numpy(taken)

    def _noise_for(self, out: Tensor, std: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a contiguous tensor in flat parts, each with standard normal numbers in float64 to be used up."""
        if not 0 <= std < math.inf:
            raise RunError("the noise has no valid standard deviation", got=std, expected="a finite number from 0")
        flat = out.view(-1)
        with self._lock:
            while len(flat):
                self._guard_fork()
                if self._used == _BLOCK:
                    self._make_normal()
                noise = self._normal[self._used : self._used + len(flat)]
                self._used += len(noise)
                yield flat[: len(noise)], noise
                flat = flat[len(noise) :]

    def _make_normal(self) -> None:
        """Fill the block with fresh normal numbers, two of each pair of words."""
        words = torch.from_numpy(self._draw(_BLOCK).view(np.int64))
        radius, first, second = self._radius, self._normal[: _BLOCK // 2], self._normal[_BLOCK // 2 :]
        # A word's magnitude over 2^63 is uniform on (0, 1], and finest near 0, where the tail comes from: words are
        # rounded to 53 significant bits. The half keeps it from being 0.
        radius.copy_(words[: _BLOCK // 2]).abs_().add_(0.5).mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
        torch.sin(first.copy_(words[_BLOCK // 2 :]).mul_(2.0**-63 * math.pi), out=second)
        second.mul_(radius)
        first.cos_().mul_(radius)
        self._used = 0

    def _draw(self, count: int) -> NDArray[np.uint64]:
        """Draw up to a block of uniform words, in memory that the next draw writes over."""
        self._guard_fork()
        if self._left < 8 * count:
            self._next_stream()
        self._left -= 8 * count
        self._cipher.update_into(_ZEROS[: 8 * count], self._words)
        return np.frombuffer(self._words, dtype=np.uint64, count=count)

    def _guard_fork(self) -> None:
        """Take a new key in a process that was forked from the one that drew the key."""
        if self._pid != os.getpid() and not self.seeded:
            self._rekey(os.urandom(32))

    def _rekey(self, key: bytes) -> None:
        self._pid = os.getpid()
        self._key, self._nonce = key, 0
        self._used = _BLOCK  # what is left in the block belongs to the former key
        self._next_stream()

    def _next_stream(self) -> None:
        # The 16 bytes are the block counter, which starts at 0, and the nonce of 12.
        nonce = bytes(4) + self._nonce.to_bytes(12, "little")
        self._cipher: CipherContext = Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor()
        self._nonce += 1
        self._left = _STREAM
