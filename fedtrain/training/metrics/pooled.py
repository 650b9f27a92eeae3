"""The metrics that an experiment asks for, and the sums that they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fedtrain.data.base import DataSpec, FederatedData
from fedtrain.data.federated import PartitionedData
from fedtrain.data.prepare import Moments as Scaling
from fedtrain.errors import InputError, nearest, shorten
from fedtrain.experiment.evaluation import EvaluationSection, GroupSection, MetricName
from fedtrain.params import Params
from fedtrain.records import PERSONAL
from fedtrain.training.metrics import formulas
from fedtrain.training.metrics.statistics import (
    Batch,
    Calibration,
    Confusion,
    Groups,
    Likelihood,
    Moments,
    Scores,
    Statistic,
)

__all__ = ["NONE", "Counts", "PooledMetrics", "common_scaling", "make_metrics"]

_CLASSES, _LABELLED, _NUMBERS = ("class",), ("class", "tokens"), ("number",)
_Numbers = Callable[[NDArray[np.float64]], dict[str, float]]


@dataclass(frozen=True)
class _Kind:
    """A metric: the statistic that it needs, the targets that it is for, and what follows from the sums."""

    needs: str
    targets: tuple[str, ...]
    numbers: _Numbers
    binary: bool = False


def _one(name: str, formula: Callable[[NDArray[np.float64]], float]) -> _Numbers:
    return lambda sums: {name: formula(sums)}


def _bounded(name: str, formula: Callable[[NDArray[np.float64]], tuple[float, float]]) -> _Numbers:
    return lambda sums: dict(zip((name, f"{name}-bound"), formula(sums)))


_AVERAGED = {"precision": formulas.precision, "recall": formulas.recall, "f1": formulas.f1}
_KINDS = {
    "accuracy": _Kind("confusion", _LABELLED, _one("accuracy", formulas.accuracy)),
    "balanced-accuracy": _Kind("confusion", _LABELLED, _one("balanced-accuracy", formulas.balanced_accuracy)),
    **{
        f"{name}{average}": _Kind(
            "confusion",
            _LABELLED if average else _CLASSES,
            _one(f"{name}{average}", partial(formula, average=average)),
            binary=not average,
        )
        for name, formula in _AVERAGED.items()
        for average in get_args(formulas.Average)
    },
    "confusion-matrix": _Kind("confusion", _CLASSES, lambda _: {}),  # a table, and no number
    "auroc": _Kind("scores", _CLASSES, _bounded("auroc", formulas.auroc)),
    "average-precision": _Kind("scores", _CLASSES, _bounded("average-precision", formulas.average_precision)),
    "calibration-error": _Kind("calibration", _LABELLED, _one("calibration-error", formulas.calibration_error)),
    "perplexity": _Kind("likelihood", _LABELLED, _one("perplexity", formulas.perplexity)),
    "rmse": _Kind("moments", _NUMBERS, _one("rmse", formulas.rmse)),
    "mae": _Kind("moments", _NUMBERS, _one("mae", formulas.mae)),
    "r2": _Kind("moments", _NUMBERS, _one("r2", formulas.r2)),
    "mape": _Kind("moments", _NUMBERS, _one("mape", formulas.mape)),
}


@dataclass(frozen=True)
class PooledMetrics:
    """Metrics that follow from sums; `make_metrics` builds them.

    Attributes:
        statistics: what is added up.
        kinds: what follows from it.
        rows: targets of an example; several where they are tokens.
        table: whether the confusion matrix is wanted for itself.
    """

    statistics: tuple[Statistic, ...] = ()
    kinds: tuple[_Kind, ...] = ()
    rows: int = 1
    table: bool = False

    def blank(self, *, personal: bool = False) -> dict[str, torch.Tensor]:
        """Sums over nothing; with those of a client's personal model beside them if there is one."""
        prefixes = ("", PERSONAL) if personal else ("",)
        return {f"{p}{s.name}": torch.zeros(s.shape, dtype=torch.float64) for p in prefixes for s in self.statistics}

    @property
    def names(self) -> list[str]:
        """Of all numbers that can be measured."""
        return list(self._numbers(self.blank()))

    def numbers(self, sums: Params) -> dict[str, float]:
        """Compute the metrics; those that these examples do not define, as AUROC of one class, are left out."""
        return {name: value for name, value in self._numbers(sums).items() if not math.isnan(value)}

    def _numbers(self, sums: Params) -> dict[str, float]:
        with np.errstate(all="ignore"):  # a client may send immense sums
            found = [kind.numbers(sums[kind.needs].numpy()) for kind in self.kinds]
        return {name: value for numbers in found for name, value in numbers.items()}

    def confusion(self, sums: Params) -> list[list[int]]:
        """The confusion matrix, `(classes, classes)` by class and predicted class; empty where it is not asked for."""
        return [list(map(int, row)) for row in sums["confusion"].tolist()] if self.table and sums else []

    def objection(self, sums: Params, num_examples: int) -> str | None:
        """Say why sums that a client sent cannot be right, in one line; None if they may be.

        Args:
            sums: as of `blank`, with or without a personal model's; empty for no examples.
            num_examples: behind them.
        """
        known = {f"{prefix}{s.name}": s for prefix in ("", PERSONAL) for s in self.statistics}
        base = {s.name for s in self.statistics}
        if set(sums) not in ([base, set(known)] if num_examples else [set()]):
            got = shorten(", ".join(sorted(sums)) or "none", 200)
            return f"its sums are {got}; expected {', '.join(sorted(base)) if num_examples and base else 'none'}"
        for name, values in sums.items():
            statistic = known[name]
            if values.dtype != torch.float64 or tuple(values.shape) != statistic.shape:
                return f"sums {name} are {values.dtype} {tuple(values.shape)}; expected float64 {statistic.shape}"
            if not values.isfinite().all():
                return f"sums {name} are not finite"
            if (statistic.never_negative(values) < 0).any():
                return f"sums {name} hold a negative number; expected counts"
            if (statistic.totals(values) != num_examples * self.rows).any():
                return f"sums {name} do not count num_examples = {num_examples}"
        return None


