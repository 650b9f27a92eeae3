"""FedDyn: a regulariser on each client that moves with it, so that local optima agree with the global one.

References:
    Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, "Federated Learning Based on Dynamic Regularization",
    ICLR 2021, algorithm 1. Client k of the round's set P approximately minimises
    L_k(w) - <lambda_k, w> + alpha/2 |w - w_t|^2, where lambda_k stands for the gradient of L_k where it stopped last,
    then lambda_k -= alpha (w_k - w_t). The server: h -= alpha/m sum_P (w_k - w_t), and w_{t+1} = mean_P w_k - h/alpha,
    with m all clients. As there, every client counts the same, whatever its number of examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from fedtrain.experiment.strategies import FedDynStrategy
from fedtrain.params import Params, RunningMean, add, scaled, zeros_like
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.strategies.fedprox import pulled
from fedtrain.training.rules import LocalEnd, LocalRule, LocalStart, Tensors
from fedtrain.wire import Update

__all__ = ["feddyn"]


class _Round(NamedTuple):
    start: LocalStart
    dual: Tensors  # lambda_k
    offset: Tensors  # alpha w_t + lambda_k


def feddyn(section: FedDynStrategy, num_clients: int) -> FederatedStrategy:
    """Build FedDyn.

    Args:
        section: the strength of the regulariser.
        num_clients: m, all registered clients, not those of a round.
    """
    return FederatedStrategy(_algorithm(section.alpha, num_clients), _local_rule(section.alpha))


def _algorithm(alpha: float, num_clients: int) -> Algorithm:
    def init(params: Params) -> State:
        return {"h": zeros_like(params)}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        total = RunningMean(like=params)
        for update in updates:
            total.add(update.delta, 1.0)
        participation = total.weight / num_clients  # |P| / m
        if not participation:
            return params, state
        delta = total.mean()
        h = add(state["h"], scaled(delta, -alpha * participation))
        return add(add(params, delta), scaled(h, -1 / alpha)), {"h": h}

    return Algorithm(init, apply)


def _local_rule(alpha: float) -> LocalRule:
    def begin(start: LocalStart) -> _Round:
        kept = start.kept.get("lambda") or dict(zip(start.names, map(torch.zeros_like, start.values), strict=True))
        dual = [kept[name] for name in start.names]
        return _Round(start, dual, offset=torch._foreach_add(dual, start.values, alpha=alpha))

    def correct_gradient(local: _Round, trained: Tensors, gradients: Tensors) -> Tensors:
        # g - lambda + alpha (w - w_t)
        return pulled(gradients, trained, alpha, local.offset)

    def finish(local: _Round, end: LocalEnd) -> tuple[Params, Mapping[str, Any]]:
        start = local.start
        # lambda - alpha (w_k - w_t)
        dual = torch._foreach_sub(local.dual, torch._foreach_sub(end.values, start.values), alpha=alpha)
        return {}, {"lambda": dict(zip(start.names, dual, strict=True))}

    return LocalRule(begin, correct_gradient, finish)
