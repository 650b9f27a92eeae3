"""FedOpt: the server's optimiser takes a step along the mean update; FedAdagrad, FedAdam, FedYogi and torch.optim's.

References:
    Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, "Adaptive Federated Optimization", ICLR 2021.
    Algorithm 2, with Delta_t the mean of the deltas, here weighted by examples as in FedAvg:
        m_t = beta_1 m_{t-1} + (1 - beta_1) Delta_t
        v_t = v_{t-1} + Delta_t^2                                            FedAdagrad, beta_1 = 0
        v_t = v_{t-1} - (1 - beta_2) Delta_t^2 sign(v_{t-1} - Delta_t^2)     FedYogi
        v_t = beta_2 v_{t-1} + (1 - beta_2) Delta_t^2                        FedAdam
        x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau)
    v_{-1} = tau^2, and the bias of neither moment is corrected. (flwr starts v at 0, and corrects FedAdam's learning
    rate.) Algorithm 1, FedOpt, leaves the optimiser open and takes -Delta_t for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fedtrain.errors import InputError, nearest
from fedtrain.experiment.strategies import (
    FedAdagradStrategy,
    FedAdamStrategy,
    FedOptStrategy,
    FedYogiStrategy,
)
from fedtrain.params import Params, RunningMean, zeros_like
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.training.optimizer import refuse_unknown_options, torch_optimizers
from fedtrain.wire import Update

__all__ = ["fedadagrad", "fedadam", "fedopt", "fedyogi", "server_optimizer"]


def server_optimizer(
    init: Callable[[Params], State], step: Callable[[State, Params, Params], tuple[Params, State]]
) -> FederatedStrategy:
    """Build a strategy that steps along the mean update, weighted by examples.

    Args:
        init: as `Algorithm.init`.
        step: (state, parameters, mean delta) -> (next parameters, next state).
    """

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        total = RunningMean(like=params)
        for update in updates:
            total.add(update.delta, update.num_examples)
        return step(state, params, total.mean()) if total.weight else (params, state)

    return FederatedStrategy(Algorithm(init, apply))


def fedadagrad(section: FedAdagradStrategy) -> FederatedStrategy:
    """Build FedAdagrad: coordinates that have moved far take smaller steps."""
    return _adaptive(section.server_lr, 0.0, section.tau, lambda v, square: v + square)


def fedadam(section: FedAdamStrategy) -> FederatedStrategy:
    """Build FedAdam: coordinates that have moved far of late take smaller steps."""
    beta1, beta2 = section.betas
    return _adaptive(section.server_lr, beta1, section.tau, lambda v, square: beta2 * v + (1 - beta2) * square)


def fedyogi(section: FedYogiStrategy) -> FederatedStrategy:
    """Build FedYogi: as FedAdam, but the second moment forgets at a bounded rate."""
    beta1, beta2 = section.betas
    return _adaptive(
        section.server_lr, beta1, section.tau, lambda v, square: v - (1 - beta2) * square * torch.sign(v - square)
    )


def fedopt(section: FedOptStrategy) -> FederatedStrategy:
    """Build FedOpt with an optimiser of torch.optim.

    Its `init` tries one step of zeros on the parameters, so that bad options do not wait for the first round's updates.

    Raises:
        InputError: torch.optim has no such optimiser, or it has no such option.
    """
    kind = _optimizer(section)

    def step(state: State, params: Params, delta: Params) -> tuple[Params, State]:
        values = {name: t.clone() for name, t in params.items()}
        # Some optimisers divide by the number of entries.
        optimizer = kind([t for t in values.values() if t.numel()], **section.options)
        for name, t in values.items():
            t.grad = -delta[name]
            optimizer.state[t] = {key: value.clone() for key, value in state[name].items()}
        optimizer.step()
        for t in values.values():
            t.grad = None
        return values, {name: dict(optimizer.state[t]) for name, t in values.items()}

    def init(params: Params) -> State:
        state: State = {name: {} for name in params}
        try:
            step(state, params, zeros_like(params))
        except Exception as error:  # torch has no common class for what it finds wrong
            raise InputError(
                f"torch.optim.{section.optimizer} cannot train this model with strategy.options",
                got=section.options,
                hint=f"torch says: {error}",
            ) from error
        return state

    return server_optimizer(init, step)


def _adaptive(
    server_lr: float, beta1: float, tau: float, second_moment: Callable[[Tensor, Tensor], Tensor]
) -> FederatedStrategy:
    """Algorithm 2; `second_moment` takes v_{t-1} and Delta_t^2 to v_t. Without beta_1, m_t is Delta_t: no state."""

    def init(params: Params) -> State:
        v = {name: torch.full_like(t, tau**2) for name, t in params.items()}
        return {"m": zeros_like(params), "v": v} if beta1 else {"v": v}

    def step(state: State, params: Params, delta: Params) -> tuple[Params, State]:
        m = {name: beta1 * state["m"][name] + (1 - beta1) * d for name, d in delta.items()} if beta1 else delta
        v = {name: second_moment(state["v"][name], d.square()) for name, d in delta.items()}
        new = {name: t + server_lr * m[name] / (v[name].sqrt() + tau) for name, t in params.items()}
        return new, {"m": m, "v": v} if beta1 else {"v": v}

    return server_optimizer(init, step)


def _optimizer(section: FedOptStrategy) -> type[torch.optim.Optimizer]:
    """Find the class, and refuse options that it does not take."""
    known = torch_optimizers()
    if section.optimizer not in known:
        raise InputError(
            "strategy.optimizer: torch.optim has no such optimizer",
            got=section.optimizer,
            expected=f"one of {', '.join(sorted(known))}",
            hint=nearest(section.optimizer, known, otherwise=""),
        )
    kind = known[section.optimizer]
    refuse_unknown_options(kind, section.options, "strategy")
    return kind
