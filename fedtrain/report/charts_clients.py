"""The charts of what unlike data does: to each client's result, and to the updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedtrain.errors import shorten
from fedtrain.report.drawing import (
    CENTRAL,
    CLIENTS,
    INK,
    can_draw,
    draw_band,
    draw_heat,
    draw_line,
    figure,
    mark,
    scale_metric,
)
from fedtrain.report.drift import ClientLink, DriftRound, Quantiles
from fedtrain.report.fairness import Evaluation, Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["diversity", "drift", "forgetting", "grid_range", "heat_of_clients", "links_chart"]

_MOST_NAMES = 30
_PALEST = 0.06  # of a heat map, so that the lowest value is told from none


def forgetting(evaluations: Sequence[Evaluation], metric: str) -> str:
    """Draw how the clients' values spread at each evaluation, and what they had forgotten by then.

    Returns:
        an SVG element.
    """
    x = np.array([e.round_number for e in evaluations], dtype=np.float64)
    worst = np.array([e.worst_tenth if can_draw(e.worst_tenth) else np.nan for e in evaluations])
    lost = np.array([e.forgetting if can_draw(e.forgetting) else np.nan for e in evaluations])
    with figure("forgetting", (5.4, 3.7)) as (drawing, finish):
        above, below = drawing.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        _spread(above, x, [e.spread for e in evaluations], CLIENTS)
        draw_line(above, x, worst, (INK, 1.1))
        above.set_title(f"{shorten(metric, 40)} of the clients")
        scale_metric(above, metric)
        draw_line(below, x, lost, (CLIENTS, 1.6))
        mark(below, 0.0)
        below.set_title("forgetting")
        if metric == "accuracy":
            scale_metric(below, metric)
        _finish_rounds(below)
        return finish()


def grid_range(grid: Grid) -> tuple[float, float]:
    """The lowest and the highest value that is drawn in `heat_of_clients`; NaN where there is none."""
    values = [value for row in grid.values for value in row if can_draw(value)]
    return (min(values), max(values)) if values else (np.nan, np.nan)


def heat_of_clients(grid: Grid, metric: str) -> str:
    """Draw each client's value at each evaluation as a heat map, the client that is worst in the end on top.

    Returns:
        an SVG element; no colour is no value, full colour the highest of `grid_range(grid)`.
    """
    low, high = grid_range(grid)
    values = np.array([[value if can_draw(value) else np.nan for value in row] for row in grid.values])
    shades = _PALEST + (1 - _PALEST) * (values - low) / max(high - low, 1e-9)
    with figure("client-heat", (5.4, 3.7)) as (drawing, finish):
        axes = drawing.subplots()
        draw_heat(axes, shades, f"{shorten(metric, 40)} of each client, the worst in the end on top")
        step = max(len(grid.rounds) // 6, 1)
        axes.set_xticks(range(0, len(grid.rounds), step), [str(number) for number in grid.rounds[::step]])
        axes.set_xlabel("rounds")
        if len(grid.clients) > _MOST_NAMES:
            axes.set_yticks([])
            axes.set_ylabel(f"{len(grid.clients)} clients")
        else:
            axes.set_yticks(range(len(grid.clients)), [shorten(name, 16) for name in grid.clients])
        return finish()


def drift(rounds: Sequence[DriftRound]) -> list[str]:
    """Draw cosines and norm ratios of the updates over rounds.

    Returns:
        an SVG element each.
    """
    x = np.array([r.round_number for r in rounds], dtype=np.float64)
    charts = []
    spreads = (
        ("cosine", "cosine of an update and the mean", [r.cosine for r in rounds]),
        ("ratio", "norm of an update over that of the mean", [r.ratio for r in rounds]),
    )
    for name, title, spread in spreads:
        with figure(f"drift-{name}", (3.5, 2.4)) as (drawing, finish):
            axes = drawing.subplots()
            _spread(axes, x, spread, CENTRAL)
            axes.set_title(title)
            scale_metric(axes, name)
            _finish_rounds(axes)
            charts.append(finish())
    return charts


def diversity(rounds: Sequence[DriftRound]) -> str:
    """Draw gradient diversity over rounds.

    Returns:
        an SVG element.
    """
    x = np.array([r.round_number for r in rounds], dtype=np.float64)
    values = np.array([r.diversity if can_draw(r.diversity) else np.nan for r in rounds])
    with figure("diversity", (3.5, 2.4)) as (drawing, finish):
        axes = drawing.subplots()
        draw_line(axes, x, values, (CENTRAL, 1.6))
        axes.set_title("gradient diversity")
        axes.set_ylim(bottom=0)
        _finish_rounds(axes)
        return finish()


def links_chart(links: Sequence[ClientLink], pick: Callable[[ClientLink], float], title: str, name: str) -> str:
    """Draw a figure of each client over how far its labels are from everybody's.

    Args:
        links: the clients, one at least with both; those without are left out.
        pick: takes the figure.
        title: what it is called; "accuracy" is shown in percent.
        name: of the drawing, its own in the page.

    Returns:
        an SVG element.
    """
    points = np.array([(k.distance, pick(k)) for k in links if can_draw(k.distance) and can_draw(pick(k))])
    with figure(name, (3.5, 2.5)) as (drawing, finish):
        axes = drawing.subplots()
        axes.scatter(points[:, 0], points[:, 1], s=24, color=CLIENTS, alpha=0.75, linewidths=0)
        axes.set_title(shorten(title, 60))
        scale_metric(axes, title)
        axes.set_xlabel("distance of the client's labels, bits")
        return finish()


def _spread(axes: Axes, x: npt.NDArray[np.float64], spread: Sequence[Quantiles], colour: str) -> None:
    """Draw a median as a line, and what lies between the deciles as a shade."""
    low, median, high = np.array(
        [[value if can_draw(value) else np.nan for value in (q.low, q.median, q.high)] for q in spread]
    ).T
    draw_band(axes, x, np.array([low, high]), colour)
    draw_line(axes, x, median, (colour, 1.6))


def _finish_rounds(axes: Axes) -> None:
    axes.set_xlabel("rounds")
    axes.locator_params(axis="x", integer=True)
