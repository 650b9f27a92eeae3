"""The learning rate over a run: the kinds of `[training] schedule`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtrain.experiment.base import Section, tag_defaults_to

__all__ = [
    "ConstantSchedule",
    "CosineRestartsSchedule",
    "CosineSchedule",
    "ExponentialSchedule",
    "LinearSchedule",
    "OneCycleSchedule",
    "PlateauSchedule",
    "ScheduleSection",
    "StepSchedule",
    "TriangularSchedule",
]

_Share = Annotated[float, Field(gt=0, le=1)]
_Final = Annotated[float, Field(ge=0, le=1)]


class _Schedule(Section):
    name: str  # declared here so that it is the first key of every kind
    by: Literal["round", "step"] = "round"
    """round: one rate for all steps of a round; step: the same curve, read at each local step between two rounds."""
    warmup_rounds: int = Field(default=0, ge=0)
    """Rounds over which the rate first rises linearly to where the schedule then begins."""


class ConstantSchedule(_Schedule):
    """The same rate all along, but for a warm-up."""

    name: Literal["constant"] = "constant"


class StepSchedule(_Schedule):
    """The rate falls by a factor after every so many rounds."""

    name: Literal["step"]
    every: int = Field(ge=1, examples=[30])
    """Rounds from one fall to the next."""
    gamma: _Share = 0.1
    """Factor of each fall."""


class ExponentialSchedule(_Schedule):
    """The rate falls by a factor in each round."""

    name: Literal["exponential"]
    gamma: _Share = 0.98
    """Factor of each round."""


class CosineSchedule(_Schedule):
    """The rate falls along half a cosine (Loshchilov & Hutter 2017)."""

    name: Literal["cosine"]
    final_factor: _Final = 0.0
    """Factor that the schedule would reach one round after the last; the last round is still above it."""


class LinearSchedule(_Schedule):
    """The rate falls along a line."""

    name: Literal["linear"]
    final_factor: _Final = 0.0
    """Factor that the schedule would reach one round after the last; the last round is still above it."""


class TriangularSchedule(_Schedule):
    """The rate rises and falls along lines, again and again (Smith 2017)."""

    name: Literal["triangular"]
    period: float = Field(ge=0.1, examples=[10.0])
    """Rounds of a cycle, half of them rising."""
    least_factor: _Share = 0.1
    """Factor from which each cycle rises, and to which it falls."""
    gamma: _Share = 1.0
    """Factor of the height of each cycle beside the one before; 0.5 is Smith's triangular2."""


class CosineRestartsSchedule(_Schedule):
    """The rate falls along half a cosine and jumps back, again and again (SGDR, Loshchilov & Hutter 2017)."""

    name: Literal["cosine-restarts"]
    period: int = Field(ge=1, examples=[10])
    """Rounds until the first restart."""
    multiplier: int = Field(default=1, ge=1)
    """How many times longer each period is than the one before."""
    final_factor: _Final = 0.0
    """Factor that each period would reach at its end."""


class OneCycleSchedule(_Schedule):
    """The rate rises once and then falls far, along half cosines (Smith & Topin 2018)."""

    name: Literal["one-cycle"]
    rise: float = Field(default=0.3, gt=0, lt=1)
    """Share of the rounds in which the rate rises to its full value."""
    start_factor: _Share = 0.04
    """Factor from which it rises."""
    final_factor: _Final = 0.0
    """Factor that the schedule would reach one round after the last; the last round is still above it."""


class PlateauSchedule(_Schedule):
    """The rate falls when the model gets no better, as the server measures it."""

    name: Literal["plateau"]
    patience: int = Field(default=10, ge=1)
    """Evaluations without a better value, after which the rate falls."""
    gamma: float = Field(default=0.1, gt=0, lt=1)
    """Factor of each fall."""
    least_factor: float = Field(default=0.0, ge=0, lt=1)
    """The factor never falls below this."""
    metric: str = Field(default="loss", examples=["loss", "accuracy"])
    """What is watched."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether a better value is a larger or a smaller one; auto: by the metric's name, such as accuracy or loss."""
    on: Literal["central", "clients"] = "central"
    """Measured on the central test set, or as the mean over the clients' held-out examples."""


ScheduleSection = Annotated[
    ConstantSchedule
    | StepSchedule
    | ExponentialSchedule
    | CosineSchedule
    | LinearSchedule
    | TriangularSchedule
    | CosineRestartsSchedule
    | OneCycleSchedule
    | PlateauSchedule,
    Field(discriminator="name"),
    tag_defaults_to("name", "constant"),
]