NONE = PooledMetrics()
"""No metrics beside the task's own."""


class Counts:
    """Adds the sums of batches up."""

    def __init__(self, metrics: PooledMetrics) -> None:
        self.metrics = metrics
        self.sums = metrics.blank()

    def add(self, batch: Batch) -> None:
        """Take in a batch."""
        for statistic in self.metrics.statistics:
            self.sums[statistic.name] += statistic.of(batch)

    def clear(self) -> None:
        """Begin anew."""
        self.sums = self.metrics.blank()


def make_metrics(section: EvaluationSection, spec: DataSpec, scaling: Scaling | None = None) -> PooledMetrics:
    """Build the metrics that an experiment asks for.

    Args:
        section: names them.
        spec: what the data are like.
        scaling: of the features, the same on every client; None for none.

    Raises:
        InputError: a metric does not suit the targets, or there is no such column.
    """
    chosen = [_suitable(name, spec) for name in dict.fromkeys(section.metrics)]
    builders: dict[str, Callable[[], Statistic]] = {
        "confusion": lambda: Confusion(spec.num_classes),
        "scores": lambda: Scores(spec.num_classes, section.score_bins),
        "calibration": lambda: Calibration(spec.num_classes),
        "likelihood": lambda: Likelihood(spec.num_classes),
        "moments": Moments,
    }
    statistics = [builders[name]() for name in dict.fromkeys(kind.needs for kind in chosen)]
    if section.group:
        statistics.append(_groups(section.group, spec, scaling))
        chosen.append(_Kind("groups", _CLASSES, formulas.disparities))
    rows = spec.input_shape[0] if spec.target == "tokens" else 1
    return PooledMetrics(tuple(statistics), tuple(chosen), rows, "confusion-matrix" in section.metrics)


def common_scaling(data: FederatedData) -> Scaling | None:
    """The scaling of inputs that is the same on every client; None for none."""
    return data.preparation.moments if isinstance(data, PartitionedData) else None


def _suitable(name: MetricName, spec: DataSpec) -> _Kind:
    kind = _KINDS[name]
    if _fits(kind, spec):
        return kind
    allowed = [other for other, its in _KINDS.items() if _fits(its, spec)]
    targets = {"class": f"{spec.num_classes} classes", "number": "numbers", "tokens": "tokens"}[spec.target]
    raise InputError(
        f"a metric of evaluation.metrics is not for targets that are {targets}",
        got=name,
        expected=f"some of {', '.join(allowed)}",
    )


def _fits(kind: _Kind, spec: DataSpec) -> bool:
    return spec.target in kind.targets and (spec.num_classes == 2 or not kind.binary)


def _groups(section: GroupSection, spec: DataSpec, scaling: Scaling | None) -> Groups:
    if spec.target != "class" or not spec.feature_names:
        raise InputError(
            "evaluation.group compares groups of rows of a table with classes to predict",
            got=f"targets that are {spec.target}, inputs of shape {spec.input_shape}",
            hint="Leave it out",
        )
    if section.column not in spec.feature_names:
        raise InputError(
            "the data have no such feature",
            got=f"evaluation.group.column = {section.column}",
            hint=nearest(section.column, spec.feature_names),
        )
    column, above = spec.feature_names.index(section.column), section.above
    if scaling is not None:
        mean, std = (values.expand(spec.input_shape)[column].item() for values in (scaling.mean, scaling.std))
        above = (above - mean) / std
    return Groups(spec.num_classes, column, above)
