"""Which of a run's models is its result: early stopping, and averaging over rounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedtrain.experiment.base import Section, tag_defaults_to

if TYPE_CHECKING:
    from fedtrain.experiment.sections import Experiment

__all__ = ["AveragingSection", "EarlyStoppingSection", "EmaAveraging", "SwaAveraging", "objections"]


class EarlyStoppingSection(Section):
    """Ends a run that gets no better; the best model is the result (Prechelt 1998)."""

    metric: str = Field(default="loss", examples=["loss", "accuracy"])
    """What is watched."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether a better value is a larger or a smaller one; auto: by the metric's name, such as accuracy or loss."""
    on: Literal["central", "clients"] = "central"
    """Measured on the central test set, or as the mean over the clients' held-out examples."""
    patience: int = Field(default=10, ge=1)
    """Evaluations in a row without a better value, after which the run ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """A value counts as better if it is better than the best by more than this, in the metric's own unit."""


class EmaAveraging(Section):
    """Exponential moving average of the global model (Polyak & Juditsky 1992; Tarvainen & Valpola 2017)."""

    name: Literal["ema"]
    decay: float = Field(default=0.9, gt=0, lt=1)
    """Weight of the average so far in each round; that of the round's model is 1 - decay."""
    start_round: int = Field(default=1, ge=1)
    """First round that counts: its model is the first average. Before it there is none."""


class SwaAveraging(Section):
    """Plain mean of the global models of all rounds that count (stochastic weight averaging, Izmailov et al. 2018)."""

    name: Literal["swa"]
    start_round: int = Field(default=1, ge=1)
    """First round that counts. Before it there is no average."""


AveragingSection = Annotated[
    EmaAveraging | SwaAveraging,
    Field(discriminator="name"),
    tag_defaults_to("name", "ema"),
]


def objections(experiment: Experiment) -> Iterator[str]:
    """Say what early stopping, averaging and a plateau schedule cannot be combined with, one sentence each."""
    training, personalization = experiment.training, experiment.personalization
    if stopping := training.early_stopping:
        yield from _unmeasured(experiment, "training.early_stopping", stopping.on)
        if personalization.private:
            yield (
                "training.early_stopping restores the global model of an earlier round, and clients keep "
                "personalization.private of their last round only: the two do not fit together"
            )
        if personalization.fine_tune_epochs:
            yield (
                "personalization.fine_tune_epochs is for after the last round, and with training.early_stopping no "
                "client knows which one that is: leave out one of them"
            )
    if training.schedule.name == "plateau":
        yield from _unmeasured(experiment, "training.schedule", training.schedule.on)
    if (average := training.average) and average.start_round > experiment.rounds:
        yield (
            f"training.average.start_round = {average.start_round} is after the last of rounds = {experiment.rounds}: "
            "no round would count"
        )


def _unmeasured(experiment: Experiment, field: str, on: Literal["central", "clients"]) -> Iterator[str]:
    """Say so if what a section watches is never measured between rounds."""
    evaluation = experiment.evaluation
    watches = f'{field}.on = "{on}" watches'
    if on == "central":
        if not evaluation.central_every:
            yield f"{watches} the central evaluation, which evaluation.central_every = 0 leaves out between rounds"
        if experiment.personalization.private:
            yield f"{watches} the central evaluation, and personalization.private leaves the server no whole model"
        return
    if experiment.privacy:
        yield f'{watches} measurements on the clients\' examples, which privacy does not let out: watch "central"'
    elif not evaluation.clients_every:
        yield f"{watches} the clients' evaluation, which evaluation.clients_every = 0 leaves out between rounds"
    elif not evaluation.max_clients:
        yield f"{watches} the clients' evaluation, which evaluation.max_clients = 0 asks nobody for"
    elif not experiment.data.tests_clients:
        yield f"{watches} the clients' held-out examples, and there are none: set data.test"
