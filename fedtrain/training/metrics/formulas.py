"""Metrics from sums over examples; NaN where a metric is not defined, as without examples."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "Average",
    "accuracy",
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "calibration_error",
    "disparities",
    "f1",
    "mae",
    "mape",
    "perplexity",
    "precision",
    "r2",
    "recall",
    "rmse",
]

Array = NDArray[np.float64]
Average = Literal["", "-macro", "-micro", "-weighted"]
"""How classes are put together; "" for class 1 of two."""


def accuracy(confusion: Array) -> float:
    """Take the share of rows whose class was predicted."""
    return _ratio(confusion.trace(), confusion.sum())


def balanced_accuracy(confusion: Array) -> float:
    """Take the mean recall of the classes that there are."""
    there = confusion.sum(axis=1) > 0
    return float(_ratios(confusion.diagonal(), confusion.sum(axis=1))[there].mean()) if there.any() else math.nan


def precision(confusion: Array, average: Average) -> float:
    """Take the share of a class's predictions that are right; 0 for a class that was never predicted."""
    return _averaged(confusion, average, of_actual=0.0)


def recall(confusion: Array, average: Average) -> float:
    """Take the share of a class's rows that were found; 0 for a class without rows."""
    return _averaged(confusion, average, of_actual=1.0)


def f1(confusion: Array, average: Average) -> float:
    """Take the harmonic mean of a class's precision and recall."""
    return _averaged(confusion, average, of_actual=0.5)


def auroc(scores: Array) -> tuple[float, float]:
    """Take the area under the ROC curve: how often a row of the class scores higher than another row.

    Args:
        scores: `(classes, 2, bins)` histograms of rows that are not of the class, and of those that are.

    Returns:
        The mean over the classes for which it is defined, pairs in one bin counted half; and how far from it the area
        of the scores themselves can be at most: half the share of such pairs.

    References:
        Hanley, McNeil: The Meaning and Use of the Area under a ROC Curve. Radiology 143, 1982.
    """
    other, own = scores[:, 0], scores[:, 1]
    pairs = other.sum(axis=1) * own.sum(axis=1)
    below = other.cumsum(axis=1) - other
    defined = pairs > 0
    if not defined.any():
        return math.nan, math.nan
    same = (own * other).sum(axis=1)[defined] / pairs[defined]
    higher = (own * below).sum(axis=1)[defined] / pairs[defined]
    return float((higher + same / 2).mean()), float((same / 2).mean())


def average_precision(scores: Array) -> tuple[float, float]:
    """Take the mean of the precision at each recall: the sum of precision times gain in recall over thresholds.

    Args:
        scores: as of `auroc`.

    Returns:
        The mean over the classes that have rows, as if all scores in one bin were equal; and how far from it the
        figure of the scores themselves can be at most, whatever their order within a bin.
    """
    found = [_average_precision(other, own) for other, own in scores[..., ::-1].copy() if own.sum() > 0]
    if not found:
        return math.nan, math.nan
    value, lowest, highest = np.mean(found, axis=0)
    return float(value), float(max(highest - value, value - lowest))


def calibration_error(calibration: Array) -> float:
    """Take the mean distance of confidence and accuracy over bins of the confidence, weighted by rows.

    References:
        Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks. ICML 2017.
    """
    rows, confidence, right = calibration
    return _ratio(float(np.abs(right - confidence).sum()), rows.sum())


def perplexity(likelihood: Array) -> float:
    """Take e to the mean negative log-likelihood."""
    mean = _ratio(likelihood[1], likelihood[0])
    return math.exp(mean) if mean < math.log(np.finfo(np.float64).max) else mean + math.inf


def rmse(moments: Array) -> float:
    """Take the root of the mean squared error."""
    return math.sqrt(_ratio(moments[3], moments[0]))


def mae(moments: Array) -> float:
    """Take the mean absolute error."""
    return _ratio(moments[4], moments[0])


def mape(moments: Array) -> float:
    """Take the mean of the error's size relative to the target's; a fraction, not percent."""
    return _ratio(moments[5], moments[0])


def r2(moments: Array) -> float:
    """Take the share of the targets' variance that is explained; not defined where all targets are equal."""
    rows, total, squares, errors = moments[:4]
    spread = squares - _ratio(total * total, rows)
    return 1 - _ratio(errors, spread) if spread > 0 else math.nan


def disparities(groups: Array) -> dict[str, float]:
    """Compare how two groups are treated.

    Args:
        groups: `(2, classes, classes)` confusion matrices.

    Returns:
        `accuracy-group-0` and `accuracy-group-1`; `parity-difference`: the greatest difference of how often a class is
        predicted; `odds-difference`: likewise among rows of one class, over the classes that both groups have.

    References:
        Hardt, Price, Srebro: Equality of Opportunity in Supervised Learning. NeurIPS 2016.
    """
    found = {f"accuracy-group-{number}": accuracy(group) for number, group in enumerate(groups)}
    sizes = groups.sum(axis=(1, 2))
    if not sizes.all():
        return {**found, "parity-difference": math.nan, "odds-difference": math.nan}
    predicted = groups.sum(axis=1) / sizes[:, None]
    rows = groups.sum(axis=2)
    rates = np.divide(groups, rows[..., None], where=rows[..., None] > 0, out=np.zeros_like(groups))
    gaps = np.abs(rates[0] - rates[1]).max(axis=1)[rows.all(axis=0)]
    return {
        **found,
        "parity-difference": float(np.abs(predicted[0] - predicted[1]).max()),
        "odds-difference": float(gaps.max(initial=0.0)) if len(gaps) else math.nan,
    }


def _averaged(confusion: Array, average: Average, of_actual: float) -> float:
    """Average over classes what is right of so much of their rows, and for the rest of their predictions."""
    right, actual, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    if not actual.sum():
        return math.nan
    whole = of_actual * actual + (1 - of_actual) * predicted
    if average == "-micro":
        return float(right.sum() / whole.sum())
    scores = _ratios(right, whole)
    if average == "":
        return float(scores[1])
    if average == "-weighted":
        return float(scores @ actual / actual.sum())
    return float(scores[actual + predicted > 0].mean())


def _average_precision(other: Array, own: Array) -> tuple[float, float, float]:
    """As if all scores of a bin were equal, the least and the most; bins come with the highest scores first."""
    positives, above = own.cumsum(), other.cumsum()
    total = own.sum()
    value = (own * positives / np.maximum(positives + above, 1)).sum()
    lowest, highest = (_precisions(positives - own, own, among).sum() for among in (above, above - other))
    return float(value / total), float(lowest / total), float(highest / total)


def _precisions(before: Array, count: Array, among: Array) -> Array:
    """Sum k / (k + among) over k from before + 1 to before + count, by the digamma function."""
    low = torch.from_numpy(before + among + 1)
    harmonic = (torch.digamma(low + torch.from_numpy(count)) - torch.digamma(low)).numpy()
    sums: Array = count - among * harmonic
    return sums


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _ratios(part: Array, whole: Array) -> Array:
    """0 where there is nothing to divide by, as scikit-learn has it."""
    ratios: Array = np.divide(part, whole, where=whole > 0, out=np.zeros_like(whole))
    return ratios
