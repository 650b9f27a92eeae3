"""The quality of each client's own rows: missing values, duplicates, outliers, uneven classes, wrong labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedtrain.data.base import Dataset
from fedtrain.data.partition import Partition
from fedtrain.data.prepare import fill_missing, fit_moments
from fedtrain.seeds import generator

__all__ = ["OUTLIER_LIMIT", "ClientQuality", "label_noise", "outliers", "quality"]

OUTLIER_LIMIT = 5.0
"""Robust deviations from the median beyond which a value is an outlier."""
_MAD_TO_STD = 1.4826  # of normal numbers
_FEWEST = 50  # rows from which wrong labels are estimated
_FEWEST_OF_CLASS = 10
_MOST = 2000  # rows of a client that are compared with each other
_FOLDS, _NEIGHBOURS = 5, 10


@dataclass(frozen=True)
class ClientQuality:
    """What is odd about a client's rows; None for what its data cannot have.

    Attributes:
        client: its name.
        rows: before splits.
        missing: share of its values that are missing.
        missing_of: column -> share of the client's rows that lack it; those that none lacks are left out.
        duplicates: rows equal, target too, to an earlier one of this client.
        elsewhere: rows that another client has too.
        outliers: share of its values that `outliers` marks.
        constant: features with one value, or none, on this client.
        classes: classes that it has.
        largest_class: share of its most frequent class.
        label_noise: share of its labels that `label_noise` believes to be wrong.
    """

    client: str
    rows: int
    missing: float | None = None
    missing_of: dict[str, float] = field(default_factory=dict)
    duplicates: int = 0
    elsewhere: int = 0
    outliers: float | None = None
    constant: list[str] | None = None
    classes: int | None = None
    largest_class: float | None = None
    label_noise: float | None = None


def quality(dataset: Dataset, partition: Partition, seed: int) -> list[ClientQuality]:
    """Look at each client's rows by themselves, as they were read.

    Args:
        dataset: all rows.
        partition: whose rows are whose.
        seed: of the draws by which `label_noise` splits rows.

    Returns:
        One per client, in the partition's order.
    """
    codes = _codes(dataset.inputs, dataset.targets)
    owners = np.repeat(np.arange(len(partition.names)), partition.sizes())
    pairs = np.unique(np.stack([codes[partition.indices], owners]), axis=1)
    holders = np.bincount(pairs[0], minlength=codes.max(initial=0) + 1)
    found = []
    for position, name in enumerate(partition.names):
        rows = partition.rows(position)
        own = codes[rows]
        inputs, targets = (t[torch.from_numpy(rows)] for t in (dataset.inputs, dataset.targets))
        found.append(
            ClientQuality(
                client=name,
                rows=len(rows),
                duplicates=len(own) - len(np.unique(own)),
                elsewhere=int((holders[own] > 1).sum()),
                **_of_features(inputs, dataset.spec.feature_names),
                **(
                    _of_labels(inputs, targets, generator(seed, "quality", name))
                    if dataset.spec.target == "class"
                    else {}
                ),
            )
        )
    return found


def outliers(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Mark values that are further from their feature's median than 5 robust deviations.

    The robust deviation is 1.4826 times the median distance from the median. Features of which more than half the
    values are equal have none, and no outliers.

    Args:
        values: `(N, d)`, NaN where missing.

    References:
        Iglewicz, Hoaglin, "How to Detect and Handle Outliers", ASQC 1993 (the rule, with a limit of 3.5).
    """
    marked = np.zeros(values.shape, dtype=np.bool_)
    there = ~np.isnan(values).all(0)
    some = values[:, there].astype(np.float64)
    distances = np.abs(some - np.nanmedian(some, 0))
    deviation = _MAD_TO_STD * np.nanmedian(distances, 0)
    marked[:, there] = (distances > OUTLIER_LIMIT * deviation) & (deviation > 0)
    return marked


