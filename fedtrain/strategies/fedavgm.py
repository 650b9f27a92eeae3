"""FedAvgM: FedAvg with momentum on the server.

References:
    Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
    arXiv:1909.06335, 2019, FedAvgM: v <- beta v + Delta w, w <- w - v, with Delta w the server's weights minus the
    clients' mean. With our deltas (client minus server) both signs turn; a learning rate of the server scales v.
"""

from __future__ import annotations

from fedtrain.experiment.strategies import FedAvgMStrategy
from fedtrain.params import Params, add, scaled, zeros_like
from fedtrain.strategies.base import FederatedStrategy, State
from fedtrain.strategies.fedopt import server_optimizer

__all__ = ["fedavgm"]


def fedavgm(section: FedAvgMStrategy) -> FederatedStrategy:
    """Build FedAvgM: a velocity on the server, plain training on the clients."""

    def init(params: Params) -> State:
        return {"v": zeros_like(params)}

    def step(state: State, params: Params, delta: Params) -> tuple[Params, State]:
        v = add(scaled(state["v"], section.momentum), delta)
        return add(params, scaled(v, section.server_lr)), {"v": v}

    return server_optimizer(init, step)
