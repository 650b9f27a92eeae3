"""SCAFFOLD: control variates that take the drift out of local steps.

References:
    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    ICML 2020, algorithm 1 with option II. As there, every client of the round counts the same, whatever its number of
    examples: c is the mean of all N clients' c_i only if they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from fedtrain.experiment.strategies import ScaffoldStrategy
from fedtrain.params import Params, RunningMean, add, scaled, zeros_like
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.training.rules import LocalEnd, LocalRule, LocalStart, Tensors
from fedtrain.wire import Update

__all__ = ["scaffold"]


class _Round(NamedTuple):
    start: LocalStart
    own: Tensors  # c_i
    correction: Tensors  # c - c_i


def scaffold(section: ScaffoldStrategy, num_clients: int) -> FederatedStrategy:
    """Build SCAFFOLD.

    Args:
        section: the server's learning rate.
        num_clients: N, all registered clients, not those of a round.
    """
    return FederatedStrategy(_algorithm(section.server_lr, num_clients), _local_rule())


def _algorithm(server_lr: float, num_clients: int) -> Algorithm:
    def init(params: Params) -> State:
        return {"c": zeros_like(params)}

    def share(state: State) -> Params:
        control: Params = state["c"]
        return control

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        delta, delta_c = RunningMean(like=params), RunningMean(like=params)
        for update in updates:
            delta.add(update.delta, 1.0)
            delta_c.add(update.extra, 1.0)
        participation = delta.weight / num_clients  # |S| / N
        if not participation:
            return params, state
        new = add(params, scaled(delta.mean(), server_lr))
        return new, {"c": add(state["c"], scaled(delta_c.mean(), participation))}

    return Algorithm(init, apply, share=share, extra=zeros_like)


def _local_rule() -> LocalRule:
    def begin(start: LocalStart) -> _Round:
        kept = start.kept.get("c_i") or dict(zip(start.names, map(torch.zeros_like, start.values), strict=True))
        control, own = [start.shared[name] for name in start.names], [kept[name] for name in start.names]
        return _Round(start, own, correction=torch._foreach_sub(control, own))

    def correct_gradient(local: _Round, _trained: Tensors, gradients: Tensors) -> Tensors:
        return torch._foreach_add(gradients, local.correction)

    def finish(local: _Round, end: LocalEnd) -> tuple[Params, Mapping[str, Any]]:
        start = local.start
        # Option II: c_i+ = c_i - c + (x - y_i) / (K lr)
        new = torch._foreach_sub(start.values, end.values)
        torch._foreach_div_(new, end.steps * start.lr)
        torch._foreach_sub_(new, local.correction)
        delta_c = torch._foreach_sub(new, local.own)
        return dict(zip(start.names, delta_c, strict=True)), {"c_i": dict(zip(start.names, new, strict=True))}

    return LocalRule(begin, correct_gradient, finish)
