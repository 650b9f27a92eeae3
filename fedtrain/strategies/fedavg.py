"""FedAvg: the mean of the clients' updates, weighted by their number of examples.

References:
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017, algorithm 1: w_{t+1} = sum_k (n_k / m_t) w^k_{t+1}, with m_t the examples of
    the clients of the round. Written on deltas, w_{t+1} = w_t + sum_k (n_k / m_t) delta_k, it is the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedtrain.params import Params, RunningMean, add
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.wire import Update

__all__ = ["fedavg"]


def fedavg() -> FederatedStrategy:
    """Build FedAvg: no state on the server, plain training on the clients."""

    def init(_params: Params) -> State:
        return {}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        total = RunningMean(like=params)
        for update in updates:
            total.add(update.delta, update.num_examples)
            del update  # else it would lie beside the next one
        return (add(params, total.mean()) if total.weight else params), state

    return FederatedStrategy(Algorithm(init, apply, takes_buffers=True))
