"""What a step minimises, and on which examples: losses, penalties, balance and curriculum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from fedtrain.experiment.base import Section

if TYPE_CHECKING:
    from fedtrain.experiment.sections import Experiment

__all__ = [
    "BalanceSection",
    "CrossEntropyLoss",
    "CurriculumSection",
    "FocalLoss",
    "HingeLoss",
    "HuberLoss",
    "LossSection",
    "MaeLoss",
    "MseLoss",
    "OwnLoss",
    "PenaltySection",
    "QuantileLoss",
    "objections",
]


def _some(weights: list[float]) -> list[float]:
    if weights and not any(weights):
        raise ValueError("one greater than 0 at least: nothing would be learned")
    return weights


_Weights = Annotated[list[Annotated[float, Field(ge=0)]], AfterValidator(_some)]
_Quantile = Annotated[float, Field(gt=0, lt=1)]


class CrossEntropyLoss(Section):
    """Cross-entropy of classes; of a model with one logit, binary cross-entropy."""

    name: Literal["cross-entropy"]
    class_weights: _Weights = Field(default=[], examples=[[1.0, 5.0]])
    """Factor of an example's loss by its class, in the order of the classes; 1 for all unless given. The loss of a
    batch is the mean over its examples, and not divided by the sum of their weights as in torch."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all classes (Szegedy et al. 2016)."""


class FocalLoss(Section):
    """Focal loss: cross-entropy times (1 - p)^gamma, where p is the probability of the target (Lin et al. 2017)."""

    name: Literal["focal"]
    gamma: float = Field(default=2.0, ge=0)
    """How much less an example counts that is classified well; 0 for cross-entropy."""
    alpha: _Weights = Field(default=[], examples=[[0.25, 0.75]])
    """Factor of an example's loss by its class, in the order of the classes; 1 for all unless given."""


class HingeLoss(Section):
    """Hinge loss: how far the target's score is from 1 above the best other's (Crammer and Singer 2001)."""

    name: Literal["hinge"]


class MseLoss(Section):
    """Squared error, in squares of the task option target_std."""

    name: Literal["mse"]


class MaeLoss(Section):
    """Absolute error, in units of the task option target_std."""

    name: Literal["mae"]


class HuberLoss(Section):
    """Half the squared error up to delta, linear beyond; in units of the task option target_std (Huber 1964)."""

    name: Literal["huber"]
    delta: float = Field(default=1.0, gt=0)
    """Error at which it becomes linear, in units of target_std."""


class QuantileLoss(Section):
    """Pinball loss: the model learns quantiles of the target; in units of target_std (Koenker and Bassett 1978)."""

    name: Literal["quantile"]
    q: list[_Quantile] = Field(default=[0.5], min_length=1, examples=[[0.9]])
    """The quantile, between 0 and 1; several for a task of your own whose model has one output for each: the loss is
    their mean."""


class OwnLoss(Section):
    """Your own loss: a function (outputs, targets) -> (B,), one number per example."""

    name: Literal["own"]
    path: str = Field(pattern=":", examples=["own_loss.py:miss_cost", "my_package.losses:miss_cost"])
    """"package.module:function" or "file.py:function"."""


LossSection = Annotated[
    CrossEntropyLoss | FocalLoss | HingeLoss | MseLoss | MaeLoss | HuberLoss | QuantileLoss | OwnLoss,
    Field(discriminator="name"),
]


class PenaltySection(Section):
    """Penalties on trained weights with two or more dimensions: not on biases and normalisation layers.

    They are added to each step's gradient; the loss that is reported is without them.
    """

    l1: float = Field(default=0.0, ge=0)
    """Times the sum of absolute values."""
    l2: float = Field(default=0.0, ge=0)
    """Times half the sum of squares."""


BalanceSection = Literal["none", "oversample", "weight"]


class CurriculumSection(Section):
    """Curriculum: a client trains on its easier examples first (Bengio et al. 2009)."""

    rounds: int = Field(default=10, ge=2)
    """Round from which on all examples take part."""
    start: float = Field(default=0.3, gt=0, le=1)
    """Share of a client's examples that take part in the first round; it grows linearly to 1."""
    score: str = Field(default="loss", pattern="^loss$|:", examples=["loss", "own_score.py:difficulty"])
    """How difficult an example is: its loss under the round's model, or your own function of (inputs, targets)."""

    def share(self, round_number: int) -> float:
        """Share of a client's examples that take part in a round, which is counted from 1."""
        return self.start + (1 - self.start) * min(1.0, (round_number - 1) / (self.rounds - 1))


def objections(experiment: Experiment) -> Iterator[str]:
    """Name what contradicts the rest of an experiment, a sentence each."""
    training, privacy = experiment.training, experiment.privacy
    if training.curriculum is not None and training.curriculum.rounds > experiment.rounds:
        yield (
            f"training.curriculum.rounds = {training.curriculum.rounds} is more than rounds = {experiment.rounds}: the "
            "hardest examples would never take part"
        )
    if privacy is None or privacy.unit != "sample":
        return
    if training.balance != "none":
        yield (
            f'training.balance = "{training.balance}" counts the client\'s classes without noise; '
            'privacy.unit = "sample" needs "none"'
        )
    if training.curriculum is not None:
        yield (
            "training.curriculum ranks a client's examples without noise, so that each changes which others take part; "
            'leave it out with privacy.unit = "sample"'
        )
