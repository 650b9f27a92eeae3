"""When the model is measured, and by which metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from fedtrain.errors import shorten
from fedtrain.experiment.base import Section, tag_defaults_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedtrain.experiment.sections import Experiment

__all__ = [
    "AttackSection",
    "EvaluationSection",
    "FgsmAttack",
    "GroupSection",
    "MetricName",
    "PgdAttack",
    "direction_is_known",
    "higher_is_better",
    "objections",
]

MetricName = Literal[
    "accuracy",
    "balanced-accuracy",
    "precision",
    "precision-macro",
    "precision-micro",
    "precision-weighted",
    "recall",
    "recall-macro",
    "recall-micro",
    "recall-weighted",
    "f1",
    "f1-macro",
    "f1-micro",
    "f1-weighted",
    "auroc",
    "average-precision",
    "calibration-error",
    "perplexity",
    "confusion-matrix",
    "rmse",
    "mae",
    "r2",
    "mape",
]
"""Metrics beside a task's own; the same over clients as if all examples lay in one place."""

_GROWING = {"accuracy", "balanced-accuracy", "auroc", "average-precision", "r2", "adversarial-accuracy"}
_GROWING |= {f"{name}{of}" for name in ("precision", "recall", "f1") for of in ("", "-macro", "-micro", "-weighted")}
_GROWING |= {"accuracy-group-0", "accuracy-group-1", "matched"}
_SHRINKING = {"loss", "mae", "mse", "rmse", "mape", "perplexity", "calibration-error", "parity-difference"}
_SHRINKING |= {"odds-difference", "missed", "wrong", "reconstruction", "kl", "flagged"}


def higher_is_better(metric: str) -> bool:
    """Tell whether a metric grows as the model gets better; all others are taken to shrink.

    What stands behind an underscore only says of what it is: `accuracy_digit` grows as `accuracy` does.
    """
    return metric.partition("_")[0] in _GROWING


def direction_is_known(metric: str) -> bool:
    """Tell whether a metric's name is one of those that say in which direction it gets better."""
    return metric.partition("_")[0] in _GROWING | _SHRINKING


class GroupSection(Section):
    """Two groups of examples, told apart by a feature, that the model should treat alike."""

    column: str = Field(examples=["sex=Male"])
    """The feature, by its name; each category of a column of texts is a feature, such as "sex=Male"."""
    above: float = 0.5
    """Examples with a greater value are group 1, all others group 0; in the feature's own unit, before scaling."""


class _Attack(Section):
    name: str  # declared here so that it is the first key
    epsilon: float = Field(gt=0, examples=[0.1])
    """Most that an entry of an input may change, in the input's own scale before scaling: 0 to 1 for pixels."""
    clip: tuple[float, float] | None = Field(default=None, examples=[[0.0, 1.0]], strict=False)
    """Least and greatest value of an entry of an input, in the scale of epsilon; leave out for no bounds."""

    @model_validator(mode="after")
    def _consistent(self) -> _Attack:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError("clip needs its least value before its greatest")
        return self


class FgsmAttack(_Attack):
    """One step along the sign of the gradient (Goodfellow et al. 2015)."""

    name: Literal["fgsm"] = "fgsm"


class PgdAttack(_Attack):
    """Several steps, from a random start (Madry et al. 2018)."""

    name: Literal["pgd"]
    steps: int = Field(default=10, ge=1)
    """Number of steps."""
    step_size: float | None = Field(default=None, gt=0)
    """In the scale of epsilon; 2.5 times epsilon over steps unless given."""


AttackSection = Annotated[FgsmAttack | PgdAttack, Field(discriminator="name"), tag_defaults_to("name", "fgsm")]


class EvaluationSection(Section):
    """When the model is measured, on whose examples, and by what."""

    central_every: int = Field(default=1, ge=0)
    """Rounds between evaluations on the central test set; 0: only after the last round."""
    clients_every: int = Field(default=0, ge=0)
    """Rounds between evaluations on the clients' held-out examples; 0: only after the last round."""
    max_clients: int = Field(default=100, ge=0)
    """Most clients asked to evaluate (a fixed random sample of them); 0: none."""
    batch_size: int = Field(default=250, ge=1)
    """Examples per forward pass."""
    metrics: list[MetricName] = Field(default=[], examples=[["balanced-accuracy", "f1-macro", "auroc"]])
    """What is measured beside the task's own metrics; over clients it is as if their examples lay in one place."""
    score_bins: int = Field(default=1000, ge=10, le=100_000)
    """Bins of the histograms behind auroc and average-precision; more are more exact, and more bytes per client."""
    group: GroupSection | None = None
    """Two groups that are compared; leave out for none."""
    attack: AttackSection | None = None
    """An attack on the inputs of the central test set; leave out for none."""
    drift: bool = True
    """Whether records tell how far the clients' updates point apart; never where each client is protected."""
    target_metric: str | None = Field(default=None, examples=["accuracy"])
    """Central metric with a goal, such as "accuracy"; the summary then names the first round that reached it."""
    target_value: float | None = Field(default=None, examples=[0.9])
    """The goal: reached from below for accuracy, f1, auroc, r2 and their like, from above for losses and errors."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationSection:
        if (self.target_metric is None) != (self.target_value is None):
            raise ValueError("target_metric and target_value go together: give both or none")
        if self.target_metric and self.target_value and higher_is_better(self.target_metric) and self.target_value > 1:
            raise ValueError(
                f"target_value = {self.target_value:g} is never reached: {shorten(self.target_metric)} is at most 1, "
                "and 0.9 is 90 %"
            )
        return self


def objections(experiment: Experiment) -> Iterator[str]:
    """Say what of the evaluation does not go with the rest of an experiment."""
    section, scaled_alike = experiment.evaluation, experiment.data.scaling != "client"
    if section.attack and experiment.personalization.private:
        yield (
            "evaluation.attack is on the central test set, for which personalization.private leaves the server no "
            "whole model"
        )
    for name in ("group", "attack"):
        if getattr(section, name) and not scaled_alike:
            yield (
                f'evaluation.{name} is in the units of the data, and data.scaling = "client" gives each client units '
                'of its own: take "pooled", "none" or given numbers'
            )
