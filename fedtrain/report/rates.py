"""The curve of a range test of learning rates, as a table and as a drawing."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from fedtrain.disk import atomic_write
from fedtrain.errors import InputError, MissingExtraError
from fedtrain.simulations.range_test import RangeTest

__all__ = ["check_format", "draw", "write"]

_FORMATS = (".png", ".svg", ".pdf")


def check_format(path: Path) -> None:
    """Make sure that a drawing can be written.

    Raises:
        InputError: its suffix is no known format, or its folder does not exist.
    """
    if path.suffix.lower() not in _FORMATS:
        raise InputError(
            "this picture format is not known", got=path.name, expected=f"a name that ends in {', '.join(_FORMATS)}"
        )
    if not path.absolute().parent.is_dir():
        raise InputError("there is no such folder to write into", got=path.absolute().parent)


def write(found: RangeTest, path: Path) -> None:
    """Write rates and losses as CSV, one line per step."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["rate", "loss", "smoothed"])
    table.writerows(zip(found.rates.tolist(), found.losses.tolist(), found.smoothed.tolist(), strict=True))
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def draw(found: RangeTest, path: Path) -> None:
    """Draw loss over rate, with the suggestions.

    Args:
        found: what to draw.
        path: the file to write; its suffix is the format: .png, .svg or .pdf.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "drawing the losses") from error
    from matplotlib.figure import Figure

    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    # Text stays text in an SVG, and the same curve gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedtrain", "font.size": 9}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(found.rates, found.losses, color="0.75", linewidth=1, label="each step")
        axes.plot(found.rates, found.smoothed, color="tab:blue", linewidth=2, label="smoothed")
        for rate, style, label in ((found.steepest, "-", "falls fastest"), (found.least / 10, "--", "least / 10")):
            if rate is not None:
                axes.axvline(rate, color="tab:orange", linestyle=style, linewidth=1, label=f"{label}: {rate:.2g}")
        low, first = float(found.smoothed.min()), float(found.smoothed[0])
        margin = 0.1 * max(first - low, 1e-6 * abs(first), 1e-12)
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        axes.set_ylim(low - margin, first + 5 * margin)  # where it diverges, no scale would show the rest
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=200, metadata=undated)
