"""Client drift: how far the updates of a round point in different directions."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedtrain.params import Params
from fedtrain.seeds import generator

__all__ = ["Drift", "Sketcher"]

_WIDTH = 4096  # numbers of a sketch: cosines are right to about 1 / sqrt(width) = .016


class Sketcher:
    """Projects updates so that inner products are kept: every entry has a random sign, and every 4096th is added up.

    A sketch is linear, so the sketch of a mean is the mean of the sketches, and no update has to be kept. Norms are
    those of the sketches too, so that an update has a cosine of 1 with itself; they are as exact as cosines are, but
    for updates of a few entries, which may fall together.

    Args:
        like: names and shapes of what counts: trained tensors, no buffers.

    References:
        Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams", ICALP 2002 (the count sketch).
    """

    def __init__(self, like: Params) -> None:
        rng = generator(0, "sketch")  # the same in every run: it decides nothing
        self._signs = {name: torch.from_numpy(_signs(rng, t.numel())) for name, t in like.items()}

    def sketch(self, update: Params) -> Tensor:
        """Project an update to 4096 numbers in float64."""
        total = torch.zeros(_WIDTH, dtype=torch.float64)
        for name, signs in self._signs.items():
            signed = update[name].reshape(-1).float() * signs
            whole = len(signed) // _WIDTH * _WIDTH
            total += signed[:whole].view(-1, _WIDTH).sum(0)
            total[: len(signed) - whole] += signed[whole:]
        return total


class Drift:
    """What a round's updates look like beside each other.

    Args:
        sketcher: of the run.
    """

    def __init__(self, sketcher: Sketcher) -> None:
        self._sketcher = sketcher
        self._seen: list[tuple[str, Tensor, float]] = []  # client, sketch, its norm

    def add(self, client: str, update: Params) -> None:
        """Take in an update that was used; tensors that do not count may be with it."""
        one = self._sketcher.sketch(update)
        self._seen.append((client, one, float(one.norm())))

    def clients(self) -> dict[str, tuple[float, float]]:
        """Client -> cosine between its update and the mean, and its norm over that of the mean; the last update counts.

        Nothing if the mean vanishes.
        """
        mean, length = self._mean()
        if not length:
            return {}
        return {
            client: (max(-1.0, min(1.0, float(one @ mean) / (norm * length))), norm / length)
            for client, one, norm in self._seen
            if norm
        }

    def diversity(self) -> float | None:
        """Gradient diversity, sum of squared norms over the squared norm of the sum; None if the sum vanishes.

        References:
            Yin et al., "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning", AISTATS 2018, eq. 1.
        """
        _, length = self._mean()
        if not length:
            return None
        return sum(norm**2 for _, _, norm in self._seen) / (len(self._seen) * length) ** 2

    def _mean(self) -> tuple[Tensor, float]:
        if not self._seen:
            return torch.zeros(_WIDTH, dtype=torch.float64), 0.0
        mean = torch.stack([one for _, one, _ in self._seen]).mean(0)
        length = float(mean.norm())
        return mean, length if math.isfinite(length) else 0.0


def _signs(rng: np.random.Generator, count: int) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
    return (2 * rng.integers(0, 2, count, dtype=np.int8) - 1).astype(np.int8)