def label_noise(inputs: Tensor, targets: Tensor, rng: np.random.Generator) -> float | None:
    """Estimate the share of wrong labels by confident learning.

    The chance of each class is that among an example's 10 nearest neighbours in the other four fifths of the rows. An
    example counts as of class j if its chance of j is at least the mean of that chance over those labelled j. Labels
    are then wrong where the class is another one. Classes that overlap count as wrong labels too, so that the estimate
    compares clients of one data set, and is a share of errors only where classes are well apart.

    Args:
        inputs: `(N, d)` scaled features or pixels.
        targets: `(N,)` labels.
        rng: draws the fifths, and 2000 rows where there are more.

    Returns:
        From 0 to 1; None for fewer than 50 rows, or fewer than two classes of 10 rows, which are the ones that count.

    References:
        Northcutt, Jiang, Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021.
    """
    chosen = torch.from_numpy(rng.permutation(len(targets))[:_MOST])
    _, targets, counts = torch.unique(targets[chosen], return_inverse=True, return_counts=True)
    kept = counts[targets] >= _FEWEST_OF_CLASS
    inputs, (_, labels) = inputs[chosen][kept], torch.unique(targets[kept], return_inverse=True)
    classes = int(labels.max()) + 1 if len(labels) else 0
    if len(labels) < _FEWEST or classes < 2:
        return None
    chances = _out_of_fold(inputs, labels, classes)
    one_hot = F.one_hot(labels, classes).double()
    sizes = one_hot.sum(0)
    limits = (chances * one_hot).sum(0) / sizes
    confident = chances.masked_fill(chances < limits, -1)
    sure = (confident >= 0).any(1)
    joint = one_hot[sure].mT @ F.one_hot(confident[sure].argmax(1), classes).double()  # label by class
    joint *= (sizes / joint.sum(1).clamp(min=1))[:, None]
    return float(1 - joint.trace() / joint.sum()) if joint.any() else None


def _out_of_fold(inputs: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Share of each class among the nearest neighbours in the other folds: `(N, classes)`."""
    folds = torch.empty_like(labels)
    folds[labels.argsort(stable=True)] = torch.arange(len(labels)) % _FOLDS  # rows are in random order: stratified
    chances = torch.empty(len(labels), classes, dtype=torch.float64)
    for fold in range(_FOLDS):
        here = folds == fold
        distances = torch.cdist(inputs[here], inputs[~here])
        nearest = distances.topk(min(_NEIGHBOURS, distances.shape[1]), largest=False).indices
        chances[here] = F.one_hot(labels[~here][nearest], classes).double().mean(1)
    return chances


def _of_features(inputs: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    if inputs.dtype != torch.float32 or not len(inputs):
        return {}
    values = inputs.flatten(1).numpy()
    holes = np.isnan(values)
    found: dict[str, Any] = {"missing": float(holes.mean())}
    if inputs.dim() != 2:
        return found
    named = names or tuple(f"value {number + 1}" for number in range(values.shape[1]))
    lacking = holes.mean(0)
    # A missing text is missing in each feature "column=text" that its column gives.
    found["missing_of"] = {named[place].partition("=")[0]: float(lacking[place]) for place in np.flatnonzero(lacking)}
    lowest, highest = np.fmin.reduce(values), np.fmax.reduce(values)
    found["constant"] = [named[place] for place in np.flatnonzero(~(highest > lowest))]
    found["outliers"] = float(outliers(values).mean())
    return found


def _of_labels(inputs: Tensor, targets: Tensor, rng: np.random.Generator) -> dict[str, Any]:
    counts = torch.bincount(targets)
    if inputs.dtype == torch.int64 or not len(inputs):
        noise = None
    elif inputs.dtype == torch.uint8:
        noise = label_noise(inputs.flatten(1) / 255, targets, rng)
    else:
        features = inputs.flatten(1)
        features = fill_missing(features, features, "median", 0.0)
        moments = fit_moments(features)
        noise = label_noise((features - moments.mean) / moments.std, targets, rng)
    largest = float(counts.max()) / len(targets) if len(targets) else None
    return {"classes": int((counts > 0).sum()), "largest_class": largest, "label_noise": noise}


def _codes(inputs: Tensor, targets: Tensor) -> NDArray[np.int64]:
    """Number rows so that equal ones, target included, have the same number."""
    parts = []
    for tensor in (inputs, targets.view(len(targets), -1)):
        flat = tensor.flatten(1)
        if flat.is_floating_point():
            flat = torch.where(flat.isnan(), torch.nan, flat) + 0.0  # one NaN, and no zero below 0
        parts.append(flat.contiguous().numpy().view(np.uint8))
    digests = [hashlib.blake2b(one.tobytes() + other.tobytes(), digest_size=8).digest() for one, other in zip(*parts)]
    _, codes = np.unique(np.frombuffer(b"".join(digests), dtype=np.int64), return_inverse=True)
    return codes
