"""Krum and Multi-Krum: the updates that are nearest to their neighbours.

Both count each client once, whatever its number of examples: a weight is what a malicious client would lie about.

References:
    Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    NeurIPS 2017, section 4: s(i) = sum_{i -> j} |V_i - V_j|^2 over the n - f - 2 vectors V_j nearest to V_i, itself
    left out; Krum is the V_i with the least s(i), and Multi-Krum (section 5) the mean 1/m sum V_i of the m least.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedtrain.experiment.strategies import KrumStrategy, MultiKrumStrategy
from fedtrain.params import Params, RunningMean, add
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.strategies.robust import blocks, check_quorum
from fedtrain.wire import Update

__all__ = ["krum", "krum_scores", "multi_krum", "squared_distances"]


def krum(section: KrumStrategy) -> FederatedStrategy:
    """Build Krum; of equal scores, the first in client order wins.

    With n updates of d numbers it takes O(n^2 d) time and holds all n updates. It needs n >= 2f + 3; with f bad ones at
    most, the result is an update with a good one among its neighbours.
    """
    return FederatedStrategy(_mean_of_nearest("krum", section.byzantine, keep=1))


def multi_krum(section: MultiKrumStrategy) -> FederatedStrategy:
    """Build Multi-Krum; time, memory and quorum are Krum's, and it needs as many updates as it shall keep.

    flwr's MultiKrum weighs the kept updates by examples, sum_i n_i V_i / sum_i n_i: with equal n_i it is the same.
    """
    return FederatedStrategy(_mean_of_nearest("multi-krum", section.byzantine, section.keep))


def squared_distances(deltas: Sequence[Params]) -> Tensor:
    """Compute all |V_i - V_j|^2 in float64.

    Differences are squared, not expanded to |V_i|^2 + |V_j|^2 - 2 V_i V_j: equal updates have distance 0 exactly, and
    one huge update does not drown the distances among the others.

    Args:
        deltas: n updates, at least one.

    Returns:
        Shape [n, n], symmetric, zeros on the diagonal.
    """
    n = len(deltas)
    upper = torch.zeros(n * (n - 1) // 2, dtype=torch.float64)
    for name in deltas[0]:
        for block in blocks(deltas, name):
            upper += torch.pdist(block).square()
    i, j = torch.triu_indices(n, n, offset=1)
    distances = torch.zeros(n, n, dtype=torch.float64)
    distances[i, j] = distances[j, i] = upper
    return distances


def krum_scores(distances: Tensor, byzantine: int) -> list[float]:
    """Compute s(i).

    Args:
        distances: squared, shape [n, n].
        byzantine: f.
    """
    neighbours = max(1, len(distances) - byzantine - 2)
    nearest = distances.sort(dim=1).values[:, 1 : neighbours + 1]  # the first is the distance to itself, 0
    scores: list[float] = nearest.sum(dim=1).tolist()
    return scores


def _mean_of_nearest(strategy: str, byzantine: int, keep: int | None) -> Algorithm:
    def init(_params: Params) -> State:
        return {}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        deltas = [update.delta for update in updates]
        if not deltas:
            return params, state
        check_quorum(strategy, len(deltas), 2 * byzantine + 3, "2 byzantine + 3", "byzantine")
        check_quorum(strategy, len(deltas), keep or 1, "keep", "keep")
        scores = krum_scores(squared_distances(deltas), byzantine)
        best = sorted(range(len(deltas)), key=scores.__getitem__)[: keep or len(deltas) - byzantine]
        total = RunningMean(like=params)
        for position in sorted(best):
            total.add(deltas[position], 1)
        return add(params, total.mean()), state

    return Algorithm(init, apply, takes_buffers=True)
