"""The charts of how the model got better, of how the data lies and of how each client fares in the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedtrain.errors import shorten
from fedtrain.experiment.evaluation import higher_is_better
from fedtrain.records import DataSummary, RoundRecord
from fedtrain.report.drawing import (
    BYTES,
    CENTRAL,
    CLIENTS,
    CROWDED,
    LARGEST,
    LONGER,
    MUTED,
    PERSONAL,
    PRIVACY,
    TRAIN,
    can_draw,
    draw_heat,
    draw_line,
    figure,
    mark,
    name_clients,
    scale_metric,
    scaled,
)
from fedtrain.report.view import SERIES, ClientScore, Facts, RunView, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["convergence", "label_map", "largest_share", "per_client", "spending"]

_LINES = {"central": (CENTRAL, 1.8), "clients": (CLIENTS, 1.4), "personal": (PERSONAL, 1.4), "train": (TRAIN, 1.1)}


def convergence(run: RunView, facts: Facts) -> list[str]:
    """Draw metric and loss over rounds, over bytes moved, over time, and over virtual time where there is any.

    Returns:
        an SVG element each.
    """
    records = run.records
    moved = np.cumsum([float(r.bytes_up + r.bytes_down) for r in records])
    seconds = np.cumsum([r.seconds_train + r.seconds_evaluate for r in records])
    axes: list[tuple[str, npt.NDArray[np.float64]]] = [
        ("rounds", np.array([float(r.round_number) for r in records])),
        scaled(moved, BYTES, "{} moved, both ways"),
        scaled(seconds, LONGER, "{}", "seconds"),
    ]
    width = 3.5
    if facts.virtual_seconds:
        virtual = np.cumsum([r.virtual_seconds for r in records])
        axes.append(scaled(virtual, LONGER, "{} on the virtual clock", "seconds"))
        width = 5.4  # two charts side by side rather than three
    return [_convergence_chart(run, facts, label, x, width, f"convergence-{i}") for i, (label, x) in enumerate(axes)]


def spending(run: RunView, facts: Facts) -> list[str]:
    """Draw epsilon over rounds, and what it bought: the central metric over epsilon, where that was measured.

    Args:
        run: a private one.
        facts: names the metric.

    Returns:
        an SVG element each; none where nothing was spent yet.
    """
    records = [r for r in run.records if r.epsilon is not None and can_draw(r.epsilon)]
    epsilons = np.array([r.epsilon for r in records], dtype=np.float64)
    if not epsilons.any():
        return []
    with figure("epsilon", (5.4, 2.4)) as (drawing, finish):
        axes = drawing.subplots()
        draw_line(axes, np.array([r.round_number for r in records], dtype=np.float64), epsilons, (PRIVACY, 1.8))
        mark(axes, run.privacy.planned_epsilon if run.privacy else None)
        axes.set_title("epsilon")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rounds")
        axes.locator_params(axis="x", integer=True)
        charts = [finish()]
    if facts.final is None:
        return charts
    with figure("bought", (5.4, 2.4)) as (drawing, finish):
        axes = drawing.subplots()
        _line(axes, epsilons, records, "central", facts.metric)
        axes.set_title(f"central {shorten(facts.metric, 40)}")
        scale_metric(axes, facts.metric)
        axes.set_xlabel("epsilon")
        return [*charts, finish()]


def label_map(data: DataSummary) -> str:
    """Draw each client's label mix as a column of a heat map, with the clients' sizes above.

    Returns:
        an SVG element; full colour is `largest_share(data)`.
    """
    shares = _shares(data).T
    labels = [shorten(name, 18) for name in data.label_names]
    height = 1.5 + min(max(len(labels) * 0.19, 1.2), 4.0)
    with figure("labels", (7.2, height)) as (drawing, finish):
        sizes, heat = drawing.subplots(2, 1, sharex=True, height_ratios=[0.55, height - 1.2])
        sizes.bar(range(len(data.shown_sizes)), data.shown_sizes, width=0.82, color=MUTED, linewidth=0)
        sizes.set_title("examples")
        sizes.tick_params(bottom=False)
        sizes.locator_params(axis="y", nbins=2)
        draw_heat(heat, shares / max(largest_share(data), 1e-9), "share of the client's examples with each label")
        step = math.ceil(len(labels) / 24)
        heat.set_yticks(range(0, len(labels), step), labels[::step])
        name_clients(heat, data.shown_clients)
        return finish()


def largest_share(data: DataSummary) -> float:
    """The share of a client's examples, 0 to 1, that full colour stands for in `label_map`."""
    return float(_shares(data).max(initial=0.0))


