"""Sums over examples that add up over batches and clients; every metric of `formulas` follows from one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtrain.errors import TaskError

__all__ = [
    "CALIBRATION_BINS",
    "Batch",
    "Calibration",
    "Confusion",
    "Groups",
    "Likelihood",
    "Moments",
    "Scores",
    "Statistic",
]

CALIBRATION_BINS = 15  # as Guo et al. have it
_MOST_LOG_ODDS = 20.0  # what is further out is in the outermost bins
_FINE_LOG_ODDS = 0.25  # up to here bins are about equally wide, and then the wider the further out


@dataclass(frozen=True)
class Batch:
    """Examples with what a model says of them, on any device; what is made of them is on the CPU.

    Where each example has several targets (tokens), each of them is a row.
    """

    inputs: Tensor  # (B, *input_shape), as the model got them
    outputs: Tensor
    targets: Tensor

    @cached_property
    def labels(self) -> Tensor:
        """`(rows,)` int64 classes."""
        return self.targets.cpu().reshape(-1)

    @cached_property
    def logits(self) -> Tensor:
        """`(rows, classes)` as the model gives them, or `(rows, 1)`: of class 1 against class 0."""
        outputs = self.outputs.cpu()
        flat = outputs.reshape(-1, outputs.shape[-1]) if outputs.dim() > 1 else outputs
        if flat.dim() != 2 or len(flat) != len(self.labels):
            _refuse(outputs, f"{len(self.labels)} rows of one number per class")
        return flat

    @cached_property
    def predicted(self) -> Tensor:
        """`(rows,)` int64: the likeliest class."""
        return (self.logits[:, 0] > 0).long() if self.logits.shape[1] == 1 else self.logits.argmax(1)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """`(rows, classes)` float64."""
        logits = self.logits.double()
        if logits.shape[1] == 1:
            return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1)
        return F.log_softmax(logits, dim=1)

    @cached_property
    def numbers(self) -> tuple[Tensor, Tensor]:
        """`(rows,)` float64 each: outputs and targets."""
        if self.outputs.numel() != self.targets.numel():
            _refuse(self.outputs, f"{self.targets.numel()} numbers")
        return self.outputs.cpu().double().reshape(-1), self.targets.cpu().double().reshape(-1)


class Statistic(Protocol):
    """Sums over rows."""

    name: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sums."""

    def of(self, batch: Batch) -> Tensor:
        """Sum over a batch: float64 of `shape`."""

    def totals(self, sums: Tensor) -> Tensor:
        """Numbers each of which is the count of rows, if the sums are right."""

    def never_negative(self, sums: Tensor) -> Tensor:
        """Those of the sums that cannot be below 0."""


class _Counts:
    """What counts or adds up sizes only."""

    def never_negative(self, sums: Tensor) -> Tensor:
        return sums


@dataclass(frozen=True)
class Confusion(_Counts):
    """Rows by their class and by the class that was predicted: `(classes, classes)`."""

    classes: int
    name: ClassVar[str] = "confusion"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.classes, self.classes

    def of(self, batch: Batch) -> Tensor:
        _check_classes(batch, self.classes)
        return _histogram(batch.labels * self.classes + batch.predicted, self.shape)

    def totals(self, sums: Tensor) -> Tensor:
        return sums.sum().reshape(1)


@dataclass(frozen=True)
class Groups(_Counts):
    """A confusion matrix for each of two groups: `(2, classes, classes)`.

    Attributes:
        classes: of the targets.
        column: position of the feature that tells the groups apart.
        above: greater values are group 1; in the scale that the model sees.
    """

    classes: int
    column: int
    above: float
    name: ClassVar[str] = "groups"

    @property
    def shape(self) -> tuple[int, ...]:
        return 2, self.classes, self.classes

    def of(self, batch: Batch) -> Tensor:
        _check_classes(batch, self.classes)
        group = (batch.inputs[:, self.column].cpu() > self.above).long()
        return _histogram((group * self.classes + batch.labels) * self.classes + batch.predicted, self.shape)

    def totals(self, sums: Tensor) -> Tensor:
        return sums.sum().reshape(1)


