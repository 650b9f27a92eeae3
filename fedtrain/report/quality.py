"""All that was measured of the final model: a table of its metrics, and which classes it takes for which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtrain.errors import shorten
from fedtrain.report.drawing import draw_heat, figure
from fedtrain.report.sections import Chart
from fedtrain.report.tables import data_uri
from fedtrain.report.text import show_metric
from fedtrain.report.view import SERIES, RunView, measured

__all__ = ["Quality", "confusion_chart", "quality"]

_SHOWN = ("central", "clients", "personal")
_MOST_NAMES = 24  # on an axis


@dataclass(frozen=True)
class Quality:
    """A table and heat maps."""

    header: Sequence[str]  # "Metric", and on whose examples
    rows: Sequence[Sequence[str]]  # a metric's name and its values
    charts: Sequence[Chart]


def quality(run: RunView) -> Quality | None:
    """Show every metric's last value; None where only a loss and one metric were measured."""
    last = {part: next((found for r in reversed(run.records) if (found := measured(r, part))), {}) for part in _SHOWN}
    parts = [part for part in _SHOWN if last[part]]
    names = list(dict.fromkeys(name for part in parts for name in last[part]))
    charts = _confusion_charts(run)
    if len(names) <= 2 and not charts:
        return None
    header = ["Metric", *(SERIES[part] for part in parts)]
    return Quality(
        header,
        [(shorten(name, 40), *(show_metric(name, last[part].get(name)) for part in parts)) for name in names],
        charts,
    )


def confusion_chart(counts: Sequence[Sequence[int]], names: Sequence[str], part: str) -> str:
    """Draw a confusion matrix as a heat map.

    Args:
        counts: `(classes, classes)` examples by their class and by the predicted one.
        names: of the classes.
        part: a key of `SERIES`: on whose examples.

    Returns:
        an SVG element; full colour is all examples of a class.
    """
    matrix = np.array(counts, dtype=np.float64)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    labels = [shorten(name, 16) for name in names]
    step = math.ceil(len(labels) / _MOST_NAMES)
    ticks, shown = range(0, len(labels), step), labels[::step]
    with figure(f"confusion-{part}", (5.4, 4.4)) as (drawing, finish):
        axes = drawing.subplots()
        draw_heat(axes, shares, f"share of each class by prediction, {SERIES[part]}")
        axes.set_xticks(ticks, shown, rotation=90 if sum(map(len, shown)) > 40 else 0)
        axes.set_yticks(ticks, shown)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        return finish()


def _confusion_charts(run: RunView) -> list[Chart]:
    charts = []
    for part in ("central", "clients"):
        counts: list[list[int]] = next(
            (found for r in reversed(run.records) if (found := getattr(r, f"{part}_confusion"))), []
        )
        if not counts:
            continue
        known = run.data.label_names if run.data else []
        names = known if len(known) == len(counts) else [str(number) for number in range(len(counts))]
        csv = data_uri([["class", *names], *([name, *row] for name, row in zip(names, counts))])
        svg, label = confusion_chart(counts, names, part), f"Confusion matrix, {SERIES[part]}"
        charts.append(Chart(svg, label, f"confusion-{part}", csv, ramp=("0%", "100%")))
    return charts
