"""Geometric median (RFA): the point with the least weighted sum of distances to the updates.

References:
    Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing
    2022, algorithm 2, the smoothed Weiszfeld algorithm: beta_k = alpha_k / max(nu, |v - w_k|),
    v <- sum_k beta_k w_k / sum_k beta_k, with alpha_k = n_k / sum_j n_j, to minimise sum_k alpha_k |v - w_k|.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedtrain.experiment.strategies import GeometricMedianStrategy
from fedtrain.params import Params, add
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.strategies.robust import blocks, by_coordinate
from fedtrain.wire import Update

__all__ = ["geometric_median"]

_LEAST_GAIN = 1e-6  # a step that lowers the sum of distances by a smaller share is the last


def geometric_median(section: GeometricMedianStrategy) -> FederatedStrategy:
    """Build RFA.

    With n updates of d numbers it takes O(n d) time per step and holds all n updates. Any number of updates will do; it
    holds as long as the good ones have the majority of the examples. It starts from delta 0, the model as it was sent:
    where a mean would start, one huge update could take it farther than the steps lead back.
    """

    def weiszfeld(deltas: list[Params], num_examples: list[int]) -> torch.Tensor:
        alpha = torch.tensor(num_examples, dtype=torch.float64) / sum(num_examples)
        shares = torch.zeros_like(alpha)  # v = sum_k shares_k w_k: v itself is never stored
        least = torch.inf
        for _ in range(section.iterations):
            squared = torch.zeros_like(alpha)
            for name in deltas[0]:
                for block in blocks(deltas, name):
                    squared += (block - shares @ block).square_().sum(dim=1)
            distances = squared.sqrt()
            objective = float(alpha @ distances)
            if least - objective <= _LEAST_GAIN * objective:
                break
            least = objective
            beta = alpha / distances.clamp(min=section.smoothing)
            shares = beta / beta.sum()
        return shares

    def init(_params: Params) -> State:
        return {}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        held = [(update.delta, update.num_examples) for update in updates]
        if not held:
            return params, state
        deltas = [delta for delta, _ in held]
        shares = weiszfeld(deltas, [count for _, count in held])
        return add(params, by_coordinate(deltas, params, lambda block: shares @ block)), state

    return FederatedStrategy(Algorithm(init, apply, takes_buffers=True))