@dataclass(frozen=True)
class Scores(_Counts):
    """Histograms of the log-odds of a class, of the rows that are not of that class and of those that are.

    For two classes that is class 1; for more, each class against all others: `(classes or 1, 2, bins)`. Log-odds are
    counted from those of a probability of 1 in `classes`, where an untrained model's scores crowd. Bins are of equal
    width in their inverse hyperbolic sine, as trained scores are spread widely. What is not a number counts as 0.
    """

    classes: int
    bins: int
    name: ClassVar[str] = "scores"

    @property
    def shape(self) -> tuple[int, ...]:
        return 1 if self.classes == 2 else self.classes, 2, self.bins

    def of(self, batch: Batch) -> Tensor:
        _check_classes(batch, self.classes)
        log_p = batch.log_probabilities[:, 1:] if self.classes == 2 else batch.log_probabilities
        log_odds = log_p - torch.log(-torch.expm1(log_p)) + math.log(self.classes - 1)
        spread = torch.asinh(log_odds.nan_to_num(0.0, torch.inf, -torch.inf) / _FINE_LOG_ODDS)
        place = (spread / math.asinh(_MOST_LOG_ODDS / _FINE_LOG_ODDS)).clamp(-1, 1)
        bins = ((place + 1) / 2 * self.bins).long().clamp(max=self.bins - 1)
        of_class = torch.arange(log_p.shape[1])
        positive = (batch.labels[:, None] == (1 if self.classes == 2 else of_class)).long()
        return _histogram(((of_class * 2 + positive) * self.bins + bins).reshape(-1), self.shape)

    def totals(self, sums: Tensor) -> Tensor:
        return sums.sum(dim=(1, 2))


@dataclass(frozen=True)
class Calibration(_Counts):
    """Rows, their confidence and how many were right, by bins of the confidence: `(3, 15)`."""

    classes: int
    name: ClassVar[str] = "calibration"

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, CALIBRATION_BINS

    def of(self, batch: Batch) -> Tensor:
        _check_classes(batch, self.classes)
        confidence = batch.log_probabilities.amax(dim=1).exp()
        bins = (confidence.nan_to_num(0.0) * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        right = (batch.predicted == batch.labels).double()
        weights = torch.ones_like(right), confidence, right
        return torch.stack([torch.bincount(bins, w, minlength=CALIBRATION_BINS) for w in weights])

    def totals(self, sums: Tensor) -> Tensor:
        return sums[0].sum().reshape(1)


@dataclass(frozen=True)
class Likelihood(_Counts):
    """Rows, and their negative log-likelihood in nats: `(2,)`."""

    classes: int
    name: ClassVar[str] = "likelihood"

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    def of(self, batch: Batch) -> Tensor:
        _check_classes(batch, self.classes)
        nats = F.nll_loss(batch.log_probabilities, batch.labels, reduction="sum")
        return torch.stack([torch.tensor(len(batch.labels), dtype=torch.float64), nats])

    def totals(self, sums: Tensor) -> Tensor:
        return sums[:1]


@dataclass(frozen=True)
class Moments:
    """Sums for regression: `(6,)`, of 1, t, t squared, e squared, |e| and |e / t|, for targets t and errors e."""

    name: ClassVar[str] = "moments"

    @property
    def shape(self) -> tuple[int, ...]:
        return (6,)

    def of(self, batch: Batch) -> Tensor:
        outputs, targets = batch.numbers
        errors = (outputs - targets).abs()
        # As scikit-learn has it: a target of 0 gives a huge relative error, not an infinite one.
        relative = errors / targets.abs().clamp(min=torch.finfo(torch.float64).eps)
        columns = [torch.ones_like(targets), targets, targets.square(), errors.square(), errors, relative]
        return torch.stack([column.sum() for column in columns])

    def totals(self, sums: Tensor) -> Tensor:
        return sums[:1]

    def never_negative(self, sums: Tensor) -> Tensor:
        return torch.cat([sums[:1], sums[2:]])


def _histogram(places: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.bincount(places, minlength=torch.Size(shape).numel()).double().reshape(shape)


def _check_classes(batch: Batch, classes: int) -> None:
    columns = batch.logits.shape[1]
    if columns != classes and (columns, classes) != (1, 2):
        _refuse(batch.outputs, f"{classes} classes in the last dimension")


def _refuse(outputs: Tensor, expected: str) -> None:
    raise TaskError(
        "evaluation.metrics cannot be computed from the model's outputs",
        got=f"shape {tuple(outputs.shape)}",
        expected=expected,
        hint="Leave them out, and give the task metrics of its own",
    )
