"""The numbers behind a chart, as a CSV file inside a link."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TypeVar
from urllib.parse import quote

__all__ = ["MOST_ROWS", "data_uri", "thinned"]

_T = TypeVar("_T")

MOST_ROWS = 2000
"""Rows of a table: a page stays below 2 MB."""


def thinned(rows: Sequence[_T], most: int = MOST_ROWS) -> list[_T]:
    """Take at most `most` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    step = (len(rows) - 1) / (most - 1)
    return [rows[round(i * step)] for i in range(most)]


def data_uri(rows: Iterable[Iterable[object]]) -> str:
    """Put a table into a link, as CSV; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return "data:text/csv;charset=utf-8," + quote(text.getvalue(), safe=",-.", errors="replace")


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.7g}"
    # A spreadsheet would run a client's name that looks like a formula.
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value
