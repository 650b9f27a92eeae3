"""FedBuff: clients train without waiting for each other, and the server steps whenever its buffer is full.

References:
    Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, "Federated Learning with Buffered Asynchronous Aggregation",
    AISTATS 2022, algorithm 1: w^{t+1} = w^t + eta_g / K * sum of s(tau_i) Delta_i over the K updates of the buffer (our
    Delta_i is client minus server), with s(tau) = (1 + tau)^-a for an update that starts from a model tau steps old.
    The sum is divided by K and not by the weights: a buffer of stale updates makes a shorter step. The number of
    examples does not count.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedtrain.experiment.strategies import FedBuffStrategy
from fedtrain.params import Params, RunningMean, add, scaled
from fedtrain.strategies.base import Algorithm, Asynchrony, FederatedStrategy, State
from fedtrain.wire import Update

__all__ = ["fedbuff"]


def fedbuff(section: FedBuffStrategy) -> FederatedStrategy:
    """Build FedBuff: the server knows its round, and clients train plainly.

    An update's `round_number` is the round whose model it started from.
    """

    def init(_params: Params) -> State:
        return {"round_number": 1}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        round_number = state["round_number"]
        newest = round_number
        total = RunningMean(like=params)
        count = 0  # K, less what the gate refused
        for update in updates:
            # A round without updates has left the state behind: what started later than it knows of is not stale.
            staleness = max(0, round_number - update.round_number)
            newest = max(newest, update.round_number)
            total.add(update.delta, (1 + staleness) ** -section.staleness_exponent)
            count += 1
        if not count:
            return params, state
        step = scaled(total.mean(), section.server_lr * total.weight / count)
        return add(params, step), {"round_number": newest + 1}

    return FederatedStrategy(Algorithm(init, apply), asynchrony=Asynchrony(section.buffer_size, section.max_in_flight))
