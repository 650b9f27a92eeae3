"""Local optimisers and the learning-rate schedule over rounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedtrain.experiment.sections import AdamSection, ScheduleSection, SgdSection
from fedtrain.training.rules import Tensors

__all__ = ["Step", "lr_factor", "make_step"]

Step = Callable[[Tensors], None]
"""Takes the gradients, one per parameter, and changes the parameters in place."""


def make_step(section: SgdSection | AdamSection, params: list[Tensor], factor: float) -> Step:
    """Start a local optimiser with fresh state.

    Args:
        section: which optimiser, with its numbers.
        params: leaf tensors to change, in the order in which gradients will come.
        factor: factor of the learning rate in this round.
    """
    if isinstance(section, SgdSection):
        return _sgd(section, params, section.lr * factor)
    kind = torch.optim.Adam if section.name == "adam" else torch.optim.AdamW
    optimizer = kind(
        params, lr=section.lr * factor, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay
    )

    def step(gradients: Tensors) -> None:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step()
        optimizer.zero_grad()  # the next client has an optimiser of its own

    return step


def lr_factor(section: ScheduleSection, round_number: int, rounds: int) -> float:
    """Factor of the learning rate in a round.

    Args:
        section: the schedule.
        round_number: from 1 to `rounds`.
        rounds: rounds of the whole run.
    """
    if round_number <= section.warmup_rounds:
        return round_number / section.warmup_rounds
    if section.name == "constant":
        return 1.0
    progress = (round_number - section.warmup_rounds - 1) / (rounds - section.warmup_rounds)
    return section.final_factor + (1 - section.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def _sgd(section: SgdSection, params: list[Tensor], lr: float) -> Step:
    """The same arithmetic as torch.optim.SGD, without its bookkeeping: that costs a quarter of a small model's step."""
    momentum, weight_decay = section.momentum, section.weight_decay
    buffers = [torch.zeros_like(p) for p in params] if momentum else []

    @torch.no_grad()
    def step(gradients: Tensors) -> None:
        if weight_decay:
            gradients = torch._foreach_add(gradients, params, alpha=weight_decay)
        if momentum:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            gradients = torch._foreach_add(gradients, buffers, alpha=momentum) if section.nesterov else buffers
        torch._foreach_add_(params, gradients, alpha=-lr)

    return step
