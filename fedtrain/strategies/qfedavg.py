"""q-FedAvg: clients with a higher loss weigh more, so that accuracies become more even.

References:
    Li, Sanjabi, Beirami, Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020, algorithm 2, with F_k the
    loss of the server's model w on client k, and L = 1 / lr in place of the Lipschitz constant, with the lr that a
    schedule starts from:
        Delta w_k = L (w - w_k),    Delta_k = F_k^q Delta w_k
        h_k = q F_k^(q-1) ||Delta w_k||^2 + L F_k^q
        w <- w - sum_k Delta_k / sum_k h_k
    For q < 1 a loss of 0 has no F_k^(q-1): as in the authors' code, 1e-10 is added to each. The h_k of a client that
    moves without a loss is so large that the round makes next to no step. The number of examples does not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedtrain.experiment.strategies import QFedAvgStrategy
from fedtrain.params import Params, RunningMean, add, l2_norm, scaled
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.training.rules import LocalEnd, LocalRule, LocalStart
from fedtrain.wire import Update

__all__ = ["qfedavg"]

_EPSILON = 1e-10
_LARGEST = 1e100  # F^q up to which the sums over clients stay finite


def qfedavg(section: QFedAvgStrategy, lr: float) -> FederatedStrategy:
    """Build q-FedAvg.

    Args:
        section: holds q.
        lr: learning rate of local training.
    """
    q, lipschitz = section.q, 1 / lr

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        total = RunningMean(like=params)
        h = 0.0
        for update in updates:
            loss = float(update.extra["loss"]) + _EPSILON
            total.add(update.delta, lipschitz * loss**q)  # -Delta_k, for our delta is w_k - w
            h += q * loss ** (q - 1) * (lipschitz * l2_norm(update.delta)) ** 2 + lipschitz * loss**q
        if h == 0:  # no update; or each F_k^q is too small for a float, and nothing is left to learn
            return params, state
        return add(params, scaled(total.mean(), total.weight / h)), state

    def objection(update: Update) -> str | None:
        loss = float(update.extra["loss"])
        if not 0 <= loss < math.inf:
            return f"its loss is {loss}; expected 0 or more"
        if q * math.log(loss + _EPSILON) > math.log(_LARGEST):
            return f"its loss is {loss}, which to the power q = {q} is too large to count with"
        return None

    def finish(loss: float, _end: LocalEnd) -> tuple[Params, Mapping[str, Any]]:
        return {"loss": torch.tensor(loss, dtype=torch.float64)}, {}

    def begin(start: LocalStart) -> float:
        return start.mean_loss()

    algorithm = Algorithm(
        init=lambda _params: {},
        apply=apply,
        extra=lambda _params: {"loss": torch.zeros((), dtype=torch.float64)},
        objection=objection,
    )
    return FederatedStrategy(algorithm, LocalRule(begin, finish=finish))
