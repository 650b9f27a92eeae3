"""The learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch

from fedtrain.experiment.schedules import (
    ConstantSchedule,
    CosineRestartsSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    OneCycleSchedule,
    PlateauSchedule,
    ScheduleSection,
    StepSchedule,
    TriangularSchedule,
)

__all__ = ["factor_at", "lr_factor", "round_rate"]


def factor_at(section: ScheduleSection, position: float, rounds: int) -> float:
    """Factor of the learning rate at a place in the run.

    Args:
        section: the schedule; of plateau only its warm-up, for its falls depend on what the server measures.
        position: rounds done, from 0; a fraction lies within a round.
        rounds: rounds of the whole run.
    """
    warmup = section.warmup_rounds
    rise = min(1.0, (position + 1) / warmup) if warmup else 1.0
    return rise * _curve(section, max(0.0, position - warmup), max(1, rounds - warmup))


def lr_factor(section: ScheduleSection, round_number: int, rounds: int) -> float:
    """Factor of the learning rate as a round begins.

    Args:
        section: the schedule.
        round_number: from 1 to `rounds`.
        rounds: rounds of the whole run.
    """
    return factor_at(section, round_number - 1, rounds)


def round_rate(section: ScheduleSection, round_number: int, rounds: int) -> Callable[[float], float]:
    """Make the function from the share of a round's steps that are done, 0 to 1, to the factor of the learning rate.

    Args:
        section: the schedule.
        round_number: from 1 to `rounds`.
        rounds: rounds of the whole run.
    """
    if section.by == "step":
        return lambda share: factor_at(section, round_number - 1 + share, rounds)
    factor = lr_factor(section, round_number, rounds)
    return lambda _: factor


@singledispatch
def _curve(section: ScheduleSection, position: float, rounds: int) -> float:
    """Factor without the warm-up, which is over at position 0 and has taken its part of the rounds."""
    raise NotImplementedError(section)


@_curve.register(ConstantSchedule)
@_curve.register(PlateauSchedule)
def _(_section: ConstantSchedule | PlateauSchedule, _position: float, _rounds: int) -> float:
    return 1.0


@_curve.register
def _(section: StepSchedule, position: float, _rounds: int) -> float:
    return float(section.gamma ** (position // section.every))


@_curve.register
def _(section: ExponentialSchedule, position: float, _rounds: int) -> float:
    return float(section.gamma**position)


@_curve.register
def _(section: CosineSchedule, position: float, rounds: int) -> float:
    return _cosine(1.0, section.final_factor, position / rounds)


@_curve.register
def _(section: LinearSchedule, position: float, rounds: int) -> float:
    return 1 - (1 - section.final_factor) * position / rounds


@_curve.register
def _(section: TriangularSchedule, position: float, _rounds: int) -> float:
    cycle, place = divmod(position / section.period, 1)
    height = section.gamma**cycle * (1 - abs(2 * place - 1))
    return float(section.least_factor + (1 - section.least_factor) * height)


@_curve.register
def _(section: CosineRestartsSchedule, position: float, _rounds: int) -> float:
    period = section.period
    if section.multiplier == 1:
        return _cosine(1.0, section.final_factor, position % period / period)
    while position >= period:
        position, period = position - period, period * section.multiplier
    return _cosine(1.0, section.final_factor, position / period)


@_curve.register
def _(section: OneCycleSchedule, position: float, rounds: int) -> float:
    top = section.rise * rounds
    if position < top:
        return _cosine(section.start_factor, 1.0, position / top)
    return _cosine(1.0, section.final_factor, (position - top) / (rounds - top))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
