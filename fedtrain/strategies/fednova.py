"""FedNova: updates normalised by the local steps behind them, so that who steps more does not count more.

References:
    Wang, Liu, Liang, Joshi, Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", NeurIPS 2020. With delta_i = -lr G_i a_i, where the columns of G_i are the gradients of client i and
    a_i says how often each enters the sum of its steps:
    d_i = delta_i / |a_i|_1 and w_{t+1} = w_t + tau_eff sum_i p_i d_i, with tau_eff = sum_i p_i |a_i|_1 and p_i the
    client's part of the round's examples. Weight decay belongs to the gradient, as the penalty does to the objective.

    The paper has no buffers. They are no sum of steps, so their |a_i|_1 is 1: they are averaged as in FedAvg. To that
    end each tensor has its own |a_i|_1, and clients are told the names of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedtrain.errors import shorten
from fedtrain.experiment.sections import SgdSection, TrainingSection
from fedtrain.params import Params, RunningSum, add
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.training.rules import LocalEnd, LocalRule, LocalStart
from fedtrain.wire import Update

__all__ = ["fednova"]


def fednova(training: TrainingSection) -> FederatedStrategy:
    """Build FedNova.

    Args:
        training: local training with SGD; its momentum shapes a_i.
    """
    sgd = training.optimizer
    assert isinstance(sgd, SgdSection), "the experiment's checks ask for SGD"
    return FederatedStrategy(_algorithm(training, sgd.momentum), _local_rule(sgd))


def _algorithm(training: TrainingSection, momentum: float) -> Algorithm:
    def init(params: Params) -> State:
        return {"ones": _ones(params)}

    def share(state: State) -> Params:
        ones: Params = state["ones"]
        return ones

    def objection(update: Update) -> str | None:
        passes = -(-update.num_examples // training.batch_size)
        steps = training.local_steps or passes * (training.local_epochs or 1)
        most = steps / (1 - momentum)  # a gradient enters at most 1 + momentum + momentum^2 + ... times
        for name, normalizer in update.extra.items():
            if not 1 <= normalizer <= most:
                return f"normalizer of {shorten(name)}: got {float(normalizer):g}; expected 1 to {most:g}"
        return None

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        total_d, total_a = RunningSum(like=params), RunningSum(like=_ones(params))
        for update in updates:
            total_d.add({name: t / update.extra[name] for name, t in update.delta.items()}, update.num_examples)
            total_a.add(update.extra, update.num_examples)
        if not total_d.weight:
            return params, state
        d, tau_eff = total_d.mean(), total_a.mean()
        return add(params, {name: tau_eff[name] * t for name, t in d.items()}), state

    return Algorithm(init, apply, share=share, extra=_ones, objection=objection)


def _local_rule(sgd: SgdSection) -> LocalRule:
    def begin(start: LocalStart) -> LocalStart:
        return start

    def finish(start: LocalStart, end: LocalEnd) -> tuple[Params, Mapping[str, Any]]:
        normalizer = torch.tensor(_normalizer(sgd, end.steps), dtype=torch.float64)
        return {**start.shared, **dict.fromkeys(start.names, normalizer)}, {}

    return LocalRule(begin, finish=finish)


def _normalizer(sgd: SgdSection, steps: int) -> float:
    """|a_i|_1: how far the optimiser goes along a constant gradient of 1 at a learning rate of 1."""
    distance = buffer = 0.0
    for _ in range(steps):
        buffer = sgd.momentum * buffer + 1
        distance += 1 + sgd.momentum * buffer if sgd.nesterov else buffer
    return distance


def _ones(params: Params) -> dict[str, torch.Tensor]:
    return {name: torch.ones((), dtype=torch.float64) for name in params}
