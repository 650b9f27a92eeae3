"""What a run's own measurements decide: which model is its result, when it ends, and the learning rate on a plateau."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedtrain.errors import InputError, nearest, shorten
from fedtrain.experiment.evaluation import direction_is_known, higher_is_better
from fedtrain.experiment.schedules import PlateauSchedule
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.stopping import AveragingSection, EmaAveraging
from fedtrain.params import Params, RunningMean, snapshot
from fedtrain.records import RoundRecord
from fedtrain.rundir import Checkpoint

__all__ = ["Plateau", "Result", "Watch", "Watching", "averaged", "check_watched"]

_LEAST_FACTOR = 1e-6  # below it updates of float32 parameters come to be zero throughout, which the gate refuses
_WHERE = {"central": "on the central test set", "clients": "on the clients' examples"}


class Watching(Protocol):
    """A section that watches a metric."""

    @property
    def metric(self) -> str:
        """Its name."""

    @property
    def on(self) -> Literal["central", "clients"]:
        """Where it is measured."""


@dataclass(frozen=True)
class Watch:
    """The values of a metric so far.

    Attributes:
        metric: its name.
        mode: whether a better value is a larger one, max, or a smaller one, min; auto goes by the name.
        min_delta: by how much a value has to be better than the best.
        best: None before the first finite value.
        round_number: of the best.
        waited: values since then.
    """

    metric: str
    mode: Literal["auto", "max", "min"] = "auto"
    min_delta: float = 0.0
    best: float | None = None
    round_number: int = 0
    waited: int = 0

    def after(self, round_number: int, value: float) -> Watch:
        """Take in a round's value."""
        if math.isfinite(value) and self._is_better(value):
            return replace(self, best=value, round_number=round_number, waited=0)
        return replace(self, waited=self.waited + 1)

    def _is_better(self, value: float) -> bool:
        if self.best is None:
            return True
        grows = higher_is_better(self.metric) if self.mode == "auto" else self.mode == "max"
        gain = value - self.best if grows else self.best - value
        return gain > self.min_delta


@dataclass(frozen=True)
class Plateau:
    """The learning rate's factor, which shrinks when a metric gets no better.

    It is that of torch's ReduceLROnPlateau with threshold and eps 0, a function of the values alone; but it does not
    fall below 1e-6.

    Attributes:
        patience: values in a row without a better one that are borne; one more, and the factor shrinks.
        gamma: times which it shrinks.
        least_factor: below which it does not fall.
        watch: the values so far.
        factor: as it is now.
    """

    patience: int
    gamma: float
    least_factor: float
    watch: Watch
    factor: float = 1.0

    def after(self, round_number: int, value: float) -> Plateau:
        """Take in a round's value."""
        watch = self.watch.after(round_number, value)
        if watch.waited <= self.patience:
            return replace(self, watch=watch)
        least = max(self.least_factor, _LEAST_FACTOR)
        return replace(self, watch=replace(watch, waited=0), factor=max(self.factor * self.gamma, least))


def averaged(section: AveragingSection, average: Params, params: Params, round_number: int) -> Params:
    """Take a round's model into an average over rounds; buffers are averaged as parameters are.

    Both averages begin as the first model that counts, as torch.optim.swa_utils.AveragedModel does: there is no bias
    towards zero that would have to be corrected. Half precisions are averaged in float32.

    Args:
        section: which average.
        average: so far; empty before the first model that counts.
        params: the round's model.
        round_number: at least the section's start_round.

    Returns:
        The new average, of float32 at least.
    """
    wide = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in params.items()}
    if not average:
        return snapshot(wide)
    if isinstance(section, EmaAveraging):
        old, new = section.decay, 1 - section.decay
    else:
        old, new = float(round_number - section.start_round), 1.0
    mean = RunningMean(like=wide)
    mean.add(average, old)
    mean.add(wide, new)
    return mean.mean()


