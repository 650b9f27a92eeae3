"""FedNova: updates normalised by the local steps behind them, so that who steps more does not count more.

References:
    Wang, Liu, Liang, Joshi, Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", NeurIPS 2020. With delta_i = -lr G_i a_i, where the columns of G_i are the gradients of client i and
    a_i says how often each enters the sum of its steps:
    d_i = delta_i / |a_i|_1 and w_{t+1} = w_t + tau_eff sum_i p_i d_i, with tau_eff = sum_i p_i |a_i|_1 and p_i the
    client's part of the round's examples. Weight decay belongs to the gradient, as the penalty does to the objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedtrain.experiment.optimizers import SgdSection
from fedtrain.experiment.training import TrainingSection
from fedtrain.params import Params, RunningMean, add, scaled
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.training.rules import LocalEnd, LocalRule
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
    def init(_params: Params) -> State:
        return {}

    def extra(_params: Params) -> Params:
        return {"normalizer": torch.ones((), dtype=torch.float64)}

    def objection(update: Update) -> str | None:
        # A gradient enters at most 1 + momentum + momentum^2 + ... times; who has little time takes fewer steps.
        most = training.steps_for(update.num_examples) / (1 - momentum)
        normalizer = float(update.extra["normalizer"])
        return None if 1 <= normalizer <= most else f"normalizer: got {normalizer:g}; expected 1 to {most:g}"

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        total = RunningMean(like=params)
        examples = weighted_normalizers = 0.0
        for update in updates:
            normalizer = float(update.extra["normalizer"])
            total.add(update.delta, update.num_examples / normalizer)
            examples += update.num_examples
            weighted_normalizers += update.num_examples * normalizer
        if not examples:
            return params, state
        tau_eff = weighted_normalizers / examples
        # The mean divides by sum_i n_i / |a_i|_1, and sum_i p_i d_i by the examples.
        return add(params, scaled(total.mean(), tau_eff * total.weight / examples)), state

    return Algorithm(init, apply, extra=extra, objection=objection)


def _local_rule(sgd: SgdSection) -> LocalRule:
    def finish(_local: None, end: LocalEnd) -> tuple[Params, Mapping[str, Any]]:
        return {"normalizer": torch.tensor(_normalizer(sgd, end.steps), dtype=torch.float64)}, {}

    return LocalRule(lambda _start: None, finish=finish)


def _normalizer(sgd: SgdSection, steps: int) -> float:
    """|a_i|_1: how far the optimiser goes along a constant gradient of 1 at a learning rate of 1."""
    distance = buffer = 0.0
    for _ in range(steps):
        buffer = sgd.momentum * buffer + 1
        distance += 1 + sgd.momentum * buffer if sgd.nesterov else buffer
    return distance
