"""How a report draws: inline SVG whose colours and fonts are the page's.

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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ALARM",
    "BYTES",
    "CENTRAL",
    "CLIENTS",
    "CROWDED",
    "HEAT",
    "INK",
    "LARGEST",
    "LONGER",
    "MUTED",
    "PERSONAL",
    "PRIVACY",
    "RULE",
    "TRAIN",
    "can_draw",
    "draw_band",
    "draw_heat",
    "draw_line",
    "figure",
    "grouped",
    "mark",
    "name_clients",
    "scale_metric",
    "scaled",
]

_COLOURS = {
    "#f00001": "var(--ink)",
    "#f00002": "var(--muted)",
    "#f00003": "var(--rule)",
    "#f00004": "var(--central)",
    "#f00005": "var(--clients)",
    "#f00006": "var(--personal)",
    "#f00007": "var(--train)",
    "#f00008": "var(--privacy)",
    "#f00009": "var(--alarm)",
}
INK, MUTED, RULE, CENTRAL, CLIENTS, PERSONAL, TRAIN, PRIVACY, ALARM = _COLOURS
HEAT = (0x2B, 0x7B, 0xBA)
"""Red, green, blue of a heat map's full colour: a mid blue that reads on white and on black."""
CROWDED = 400
"""Points; above that a thin line says as much as dots."""
LONGER = [(3600.0, "hours"), (60.0, "minutes")]
"""Units of time that are longer than a second."""
BYTES = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
"""Units of an amount that are larger than a byte."""
LARGEST = 1e100
"""Bound of what is drawn: squares of larger values overflow in the layout."""
_MOST_NAMES = 30  # on an axis
_MOST_POINTS = 1000  # of a line

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a client may be called "$\\x$"
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "path.simplify_threshold": 0.5,
}


def can_draw(value: float) -> bool:
    """Tell whether a value has a place on an axis; a client may claim any float."""
    return abs(value) < LARGEST


def grouped(values: npt.NDArray[np.float64], most: int = 100) -> npt.NDArray[np.float64]:
    """Take means over groups of neighbours, equally many each but the last, so that at most `most` are left.

    Args:
        values: `(N, ...)`.
        most: groups.

    Returns:
        `(groups, ...)`; NaN where a group holds a NaN.
    """
    if len(values) <= most:
        return values
    starts = np.arange(0, len(values), math.ceil(len(values) / most))
    sizes = np.diff([*starts, len(values)])
    means: npt.NDArray[np.float64] = np.add.reduceat(values, starts, axis=0)
    return means / sizes.reshape(-1, *(1 for _ in values.shape[1:]))


def draw_line(axes: Axes, x: npt.NDArray[np.float64], values: npt.NDArray[np.float64], look: tuple[str, float]) -> None:
    """Draw a line of a colour and a width, thin where it is crowded and with dots where it is short."""
    colour, width = look
    width *= 0.6 if len(values) > CROWDED else 1
    marker = "o" if len(values) <= 12 else ""
    kept = _extremes(values)
    axes.plot(x[kept], values[kept], color=colour, linewidth=width, marker=marker, markersize=3.2)


def draw_band(axes: Axes, x: npt.NDArray[np.float64], bounds: npt.NDArray[np.float64], colour: str) -> None:
    """Shade what lies between two lines.

    Args:
        axes: to draw on.
        x: `(N,)`.
        bounds: `(2, N)` lower and upper bound.
        colour: of the shade.
    """
    if len(x) == 1:
        axes.vlines(x, *bounds, color=colour, alpha=0.3, linewidth=6)
        return
    points = grouped(np.column_stack([x, *bounds]), CROWDED).T
    axes.fill_between(*points, color=colour, alpha=0.18, linewidth=0)


def draw_heat(axes: Axes, shades: npt.NDArray[np.float64], title: str) -> None:
    """Draw a heat map as one image.

    Args:
        axes: to draw on.
        shades: `(rows, columns)` from 0, no colour, to 1, full colour; NaN is no colour.
        title: above it.
    """
    pixels = np.zeros((*shades.shape, 4), dtype=np.uint8)
    pixels[..., :3] = HEAT
    pixels[..., 3] = np.round(255 * np.nan_to_num(shades).clip(0, 1))
    axes.imshow(pixels, aspect="auto", interpolation="none")
    axes.set_title(title)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def mark(axes: Axes, level: float | None) -> bool:
    """Draw a dashed line at a level, if it can be drawn."""
    if level is None or not can_draw(level):
        return False
    axes.axhline(level, color=MUTED, linewidth=0.9, dashes=(4, 3))
    return True


def scale_metric(axes: Axes, metric: str) -> None:
    """Show accuracies in percent, and other metrics logarithmically where they span more than two decades."""
    values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    elif len(values) and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale("log")
    axes.margins(y=0.08)


def scaled(
    values: npt.NDArray[np.float64], units: list[tuple[float, str]], label: str, smallest: str = "bytes"
) -> tuple[str, npt.NDArray[np.float64]]:
    """Express values in the largest unit that fits their maximum.

    Args:
        values: in the smallest unit.
        units: (size, name) from the largest on.
        label: with {} for the unit.
        smallest: name of the values' own unit.

    Returns:
        The label with its unit, and the values.
    """
    for size, unit in units:
        if values.max(initial=0.0) >= size:
            return label.format(unit), values / size
    return label.format(smallest), values


def name_clients(axes: Axes, clients: Sequence[str]) -> None:
    """Name the clients on the horizontal axis, or tell how many they are."""
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
def figure(name: str, size: tuple[float, float]) -> Iterator[tuple[Figure, Callable[[], str]]]:
    """Open a figure in the report's style, whatever matplotlibrc says; the second value renders it.

    Args:
        name: of its own in the page: the drawing's ids are made from it.
        size: width and height in inches; 3.5, 5.4 and 7.2 wide for a third, a half and two thirds of the page.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    # matplotlib's settings are global: they are put back at the end.
    with style.context(["default", {**_STYLE, "svg.hashsalt": name}]), warnings.catch_warnings():
        # The browser has glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn, lambda: _inline_svg(drawn)


def _extremes(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Positions of the points to draw: all, or the lowest and the highest of each of many stretches."""
    if len(values) <= _MOST_POINTS:
        return np.arange(len(values))
    parts = np.array_split(np.arange(len(values)), _MOST_POINTS // 2 - 1)
    gaps = np.isnan(values)
    low, high = np.where(gaps, np.inf, values), np.where(gaps, -np.inf, values)
    peaks = [int(part[pick]) for part in parts for pick in (low[part].argmin(), high[part].argmax())]
    return np.unique([0, *peaks, len(values) - 1])


def _inline_svg(drawn: Figure) -> str:
    """Render to an SVG element that may stand in a page beside others: no namespaces, foreign styles or shared ids."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Figure.savefig would lay everything out twice.
    FigureCanvasSVG(drawn).print_svg(text, metadata=unnamed)  # type: ignore[no-untyped-call]
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