class Result:
    """Which of a run's models is its result, and whether the run should go on.

    Args:
        experiment: what is run.
    """

    def __init__(self, experiment: Experiment) -> None:
        training = experiment.training
        self._averaging, self._stopping = training.average, training.early_stopping
        self._schedule = training.schedule if isinstance(training.schedule, PlateauSchedule) else None
        self.ended = ""
        """Why the run ended before its last round; empty as long as it has not."""

    def begin(self, start: Checkpoint, records: Iterable[RoundRecord]) -> None:
        """Take up what an earlier part of the run has come to.

        Args:
            start: the state between two rounds.
            records: of the rounds up to it.
        """
        self._model, self._round = start.params, start.round_number
        self._average, self._best = start.result.get("average", {}), start.result.get("best", {})
        if self._average:
            self._model = _like(start.params, self._average)
        stopping = self._stopping
        self._watch = Watch(stopping.metric, stopping.mode, stopping.min_delta) if stopping else None
        self._plateau: Plateau | None = None
        if section := self._schedule:
            self._plateau = Plateau(
                section.patience, section.gamma, section.least_factor, Watch(section.metric, section.mode)
            )
        for record in records:
            self._watch = self._watched(record.round_number, _parts(record))
            self.note(record)

    def memory(self) -> dict[str, Params]:
        """What a resumed run needs beside the records."""
        models = {"average": self._average, "best": self._best}
        return {name: model for name, model in models.items() if model}

    def take(self, round_number: int, params: Params) -> Params:
        """Take in a round's model.

        Returns:
            The model to measure: the average over rounds, where there is one.
        """
        section = self._averaging
        self._round, self._model = round_number, params
        if section and round_number >= section.start_round:
            self._average = averaged(section, self._average, params, round_number)
            self._model = _like(params, self._average)
        return self._model

    def watch(self, measured: Mapping[str, Mapping[str, float]]) -> None:
        """Take in what was measured of the model that was taken in last.

        Args:
            measured: "central" or "clients" -> loss and metrics; of these, at least what is watched.

        Raises:
            InputError: the metric that is watched is not among them.
        """
        self._watch = self._watched(self._round, measured)
        if self._watch and self._watch.best is not None and self._watch.round_number == self._round:
            self._best = snapshot(self._model)

    def note(self, record: RoundRecord) -> None:
        """Take in a round's record, which may show a plateau."""
        value = _value(self._schedule, _parts(record)) if self._schedule else None
        if self._plateau and value is not None:
            self._plateau = self._plateau.after(record.round_number, value)

    @property
    def lr_factor(self) -> float | None:
        """What clients of the next round multiply their learning rate with; None without a plateau schedule."""
        return self._plateau.factor if self._plateau else None

    @property
    def params(self) -> Params:
        """The run's result, if it ended here."""
        return self._best or self._model

    @property
    def round_number(self) -> int:
        """The round whose model `params` is, or the last in its average."""
        return self._watch.round_number if self._watch and self._best else self._round

    @property
    def watched(self) -> Literal["central", "clients"]:
        """The evaluation that has to come first, for it may end the run."""
        return self._stopping.on if self._stopping else "central"

    @property
    def restores(self) -> bool:
        """Whether the result may be the model of an earlier round."""
        return self._stopping is not None

    @property
    def may_end(self) -> bool:
        """Whether the next evaluation may be the last that there is patience for."""
        return bool(self._stopping and self._watch and self._watch.waited + 1 >= self._stopping.patience)

    def out_of_patience(self) -> str | None:
        """Say so if the run should end here."""
        if not (self._stopping and self._watch) or self._watch.waited < self._stopping.patience:
            return None
        times = "1 evaluation" if self._watch.waited == 1 else f"{self._watch.waited} evaluations"
        best = f"the best is of round {self._watch.round_number}" if self._best else "no value was finite"
        return f"{self._stopping.metric} {_WHERE[self._stopping.on]} got no better in {times}; {best}"

    def _watched(self, round_number: int, measured: Mapping[str, Mapping[str, float]]) -> Watch | None:
        value = _value(self._stopping, measured) if self._stopping else None
        return self._watch.after(round_number, value) if self._watch and value is not None else self._watch


def check_watched(experiment: Experiment, names: Collection[str], central: Sized | None) -> None:
    """Refuse to watch what is not measured, before a run writes anything.

    Args:
        experiment: what would be run.
        names: of what is measured, the loss included.
        central: the central test set; None, or empty, if there is none.

    Raises:
        InputError: a section watches something else.
    """
    goal = experiment.evaluation.target_metric
    known = [*names, *(["adversarial-accuracy"] if experiment.evaluation.attack else [])]
    if goal is not None and goal not in known:
        raise InputError(
            "evaluation.target_metric is not measured",
            got=shorten(goal),
            expected=f"one of {', '.join(known)}",
            hint=nearest(goal, known, otherwise="Others are measured if evaluation.metrics names them"),
        )
    training = experiment.training
    schedule = training.schedule if isinstance(training.schedule, PlateauSchedule) else None
    for field, section in (("training.early_stopping", training.early_stopping), ("training.schedule", schedule)):
        if section is None:
            continue
        if section.on == "central" and not central:  # the experiment has refused to watch clients without examples
            raise InputError(
                f"{field} watches the central test set, and there is none",
                got=f"{field}.on = central",
                hint="Set data.central_test=0.2",
            )
        measured = [
            *names,
            *(["adversarial-accuracy"] if experiment.evaluation.attack and section.on == "central" else []),
        ]
        _value(section, {section.on: dict.fromkeys(measured, 0.0)})
        if section.mode == "auto" and not direction_is_known(section.metric):
            raise InputError(
                f"{field} does not know in which direction this metric gets better",
                got=shorten(section.metric),
                hint=f'Say so: {field}.mode = "max" or "min"',
            )


def _parts(record: RoundRecord) -> dict[str, Mapping[str, float]]:
    return {"central": record.central, "clients": record.clients}


def _value(section: Watching, measured: Mapping[str, Mapping[str, float]]) -> float | None:
    """What a section watches; None if nothing was measured."""
    values = measured.get(section.on)
    if not values:
        return None
    if section.metric not in values:
        raise InputError(
            f"the metric to watch is not measured {_WHERE[section.on]}",
            got=shorten(section.metric),
            hint=nearest(section.metric, values),
        )
    return values[section.metric]


def _like(params: Params, average: Params) -> dict[str, Tensor]:
    """The average in the dtypes of the model."""
    return {name: average[name].to(t.dtype) for name, t in params.items()}
