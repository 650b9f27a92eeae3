"""Preparation of inputs: missing values filled, features and pixels scaled, rows split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator
from torch import Tensor

from fedtrain.data.base import DataSpec
from fedtrain.errors import DataError, shorten
from fedtrain.experiment.sections import GivenScaling

__all__ = [
    "Moments",
    "Preparation",
    "fill_missing",
    "fit_moments",
    "given_moments",
    "held_out_counts",
    "prepare",
    "stratified_fold",
    "stratified_sample",
]

Missing = Literal["mean", "median", "zero", "drop"]
_Numbers = Annotated[  # in JSON: nested lists, from which float32 comes back to the last bit
    Tensor,
    PlainValidator(lambda numbers: torch.as_tensor(numbers, dtype=torch.float32)),
    PlainSerializer(lambda tensor: tensor.tolist()),
]


@dataclass(frozen=True)
class Moments:
    """What is subtracted and divided by; both float32, and of a shape that broadcasts over inputs without the batch."""

    mean: _Numbers
    std: _Numbers


class Preparation(BaseModel):
    """What is done to inputs before the model sees them, in training and ever after: `preparation.json` of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    spec: DataSpec
    dtype: Literal["uint8", "float32", "int64"]
    """Of the inputs as they were read: pixels, features or tokens."""
    missing: Missing
    scaled_per_client: bool
    """Whether each client's features are scaled by moments of its own."""
    moments: Moments | None
    """The scaling that is the same for all; None if there is none, or if each client has its own."""

    def check(self, inputs: Tensor) -> None:
        """Refuse inputs that are not like those that were trained on.

        Args:
            inputs: `(N, *input_shape)`, raw: as in a `Dataset`.

        Raises:
            DataError: the shape, the dtype or a value does not fit.
        """
        shape = self.spec.input_shape
        if inputs.shape[1:] != shape or str(inputs.dtype) != f"torch.{self.dtype}":
            raise DataError(
                "the inputs do not fit the data that was trained on",
                got=f"{inputs.dtype} of shape {tuple(inputs.shape)}",
                expected=f"torch.{self.dtype} of shape {('N', *shape)}",
            )
        if self.dtype == "float32":
            self._refuse(inputs.isinf(), "is infinite", "finite numbers, or none (missing)")
            if self.missing == "drop":
                self._refuse(inputs.isnan(), "is missing", "complete rows: others were left out of training")
        elif self.dtype == "int64":
            tokens = self.spec.num_classes
            self._refuse((inputs < 0) | (inputs >= tokens), "is no token", f"0 to {tokens - 1}")

    def apply(self, inputs: Tensor, fitted_on: Tensor) -> Tensor:
        """Turn rows as they were read into what the model takes.

        Args:
            inputs: `(N, *input_shape)`, raw.
            fitted_on: `(M, *input_shape)`, raw: the rows whose own values fill holes and, if scaled per client, scale.
        """
        if self.dtype != "float32":
            return prepare(inputs, self.moments)
        moments = fit_moments(fitted_on) if self.scaled_per_client else self.moments
        otherwise = moments.mean if moments is not None else 0.0
        return prepare(fill_missing(inputs, fitted_on, self.missing, otherwise), moments)

    def _refuse(self, wrong: Tensor, what: str, expected: str) -> None:
        """Name the first value that is wrong; rows are counted from 1."""
        places = wrong.flatten(1).nonzero()
        if len(places):
            row, position = places[0].tolist()
            names = self.spec.feature_names
            value = shorten(names[position]) if names else f"value {position + 1}"
            raise DataError(f"row {row + 1}: {value} {what}", expected=expected)


def fit_moments(rows: Tensor) -> Moments:
    """Fit mean and population deviation of each feature to the values that are there.

    Args:
        rows: `(N, *input_shape)` float32, NaN where missing.

    Returns:
        Moments of shape `input_shape`; a constant feature has deviation 1, one that is all missing also mean 0.
    """
    there = ~rows.isnan()
    # Two passes in float64: one pass loses a small deviation beside a large mean.
    values = rows.double().nan_to_num(0.0)
    count = there.sum(dim=0).clamp(min=1)
    mean = values.sum(dim=0) / count
    variance = ((values - mean).square() * there).sum(dim=0) / count
    lowest = rows.nan_to_num(torch.inf).amin(dim=0)
    highest = rows.nan_to_num(-torch.inf).amax(dim=0)
    std = torch.where(highest > lowest, variance.sqrt(), 1.0)
    return Moments(mean.float(), std.float())


