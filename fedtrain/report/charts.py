"""The report's charts, as inline SVG whose colours and fonts are the page's.

Charts are drawn in stand-in colours, each of which becomes a CSS variable of report.html; hence they follow a light or
a dark theme. Text stays text: it can be searched and takes the page's font.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from fedtrain.errors import shorten
from fedtrain.records import DataSummary, RoundRecord
from fedtrain.report.view import SERIES, ClientScore, Facts, RunView, higher_is_better, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["can_draw", "convergence", "label_map", "largest_share", "per_client", "spending"]

_COLOURS = {
    "#f00001": "var(--ink)",
    "#f00002": "var(--muted)",
    "#f00003": "var(--rule)",
    "#f00004": "var(--central)",
    "#f00005": "var(--clients)",
    "#f00006": "var(--personal)",
    "#f00007": "var(--train)",
    "#f00008": "var(--privacy)",
}
_INK, _MUTED, _RULE, _CENTRAL, _CLIENTS, _PERSONAL, _TRAIN, _PRIVACY = _COLOURS
_LINES = {"central": (_CENTRAL, 1.8), "clients": (_CLIENTS, 1.4), "personal": (_PERSONAL, 1.4), "train": (_TRAIN, 1.1)}
_HEAT = (0x2B, 0x7B, 0xBA)  # a mid blue that reads on white and on black
_MOST_NAMES = 30  # on an axis
_CROWDED = 400  # points; above that a thin line says as much as dots
_LONGER = [(3600.0, "hours"), (60.0, "minutes")]
_LARGEST = 1e100  # squares of larger values overflow in the layout

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a client may be called "$\\x$"
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.titlecolor": _INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "path.simplify_threshold": 0.5,
}


def can_draw(value: float) -> bool:
    """Tell whether a value has a place on an axis; a client may claim any float."""
    return abs(value) < _LARGEST


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
        _scaled(moved, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")], "{} moved, both ways"),
        _scaled(seconds, _LONGER, "{}", "seconds"),
    ]
    width = 3.5
    if facts.virtual_seconds:
        virtual = np.cumsum([r.virtual_seconds for r in records])
        axes.append(_scaled(virtual, _LONGER, "{} on the virtual clock", "seconds"))
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
    with _figure("epsilon", (5.4, 2.4)) as (figure, finish):
        axes = figure.subplots()
        _draw_line(axes, np.array([r.round_number for r in records], dtype=np.float64), epsilons, (_PRIVACY, 1.8))
        _mark(axes, run.privacy.planned_epsilon if run.privacy else None)
        axes.set_title("epsilon")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rounds")
        axes.locator_params(axis="x", integer=True)
        charts = [finish()]
    if facts.final is None:
        return charts
    with _figure("bought", (5.4, 2.4)) as (figure, finish):
        axes = figure.subplots()
        _line(axes, epsilons, records, "central", facts.metric)
        axes.set_title(f"central {shorten(facts.metric, 40)}")
        _scale_metric(axes, facts.metric)
        axes.set_xlabel("epsilon")
        return [*charts, finish()]


def label_map(data: DataSummary) -> str:
    """Draw each client's label mix as a column of a heat map, with the clients' sizes above.

    Returns:
        an SVG element; full colour is `largest_share(data)`.
    """
    shares = _shares(data).T
    pixels = np.zeros((*shares.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.round(255 * shares / max(largest_share(data), 1e-9))
    labels = [shorten(name, 18) for name in data.label_names]
    height = 1.5 + min(max(len(labels) * 0.19, 1.2), 4.0)
    with _figure("labels", (7.2, height)) as (figure, finish):
        sizes, heat = figure.subplots(2, 1, sharex=True, height_ratios=[0.55, height - 1.2])
        sizes.bar(range(len(data.shown_sizes)), data.shown_sizes, width=0.82, color=_MUTED, linewidth=0)
        sizes.set_title("examples")
        sizes.tick_params(bottom=False)
        sizes.locator_params(axis="y", nbins=2)
        heat.imshow(pixels, aspect="auto", interpolation="none")
        heat.set_title("share of the client's examples with each label")
        heat.grid(visible=False)
        heat.spines["bottom"].set_visible(False)
        step = math.ceil(len(labels) / 24)
        heat.set_yticks(range(0, len(labels), step), labels[::step])
        _name_clients(heat, data.shown_clients)
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
    with _figure("clients", (7.2, 2.9)) as (figure, finish):
        axes = figure.subplots()
        title = f"{shorten(facts.metric, 40)}, worst client first"
        if len(drawn) > _CROWDED:
            axes.plot(values, color=_CLIENTS, linewidth=1.8)
            # In an order of their own: one client's gain cannot be seen among so many.
            own = sorted(personal.values(), reverse=not higher_is_better(facts.metric))
            if own:
                axes.plot(np.linspace(0, len(drawn) - 1, len(own)), own, color=_PERSONAL, linewidth=1.8)
        else:
            sizes = np.clip(np.nan_to_num([score.num_examples for score in drawn]), 0, _LARGEST)
            areas = 14 + 106 * sizes / max(sizes.max(initial=0.0), 1.0)
            axes.scatter(range(len(drawn)), values, s=areas, color=_CLIENTS, alpha=0.75, linewidths=0)
            if personal:
                at, own = list(personal), list(personal.values())
                axes.scatter(at, own, s=areas[at], facecolors="none", edgecolors=_PERSONAL, linewidths=1.4)
            title += "; the larger a dot, the more examples"
        if _mark(axes, facts.clients_mean):
            title += "; dashed: mean of the dots" if personal else "; dashed: mean"
        axes.set_title(title)
        _scale_metric(axes, facts.metric)
        _name_clients(axes, [score.client for score in drawn])
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
    with _figure(name, (width, 1.7 * len(panels) + 0.4)) as (figure, finish):
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, metric in zip(column, panels):
            for part in reversed(SERIES):  # what matters most lies on top
                _line(axes, x, run.records, part, metric)
            goal = run.experiment.evaluation
            if goal.target_metric == metric:
                _mark(axes, goal.target_value)
            axes.set_title(shorten(metric, 40))
            _scale_metric(axes, metric)
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
    _draw_line(axes, x[at], values, _LINES[part])


def _draw_line(
    axes: Axes, x: npt.NDArray[np.float64], values: npt.NDArray[np.float64], look: tuple[str, float]
) -> None:
    """Draw a line of a colour and a width, thin where it is crowded and with dots where it is short."""
    colour, width = look
    width *= 0.6 if len(values) > _CROWDED else 1
    marker = "o" if len(values) <= 12 else ""
    axes.plot(x, values, color=colour, linewidth=width, marker=marker, markersize=3.2)


def _mark(axes: Axes, level: float | None) -> bool:
    """Draw a dashed line at a level, if it can be drawn."""
    if level is None or not can_draw(level):
        return False
    axes.axhline(level, color=_MUTED, linewidth=0.9, dashes=(4, 3))
    return True


def _scale_metric(axes: Axes, metric: str) -> None:
    values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    elif len(values) and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale("log")
    axes.margins(y=0.08)


def _scaled(
    values: npt.NDArray[np.float64], units: list[tuple[float, str]], label: str, smallest: str = "bytes"
) -> tuple[str, npt.NDArray[np.float64]]:
    """Express values in the largest unit that fits their maximum."""
    for size, unit in units:
        if values.max(initial=0.0) >= size:
            return label.format(unit), values / size
    return label.format(smallest), values


def _name_clients(axes: Axes, clients: Sequence[str]) -> None:
    axes.set_xlim(-0.5, max(len(clients), 1) - 0.5)
    if len(clients) > _MOST_NAMES:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(clients):,} clients")
        return
    names = [shorten(name, 16) for name in clients]
    rotation = 90 if sum(map(len, names)) > 80 else 0
    axes.set_xticks(range(len(names)), names, rotation=rotation)
    axes.tick_params(axis="x", length=0)


@contextmanager
def _figure(name: str, size: tuple[float, float]) -> Iterator[tuple[Figure, Callable[[], str]]]:
    """Open a figure in the report's style, whatever matplotlibrc says; the second value renders it."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # matplotlib's settings are global: they are put back at the end.
    with style.context(["default", {**_STYLE, "svg.hashsalt": name}]), warnings.catch_warnings():
        # The browser has glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        yield figure, lambda: _inline_svg(figure)


def _inline_svg(figure: Figure) -> str:
    """Render to an SVG element that may stand in a page beside others: no namespaces, foreign styles or shared ids."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Figure.savefig would lay everything out twice.
    FigureCanvasSVG(figure).print_svg(text, metadata=unnamed)  # type: ignore[no-untyped-call]
    root = ElementTree.fromstring(text.getvalue())  # noqa: S314 - our own drawing
    for node in root.iter():
        node.tag = node.tag.partition("}")[2]
        node.attrib = {
            key.rpartition("}")[2]: _restyled(key, value)
            for key, value in node.attrib.items()
            if not (key == "id" and node.tag in ("g", "image"))
        }
        node.tail = None
        node.text = node.text if node.tag == "text" else None
    first = root.find("defs")
    assert first is not None, "matplotlib opens with its style sheet for the whole page"
    root.remove(first)
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode")


def _restyled(key: str, value: str) -> str:
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        return re.sub("|".join(_COLOURS), lambda match: _COLOURS[match[0]], value)
    if key in ("d", "x", "y"):
        return re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", value).replace("\n", "")
    return value