def per_client(scores: Sequence[ClientScore], facts: Facts) -> str:
    """Draw each client's result, the worst first, each dot as large as the client; rings are personal models.

    Args:
        scores: the worst first; those without a value that can be drawn are left out.
        facts: names the metric and the mean over the clients.

    Returns:
        an SVG element.
    """
    drawn = [score for score in scores if can_draw(score.value)]
    values = np.array([score.value for score in drawn])
    personal = {i: s.personal for i, s in enumerate(drawn) if s.personal is not None and can_draw(s.personal)}
    with figure("clients", (7.2, 2.9)) as (drawing, finish):
        axes = drawing.subplots()
        title = f"{shorten(facts.metric, 40)}, worst client first"
        if len(drawn) > CROWDED:
            draw_line(axes, np.arange(len(drawn), dtype=np.float64), values, (CLIENTS, 2.4))
            # In an order of their own: one client's gain cannot be seen among so many.
            own = sorted(personal.values(), reverse=not higher_is_better(facts.metric))
            if own:
                draw_line(axes, np.linspace(0, len(drawn) - 1, len(own)), np.array(own), (PERSONAL, 2.4))
        else:
            sizes = np.clip(np.nan_to_num([score.num_examples for score in drawn]), 0, LARGEST)
            areas = 14 + 106 * sizes / max(sizes.max(initial=0.0), 1.0)
            axes.scatter(range(len(drawn)), values, s=areas, color=CLIENTS, alpha=0.75, linewidths=0)
            if personal:
                at, own = list(personal), list(personal.values())
                axes.scatter(at, own, s=areas[at], facecolors="none", edgecolors=PERSONAL, linewidths=1.4)
            title += "; the larger a dot, the more examples"
        if mark(axes, facts.clients_mean):
            title += "; dashed: mean of the dots" if personal else "; dashed: mean"
        axes.set_title(title)
        scale_metric(axes, facts.metric)
        name_clients(axes, [score.client for score in drawn])
        return finish()


def _shares(data: DataSummary) -> npt.NDArray[np.float64]:
    """`(shown clients, labels)` shares of each client's examples."""
    counts = np.array(data.label_counts, dtype=np.float64).reshape(len(data.shown_clients), len(data.label_names))
    shares: npt.NDArray[np.float64] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def _convergence_chart(
    run: RunView, facts: Facts, x_label: str, x: npt.NDArray[np.float64], width: float, name: str
) -> str:
    panels = [facts.metric] if facts.metric == "loss" else [facts.metric, "loss"]
    with figure(name, (width, 1.7 * len(panels) + 0.4)) as (drawing, finish):
        column = drawing.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, metric in zip(column, panels):
            for part in reversed(SERIES):  # what matters most lies on top
                _line(axes, x, run.records, part, metric)
            goal = run.experiment.evaluation
            if goal.target_metric == metric:
                mark(axes, goal.target_value)
            axes.set_title(shorten(metric, 40))
            scale_metric(axes, metric)
        column[-1].set_xlabel(x_label)
        column[-1].locator_params(axis="x", integer=x_label == "rounds")
        if len(x) == 1:
            column[-1].set_xticks(x)
        return finish()


def _line(axes: Axes, x: npt.NDArray[np.float64], records: Sequence[RoundRecord], part: str, metric: str) -> None:
    """Draw one series; rounds without it are bridged, what cannot be drawn is a gap."""
    numbers = [measured(r, part) for r in records]
    points = [(i, of[metric]) for i, of in enumerate(numbers) if metric in of]
    if not points:
        return
    at = np.array([i for i, _ in points])
    values = np.array([value if can_draw(value) else math.nan for _, value in points])
    draw_line(axes, x[at], values, _LINES[part])
