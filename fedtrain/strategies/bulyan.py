"""Bulyan: Krum's selection, repeated, then the mean of the values nearest to the median, coordinate by coordinate.

It counts each client once, whatever its number of examples: a weight is what a malicious client would lie about.

References:
    El Mhamdi, Guerraoui, Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018,
    section 4. With theta = n - 2f and beta = theta - 2f: (1) move Krum's choice from the received to the selected
    until theta are selected; (2) G[i] = 1/beta sum X[i] over the beta selected X whose X[i] is nearest to the median.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedtrain.experiment.strategies import BulyanStrategy
from fedtrain.params import Params, add
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.strategies.krum import krum_scores, squared_distances
from fedtrain.strategies.robust import ascending, by_coordinate, check_quorum
from fedtrain.wire import Update

__all__ = ["bulyan"]


def bulyan(section: BulyanStrategy) -> FederatedStrategy:
    """Build Bulyan.

    With n updates of d numbers it takes O(n^2 d) time and holds all n updates. It needs n >= 4f + 3; with f bad ones at
    most, each coordinate is a mean of values near a median whose majority is good. Of equal scores, the one
    nearest to all is selected; of two values equally near to the median, the smaller one counts.

    flwr's Bulyan selects in a single pass, the theta least s(i) among all n. In the paper s(i) is computed again among
    those left, as Krum's sum over the r - f - 2 nearest of r: so it is here. When less than f + 3 are left, the single
    nearest counts.
    """
    byzantine = section.byzantine

    def select(distances: Tensor) -> list[int]:
        left = list(range(len(distances)))
        selected: list[int] = []
        while len(selected) < len(distances) - 2 * byzantine:
            among = distances[left][:, left]
            # Two that are nearest to each other have equal scores.
            scores = list(zip(krum_scores(among, byzantine), among.sum(dim=1).tolist()))
            selected.append(left.pop(scores.index(min(scores))))
        return selected

    def mean_around_median(block: Tensor) -> Tensor:
        ordered, theta = ascending(block), len(block)
        beta = theta - 2 * byzantine
        middle = (ordered[(theta - 1) // 2] + ordered[theta // 2]) / 2
        distance = (ordered - middle).abs()
        # The beta nearest are neighbours in order, so each window is judged by the farther one of its two ends.
        farthest = torch.maximum(distance[: theta - beta + 1], distance[beta - 1 :])
        first = farthest.min(dim=0).indices
        return ordered.gather(0, first + torch.arange(beta).unsqueeze(1)).mean(dim=0)

    def init(_params: Params) -> State:
        return {}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        deltas = [update.delta for update in updates]
        if not deltas:
            return params, state
        check_quorum("bulyan", len(deltas), 4 * byzantine + 3, "4 byzantine + 3", "byzantine")
        selected = [deltas[position] for position in select(squared_distances(deltas))]
        return add(params, by_coordinate(selected, params, mean_around_median)), state

    return FederatedStrategy(Algorithm(init, apply, takes_buffers=True))
