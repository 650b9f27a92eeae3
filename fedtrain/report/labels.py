"""The label-by-client picture, as text for a terminal and as a drawing for a paper."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len, set_cell_size

from fedtrain.errors import InputError, MissingExtraError, shorten
from fedtrain.records import DataSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "render"]

_MOST_LABELS = 20
_SHADES = " ░▒▓█"
_SHADE_LIMITS = (0.0, 0.05, 0.15, 0.4)  # the largest share of each shade but the last
_BARS = "▁▂▃▄▅▆▇█"
_NAMED_COLUMN = 8  # a column at least this wide has room for its client's name and numbers
_WIDEST_COLUMN = 14
_MOST_NAMED = 20  # clients whose names fit below a drawing
_FORMATS = (".png", ".svg", ".pdf")


def render(summary: DataSummary, width: int = 80) -> list[str]:
    """Describe how the data lies on the clients, as lines of plain text.

    Args:
        summary: what to show.
        width: columns of the terminal; clients that do not fit are left out evenly.

    Returns:
        The figures, then a picture: a row per label, a column per client, shaded by the label's share of the
        client's examples, and the clients' sizes below. Control characters in names are replaced.
    """
    names, shares = _shares(summary)
    left = min(max(cell_len(name) for name in (*names, "examples")), max(width // 3, 8))
    room = max(width - left - 1, 1)
    shown = np.linspace(0, len(shares) - 1, min(len(shares), room)).round().astype(np.int64)
    column = min(room // len(shown), _WIDEST_COLUMN)
    clients = [summary.shown_clients[position] for position in shown]
    sizes = [summary.shown_sizes[position] for position in shown]

    def line(label: str, cells: list[str]) -> str:
        padded = "".join(set_cell_size(cell, column) for cell in cells)
        return f"{set_cell_size(shorten(label, left), left)} {padded}".rstrip()

    named = column >= _NAMED_COLUMN
    picture = [line("", [shorten(client, column - 1) for client in clients])] if named else []
    block = column if column < 3 else column - 1
    for name, row in zip(names, shares[shown].T.tolist()):
        cells = [f"{_shade(share) * 2} {share:4.0%}" if named else _shade(share) * block for share in row]
        picture.append(line(name, cells))
    if named:
        picture.append(line("examples", [f"{size:,}" for size in sizes]))
    else:
        picture.append(line("examples", [_BARS[(8 * size - 1) // max(sizes)] * block for size in sizes]))
        picture.append(" " * (left + 1) + _between(clients[0], clients[-1], column * len(shown)))
    figures = [part for text in _figures(summary) for part in wrap(text, width)]
    legend = [part for text in _legend(summary, len(shown)) for part in wrap(text, width)]
    return [*figures, "", *picture, "", *legend]


def draw(summary: DataSummary, path: Path) -> None:
    """Draw the label-by-client picture: shares as a heat map, sizes as bars above it.

    Args:
        summary: what to draw.
        path: the file to write; its suffix is the format: .png, .svg or .pdf.

    Raises:
        InputError: the suffix is another one.
        MissingExtraError: matplotlib is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(
            "this picture format is not known", got=path.name, expected=f"a name that ends in {', '.join(_FORMATS)}"
        )
    try:
        import matplotlib
    except ImportError as exc:
        raise MissingExtraError("matplotlib", "report", "drawing the label picture") from exc
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix)
    # Text stays text in an SVG, a "$" in a name starts no formula, and the same summary gives the same bytes.
    with (
        matplotlib.rc_context(
            {"svg.fonttype": "none", "svg.hashsalt": "fedtrain", "text.parse_math": False, "font.size": 8}
        ),
        warnings.catch_warnings(),
    ):
        # A name may be in a script that matplotlib's font lacks; it is then drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        _figure(summary).savefig(path, dpi=200, metadata=undated)


