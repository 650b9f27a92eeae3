"""A comparison as tables, for the terminal and the page, and as one self-contained HTML page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtrain.disk import atomic_write
from fedtrain.errors import InputError, MissingExtraError, shorten
from fedtrain.experiment.evaluation import higher_is_better
from fedtrain.report.compare import Comparison, Group, Point, Stat
from fedtrain.report.drawing import (
    BYTES,
    LONGER,
    can_draw,
    draw_band,
    draw_line,
    figure,
    mark,
    scale_metric,
    scaled,
)
from fedtrain.report.tables import MOST_ROWS, data_uri, thinned
from fedtrain.report.text import show_bytes, show_epsilon, show_metric, show_seconds
from fedtrain.report.view import SERIES

__all__ = ["Table", "headline", "tables", "write_page"]

_COLOURS = [f"#f1000{i}" for i in range(8)]  # stand-ins for the page's --group-0 to --group-7
_SIDE_BY_SIDE = 4  # groups whose values of a field stand in a column each
_MARK = '<meta name="generator" content="fedtrain compare">'


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1  # first columns that are words; the others are numbers


def headline(of: Comparison) -> list[str]:
    """Say in some sentences what is compared and who is ahead."""
    runs = sum(len(group.runs) for group in of.groups)
    what = f"{_count(runs, 'run')} in {_count(len(of.groups), 'group')}, by {_name(of)}."
    lines = [what]
    finals = [(group, group.final) for group in of.groups]
    known = [(group, final) for group, final in finals if final is not None and math.isfinite(final.mean)]
    if len(known) > 1:
        pick = max if higher_is_better(of.metric) else min
        group, final = pick(known, key=lambda pair: pair[1].mean)
        lines.append(f"Best at the end: {_value(of.metric, final)} with {group.label}.")
    if any(len(group.runs) > 1 for group in of.groups):
        lines.append("Numbers are means over a group's runs, \N{PLUS-MINUS SIGN} their standard deviation.")
    doubled = [group.label for group in of.groups if len(set(group.seeds)) < len(group.seeds)]
    if doubled:
        lines.append(f"The same seed counts more than once in: {'; '.join(doubled)}.")
    if of.unfinished:
        lines.append(f"Not finished: {'; '.join(of.unfinished)}.")
    return lines


def tables(of: Comparison) -> list[Table]:
    """Put a comparison into tables: results, what it took to the target, and what sets the groups apart."""
    found = [_results(of)]
    if of.target is not None:
        found.append(_costs(of))
    if of.differences:
        found.append(_differences(of))
    return found


def write_page(of: Comparison, path: Path) -> None:
    """Write the page of a comparison, in place of an older one.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        InputError: the file cannot be written, or is another one.
    """
    page = _render(of).encode("utf-8", errors="replace")
    try:
        if path.exists() and _MARK.encode() not in path.read_bytes():
            raise InputError("this file is no comparison of fedtrain's", got=path, hint="Name another one")
        atomic_write(path, lambda file: file.write(page))
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror})", hint="Name a file in a folder that exists and can be written"
        ) from error


def _results(of: Comparison) -> Table:
    metric = of.metric
    columns: list[tuple[bool, str, Callable[[Group], str]]] = [
        (True, "Seeds", _seeds),
        (True, "Final", lambda g: _value(metric, g.final)),
        (True, "Best", lambda g: _value(metric, g.best)),
        (_has(of, lambda g: g.worst_tenth), of.worst.capitalize(), lambda g: _value(metric, g.worst_tenth)),
        (_has(of, lambda g: g.epsilon), "Epsilon", _epsilon),
        (True, "Up", lambda g: _shown(g.total(lambda r: r.bytes_up), show_bytes)),
        (True, "Down", lambda g: _shown(g.total(lambda r: r.bytes_down), show_bytes)),
    ]
    shown = [(name, show) for is_shown, name, show in columns if is_shown]
    return Table(
        f"Results: {_name(of)}",
        ("Group", *(name for name, _ in shown)),
        tuple((group.label, *(show(group) for _, show in shown)) for group in of.groups),
    )


def _costs(of: Comparison) -> Table:
    which = "the experiments' target" if of.target_is_goal else "the best value that every run reached"
    clock: Callable[[Point], float] = (lambda p: p.virtual_seconds) if of.clock else (lambda p: p.seconds)
    reads: list[tuple[str, Callable[[Point], float], Callable[[float], str]]] = [
        ("Rounds", lambda p: p.round_number, lambda value: f"{value:.1f}".removesuffix(".0")),
        ("Up", lambda p: p.bytes_up, show_bytes),
        ("Down", lambda p: p.bytes_down, show_bytes),
        ("Virtual time" if of.clock else "Time measured", clock, show_seconds),
    ]

    def row(group: Group) -> tuple[str, ...]:
        reached = group.to_target(lambda p: p.round_number)
        told = f"{reached.runs if reached else 0} of {len(group.runs)}"
        return (group.label, told, *(_shown(group.to_target(read), show) for _, read, show in reads))

    return Table(
        f"To {shorten(of.metric, 40)} {show_metric(of.metric, of.target)}, {which}",
        ("Group", "Runs there", *(name for name, _, _ in reads)),
        tuple(map(row, of.groups)),
    )


def _differences(of: Comparison) -> Table:
    title = "What sets the groups apart"
    if len(of.groups) <= _SIDE_BY_SIDE:
        rows = tuple((d.path, *(shorten(value) or "-" for value in d.values)) for d in of.differences)
        return Table(title, ("Field", *(group.label for group in of.groups)), rows, words=1 + len(of.groups))
    by_group = zip(*(d.values for d in of.differences))
    rows = tuple(
        (group.label, *(shorten(value) or "-" for value in values)) for group, values in zip(of.groups, by_group)
    )
    return Table(title, ("Group", *(d.path for d in of.differences)), rows, words=1 + len(of.differences))


def _name(of: Comparison) -> str:
    return f"{shorten(of.metric, 40)} on the {SERIES[of.part]}"


def _seeds(group: Group) -> str:
    listed = ", ".join(map(str, group.seeds))
    return listed if len(listed) <= 12 else str(len(group.seeds))


def _epsilon(group: Group) -> str:
    return _shown(group.epsilon, show_epsilon) + (" NOT PRIVATE" if group.not_private else "")


def _value(metric: str, stat: Stat | None) -> str:
    return _shown(stat, lambda value: show_metric(metric, value))


def _shown(stat: Stat | None, show: Callable[[float], str]) -> str:
    if stat is None:
        return "-"
    mean, deviation = show(stat.mean), show(stat.deviation) if stat.deviation else ""
    if not deviation:
        return mean
    unit = re.sub(r"^[\d.,]+", "", deviation)
    return f"{mean.removesuffix(unit) if unit else mean} \N{PLUS-MINUS SIGN} {deviation}"


def _has(of: Comparison, number: Callable[[Group], Stat | None]) -> bool:
    return any(number(group) is not None for group in of.groups)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _render(of: Comparison) -> str:
    try:
        import jinja2
        import matplotlib  # noqa: F401 - the charts need it
    except ImportError as error:
        raise MissingExtraError(error.name or "jinja2", "report", "The page of a comparison") from error
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": shorten}
    report = (here / "report.html").read_text(encoding="utf-8")
    return environment.get_template("compare.html").render(
        mark=_MARK,
        style=report.partition("<style>")[2].partition("</style>")[0],  # one look for both pages
        **_context(of),
    )


def _context(of: Comparison) -> dict[str, Any]:
    drawn = _drawn(of)
    curves = [(i, group.label, group.mean_curve()) for i, group in enumerate(of.groups)]
    return {
        "title": " · ".join(dict.fromkeys(run.experiment.name for group in of.groups for run in group.runs)),
        "versions": ", ".join(dict.fromkeys(run.manifest.fedtrain for group in of.groups for run in group.runs)),
        "headline": headline(of),
        "metric": of.metric,
        "keys": [(i, of.groups[position].label) for i, position in enumerate(drawn)],
        "colours": {position: i for i, position in enumerate(drawn)},
        "banded": any(len(of.groups[position].runs) > 1 for position in drawn),
        "target": "" if of.target is None else "target" if of.target_is_goal else "best value that every run reached",
        "left_out": len(of.groups) - len(drawn),
        "charts": _charts(of, [(i, curves[position][2]) for i, position in enumerate(drawn)]),
        "curves_csv": data_uri(_curve_rows(of, [(label, curve) for _, label, curve in curves])),
        "tables": [(table, data_uri([table.header, *table.rows])) for table in tables(of)],
        "runs": list(_run_rows(of)),
        "runs_csv": data_uri([_RUN_COLUMNS, *_run_rows(of)]),
        "run_columns": _RUN_COLUMNS,
    }


def _drawn(of: Comparison) -> list[int]:
    """Positions of the groups in the charts: all, or as many of the best as there are colours."""
    measured = [(i, final) for i, final in enumerate(group.final for group in of.groups) if final is not None]
    sign = -1 if higher_is_better(of.metric) else 1
    best = sorted(measured, key=lambda pair: sign * pair[1].mean if math.isfinite(pair[1].mean) else math.inf)
    return sorted(position for position, _ in best[: len(_COLOURS)])


_Curve = list[tuple[Point, float, float]]


def _charts(of: Comparison, curves: Sequence[tuple[int, _Curve]]) -> list[str]:
    """Draw the metric over rounds, over bytes moved and over time."""
    flat = [point for _, curve in curves for point, _, _ in curve]
    longest = np.array([p.virtual_seconds if of.clock else p.seconds for p in flat])
    moved_label, _ = scaled(np.array([float(p.moved) for p in flat]), BYTES, "{} moved, both ways")
    time_label, _ = scaled(longest, LONGER, "{} on the virtual clock" if of.clock else "{} measured", "seconds")
    byte_size = next((size for size, unit in BYTES if moved_label.startswith(unit)), 1.0)
    second_size = next((size for size, unit in LONGER if time_label.startswith(unit)), 1.0)
    axes: list[tuple[str, Callable[[Point], float]]] = [
        ("rounds", lambda p: p.round_number),
        (moved_label, lambda p: p.moved / byte_size),
        (time_label, lambda p: (p.virtual_seconds if of.clock else p.seconds) / second_size),
    ]
    return [_chart(of, curves, label, read) for label, read in axes]


def _chart(of: Comparison, curves: Sequence[tuple[int, _Curve]], x_label: str, read: Callable[[Point], float]) -> str:
    with figure(x_label, (3.5, 2.9)) as (drawing, finish):
        axes = drawing.subplots()
        for colour, curve in curves:
            x = np.array([read(point) for point, _, _ in curve])
            values, low, high = (
                np.array([value if can_draw(value) else math.nan for value in series])
                for series in zip(*((point.value, least, most) for point, least, most in curve))
            )
            if (low < high).any():
                draw_band(axes, x, np.array([low, high]), _COLOURS[colour])
            draw_line(axes, x, values, (_COLOURS[colour], 1.6))
        mark(axes, of.target)
        axes.set_title(shorten(of.metric, 40))
        scale_metric(axes, of.metric)
        axes.set_xlabel(x_label)
        axes.locator_params(axis="x", nbins=6, integer=x_label == "rounds")
        return re.sub(r"#f1000(\d)", r"var(--group-\1)", finish())


def _curve_rows(of: Comparison, curves: Sequence[tuple[str, _Curve]]) -> list[list[object]]:
    name = f"{of.part}_{of.metric}"
    header: list[object] = ["group", "round", f"mean_{name}", "least", "most", "bytes_up", "bytes_down", "seconds"]
    rows: list[list[object]] = [
        [label, p.round_number, p.value, least, most, p.bytes_up, p.bytes_down, p.seconds, p.virtual_seconds]
        for label, curve in curves
        for p, least, most in curve
    ]
    return [[*header, "virtual_seconds"], *thinned(rows)]


_RUN_COLUMNS = ("Run", "Group", "Seed", "Status", "Rounds", "Final", "Best")


def _run_rows(of: Comparison) -> Iterator[tuple[str, ...]]:
    for group in of.groups:
        runs = zip(group.names, group.runs, group.curves, group.finals)
        for name, run, curve, final in list(runs)[:MOST_ROWS]:
            alone = Group(group.label, (name,), (run,), (curve,), (final,), of.target, of.metric)
            done = max((record.round_number for record in run.records), default=0)
            yield (
                shorten(name, 200),
                group.label,
                str(run.experiment.seed),
                shorten(run.manifest.status),
                f"{done} of {run.experiment.rounds}",
                _value(of.metric, alone.final),
                _value(of.metric, alone.best),
            )