def given_moments(section: GivenScaling, shape: tuple[int, ...]) -> Moments:
    """Turn given scaling into moments: one number for all, one per feature, or one per channel of an image.

    Raises:
        DataError: the numbers given do not fit the features.
    """
    fields = []
    for name in ("mean", "std"):
        values = torch.tensor(getattr(section, name), dtype=torch.float32)
        if len(values) not in (1, shape[0]):
            unit = "channel" if len(shape) == 3 else "feature"
            raise DataError(
                f"data.scaling.{name} does not fit the data",
                got=f"{len(values)} numbers",
                expected=f"1, or {shape[0]}: one per {unit}",
            )
        fields.append(values.reshape(-1, *[1] * (len(shape) - 1)))
    return Moments(*fields)


def fill_missing(inputs: Tensor, fitted_on: Tensor, missing: Missing, otherwise: Tensor | float) -> Tensor:
    """Replace NaN.

    Args:
        inputs: `(N, *input_shape)` float32.
        fitted_on: rows whose mean or median is filled in.
        missing: what to fill in; rows to drop are dropped when the data is loaded.
        otherwise: filled in where `fitted_on` has no value of a feature; broadcasts over inputs without the batch.

    Returns:
        `inputs` itself if nothing is missing in it, else a filled copy.
    """
    holes = inputs.isnan()
    if not holes.any():
        return inputs
    if missing == "mean":
        fill = fitted_on.double().nanmean(dim=0).float()
    elif missing == "median" and len(fitted_on):
        # Of an even number of values torch takes the lower of the middle two; the median is the mean of both.
        fill = (fitted_on.nanmedian(dim=0).values - (-fitted_on).nanmedian(dim=0).values) / 2
    else:
        fill = torch.full(inputs.shape[1:], 0.0 if missing == "zero" else torch.nan)
    fill = torch.where(fill.isnan(), torch.as_tensor(otherwise, dtype=torch.float32), fill)
    return torch.where(holes, fill, inputs)


def prepare(inputs: Tensor, moments: Moments | None) -> Tensor:
    """Turn rows without missing values into what a model takes.

    Args:
        inputs: `(N, *input_shape)`: uint8 images, which are divided by 255 first, float32 features or int64 tokens.
        moments: scaling; None for none.

    Returns:
        float32, or the tokens as they are.
    """
    if inputs.dtype == torch.int64:
        return inputs
    values = inputs.to(torch.float32)
    if inputs.dtype == torch.uint8:
        values.div_(255)
    if moments is not None:  # in place where the tensor is new: fresh memory costs more than the arithmetic
        values = values - moments.mean if values is inputs else values.sub_(moments.mean)
        values.div_(moments.std)
    return values


def held_out_counts(sizes: NDArray[np.int64], fraction: float, keep: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Count the examples to hold out of each client: the nearest whole number to its fraction.

    Args:
        sizes: `(clients,)` examples of each client.
        fraction: of these, below 1.
        keep: `(clients,)` or one number: examples that must stay.
    """
    wanted = np.floor(sizes * fraction + 0.5).astype(np.int64)
    counts: NDArray[np.int64] = np.minimum(wanted, np.maximum(sizes - keep, 0))
    return counts


def stratified_sample(
    labels: NDArray[np.int64] | None, population: int, counts: Sequence[int], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Draw disjoint samples in which each class has its share, up to one example.

    Rows are shuffled and sorted by class, and every k-th one is drawn (systematic sampling).

    Args:
        labels: `(population,)` classes; None to draw without regard to them.
        population: rows to draw from.
        counts: sizes of the samples; together at most `population`.
        rng: the stream to draw from.

    Returns:
        The samples' rows, then the rows that are left; each ascending.
    """
    left = rng.permutation(population)
    if labels is not None:
        left = left[np.argsort(labels[left], kind="stable")]
    samples = []
    for count in counts:
        chosen = np.zeros(len(left), dtype=bool)
        if count:
            chosen[(np.arange(count) * len(left) + rng.integers(len(left))) // count] = True
        samples.append(np.sort(left[chosen]))
        left = left[~chosen]
    return [*samples, np.sort(left)]


def stratified_fold(
    labels: NDArray[np.int64] | None, population: int, fold: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Take one part of a division into equal parts in which each class has its share, up to one example.

    Args:
        labels: `(population,)` classes; None to divide without regard to them.
        population: rows to divide.
        fold: which part, from 1, and of how many.
        rng: the stream to draw from, the same for all parts.

    Returns:
        The part's rows, and all others; each ascending.
    """
    number, parts = fold
    order = rng.permutation(population)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    mine = np.arange(population) % parts == number - 1
    return np.sort(order[mine]), np.sort(order[~mine])