def _figure(summary: DataSummary) -> Figure:
    """Lay the drawing out: bars of sizes, below them a row per label, and clients from left to right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names, shares = _shares(summary)
    clients = len(shares)
    heights = [0.6, 0.17 * len(names)] if names else [1.5]
    figure = Figure(figsize=(min(3 + 0.25 * clients, 7), 0.9 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    axes[0].bar(range(clients), summary.shown_sizes, width=0.8 if clients <= _MOST_NAMED else 1, color="0.45")
    axes[0].set_ylabel("examples")
    axes[0].yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes[0].spines[["top", "right"]].set_visible(False)
    if names:
        image = axes[1].imshow(shares.T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes[1].set_yticks(range(len(names)), [shorten(name, 24) for name in names])
        figure.colorbar(image, ax=list(axes), label="share of the client's examples", pad=0.02)
    ticks = np.linspace(0, clients - 1, clients if clients <= _MOST_NAMED else 5).round().astype(np.int64)
    tick_names = [shorten(summary.shown_clients[tick], 24) for tick in ticks]
    crowded = sum(map(len, tick_names)) > 60
    axes[-1].set_xticks(ticks, tick_names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    if clients < summary.num_clients:
        axes[-1].set_xlabel(f"{clients} of {summary.num_clients:,} clients, evenly spaced")
    return figure


def _shares(summary: DataSummary) -> tuple[list[str], NDArray[np.float64]]:
    """Label names and `(shown clients, labels)` shares; beyond 20 labels, the rarest are one label."""
    names = list(summary.label_names)
    counts = np.array(summary.label_counts, dtype=np.float64).reshape(len(summary.shown_sizes), len(names))
    if len(names) > _MOST_LABELS:
        common = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[: _MOST_LABELS - 1])
        rest = counts.sum(axis=1) - counts[:, common].sum(axis=1)
        counts = np.column_stack([counts[:, common], rest])
        names = [*(names[label] for label in common), f"{len(names) - len(common)} others"]
    return names, counts / np.maximum(summary.shown_sizes, 1)[:, None]


def _shade(share: float) -> str:
    return _SHADES[bisect_left(_SHADE_LIMITS, share)]


def _between(first: str, last: str, width: int) -> str:
    """Put two names at the ends of a line."""
    half = max(width // 2 - 1, 1)
    first, last = shorten(first, half), shorten(last, half)
    return first + " " * (width - cell_len(first) - cell_len(last)) + last


def _figures(summary: DataSummary) -> list[str]:
    """What the picture cannot say exactly."""
    sizes = f"Examples per client: {summary.smallest_client:,} to {summary.largest_client:,}"
    lines = [
        f"{shorten(summary.source, 40)}: {summary.num_examples:,} examples on {summary.num_clients:,} clients, "
        f"{summary.num_central_test:,} in the central test set",
        f"{sizes}, median {summary.median_client:,.10g}",
    ]
    if measured := summary.heterogeneity:
        lines[1] += f", Gini {measured.size_gini:.3f}"
        lines.append(
            f"Label skew: L1 {measured.l1:.3f}, Hellinger {measured.hellinger:.3f}, "
            f"Jensen-Shannon {measured.jensen_shannon:.3f} bits"
        )
        lines.append(f"Labels per client: {measured.labels_per_client:.2f} of {len(summary.label_names)}")
    if told := summary.told_left_out():
        lines.append(told)
    return lines


def _legend(summary: DataSummary, columns: int) -> list[str]:
    """How to read the picture."""
    lines = []
    if summary.label_names:
        shades = ", ".join(f"{shade} to {limit:.0%}" for shade, limit in zip(_SHADES[1:], _SHADE_LIMITS[1:]))
        lines.append(f"Share of a client's examples: {shades}, {_SHADES[-1]} above; blank: none.")
    if columns < summary.num_clients:
        lines.append(f"{columns} of {summary.num_clients:,} clients are shown, evenly spaced.")
    return lines
