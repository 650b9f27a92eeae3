"""Measures of how unlike clients are, and of how two of their figures go together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["gini", "jensen_shannon", "rank_correlation"]


def gini(values: Sequence[float] | npt.NDArray[np.int64]) -> float:
    """Measure how unequal shares are, by the Gini coefficient: 0 if all are equal, towards 1 if one has everything.

    Args:
        values: not negative; 0 where their sum is 0.
    """
    total, n = float(np.sum(values)), len(values)
    if not total:
        return 0.0
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return float(ranks @ np.sort(values) / (n * total))


def jensen_shannon(counts: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Measure how far each client's label mix is from that of all together.

    Args:
        counts: `(clients, labels)` examples.

    Returns:
        `(clients,)` Jensen-Shannon divergences in bits, 0 to 1; NaN for a client without examples.

    References:
        Lin: Divergence Measures Based on the Shannon Entropy. IEEE Transactions on Information Theory 37, 1991.
    """
    sizes = counts.sum(axis=1, keepdims=True)
    pooled = counts.sum(axis=0) / max(counts.sum(), 1)
    own = counts / np.where(sizes > 0, sizes, math.nan)
    bits = _entropy((own + pooled) / 2) - _entropy(own) / 2 - _entropy(pooled) / 2
    distances: npt.NDArray[np.float64] = bits.clip(0, 1)
    return distances


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Take Spearman's rank correlation; equal values share the mean of their ranks.

    Args:
        first: finite values.
        second: as many.

    Returns:
        -1 to 1; NaN where one of them has no two different values.
    """
    ranks = np.array([_ranks(np.asarray(first)), _ranks(np.asarray(second))])
    ranks -= ranks.mean(axis=1, keepdims=True)
    lengths = np.sqrt((ranks**2).sum(axis=1))
    return float(ranks[0] @ ranks[1] / lengths.prod()) if lengths.all() else math.nan


def _entropy(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Shannon entropy along the last axis, in bits."""
    bits: npt.NDArray[np.float64] = -(p * np.log2(np.where(p > 0, p, 1))).sum(axis=-1)
    return bits


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, place, often = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(often)
    ranks: npt.NDArray[np.float64] = (last - (often - 1) / 2)[place]
    return ranks
