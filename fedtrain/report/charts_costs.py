"""The charts of what a run costs: bytes, time on the virtual clock, and whose work is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedtrain.records import RoundRecord
from fedtrain.report.communication import Traffic
from fedtrain.report.drawing import (
    ALARM,
    BYTES,
    CENTRAL,
    CLIENTS,
    INK,
    LONGER,
    MUTED,
    PERSONAL,
    TRAIN,
    draw_line,
    figure,
    grouped,
    mark,
    name_clients,
    scaled,
)
from fedtrain.report.systems import Participation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bytes_by_client", "bytes_by_round", "participation", "rounds_per_bar", "timeline"]

_MOST_BARS = 60
_DIRECTIONS = (CENTRAL, CLIENTS)  # up, down


def bytes_by_round(records: Sequence[RoundRecord], target_round: int | None) -> list[str]:
    """Draw the bytes of each round, and their running total with a mark where the target was reached.

    Returns:
        an SVG element each.
    """
    rounds = np.array([r.round_number for r in records], dtype=np.float64)
    moved = np.array([(r.bytes_up, r.bytes_down) for r in records], dtype=np.float64)
    # The model may be measured before the first round, which moves nothing and is none.
    first = 1 if len(records) > 1 and not rounds[0] and not moved[0].any() else 0
    charts = []
    for name, title, values in (("round", "a round", moved[first:]), ("total", "in total", np.cumsum(moved, axis=0))):
        label, values = scaled(values, BYTES, "{}")
        with figure(f"bytes-{name}", (3.5, 2.4)) as (drawing, finish):
            axes = drawing.subplots()
            for column, colour in zip(values.T, _DIRECTIONS):
                draw_line(axes, rounds[-len(column) :], column, (colour, 1.6))
            if name == "total" and target_round is not None:
                axes.axvline(target_round, color=MUTED, linewidth=0.9, dashes=(4, 3))
            _finish_rounds(axes, f"{label}, {title}")
            charts.append(finish())
    return charts


def bytes_by_client(traffic: Sequence[Traffic]) -> str:
    """Draw each client's bytes of the whole run.

    Args:
        traffic: of each client, the one that moved most first.

    Returns:
        an SVG element.
    """
    label, values = scaled(np.array([(t.up, t.down) for t in traffic], dtype=np.float64), BYTES, "{}")
    with figure("bytes-clients", (3.5, 2.4)) as (drawing, finish):
        axes = drawing.subplots()
        if len(traffic) > _MOST_BARS:
            for column, colour in zip(values.T, _DIRECTIONS):
                draw_line(axes, np.arange(len(traffic), dtype=np.float64), column, (colour, 1.6))
        else:
            _stack(axes, np.arange(len(traffic), dtype=np.float64), list(zip(values.T, _DIRECTIONS)), 0.82)
        axes.set_title(f"{label}, each client in the whole run")
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.5, len(traffic) - 0.5)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(traffic):,} clients")
        return finish()


def timeline(records: Sequence[RoundRecord]) -> str:
    """Draw the rounds of the virtual clock: how long, how much client time was used or wasted, and what was used.

    Args:
        records: of the rounds that took time; beyond 60, neighbours are drawn as one bar of their means.

    Returns:
        an SVG element.
    """
    figures = [
        (
            float(r.round_number),
            r.virtual_seconds,
            r.client_seconds - r.wasted_seconds,
            r.wasted_seconds,
            float(len(r.participants)),
            float(len(r.late)),
            float(len(r.quarantined)),
        )
        for r in records
    ]
    x, length, used, wasted, *cases = grouped(np.array(figures), _MOST_BARS).T
    width = 0.82 * rounds_per_bar(records)
    panels = [("length of the round, {}", [(length, MUTED)])]
    if (used + wasted).any():
        panels.append(("work of the clients, {}", [(used, PERSONAL), (wasted, CLIENTS)]))
    with figure("timeline", (7.2, 1.35 * (len(panels) + 1) + 0.4)) as (drawing, finish):
        *above, below = drawing.subplots(len(panels) + 1, 1, sharex=True)
        for axes, (title, parts) in zip(above, panels):
            label, values = scaled(np.array([part for part, _ in parts]), LONGER, title, "seconds")
            _stack(axes, x, [(part, colour) for part, (_, colour) in zip(values, parts)], width)
            axes.set_title(label)
        _stack(below, x, list(zip(cases, (PERSONAL, TRAIN, ALARM))), width)
        _finish_rounds(below, "updates asked for")
        return finish()


def rounds_per_bar(records: Sequence[RoundRecord]) -> int:
    """Tell how many rounds are drawn as one bar of `timeline`."""
    return math.ceil(len(records) / _MOST_BARS)


def participation(taken: Participation, num_examples: int | None) -> str:
    """Draw each client's share of the updates used, the least used first, beside its share of the examples.

    Args:
        taken: whose updates were used.
        num_examples: of all clients; None if not known.

    Returns:
        an SVG element; the dashed line is an even share.
    """
    unnamed = taken.clients - len(taken.uses)
    names = [*[""] * unnamed, *(use.client for use in taken.uses)]
    shares = np.array([0] * unnamed + [use.used for use in taken.uses]) / taken.updates
    with figure("participation", (7.2, 2.6)) as (drawing, finish):
        axes = drawing.subplots()
        at = np.arange(len(shares), dtype=np.float64)
        if len(shares) > _MOST_BARS:
            draw_line(axes, at, shares, (PERSONAL, 2.2))
        else:
            _stack(axes, at, [(shares, PERSONAL)], 0.82)
        if num_examples:
            known = [(i + unnamed, use.examples) for i, use in enumerate(taken.uses) if use.examples is not None]
            if known:
                places, sizes = np.array(known, dtype=np.float64).T
                axes.scatter(places, sizes / num_examples, s=14, color=INK, linewidths=0, zorder=3)
        mark(axes, taken.even)
        axes.set_title("share of the updates used, least used client first")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        name_clients(axes, names)
        return finish()


def _stack(
    axes: Axes, x: npt.NDArray[np.float64], parts: Sequence[tuple[npt.NDArray[np.float64], str]], width: float
) -> None:
    """Draw bars on top of each other, one colour each."""
    bottom = np.zeros_like(x)
    for values, colour in parts:
        if values.any():
            axes.bar(x, values, bottom=bottom, width=width, color=colour, linewidth=0)
        bottom = bottom + values
    axes.margins(x=0.01)


def _finish_rounds(axes: Axes, title: str) -> None:
    """Name what is drawn over rounds, from 0 on."""
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rounds")
    axes.locator_params(axis="x", integer=True)
