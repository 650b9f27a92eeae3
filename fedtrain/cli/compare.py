"""`fedtrain compare`: runs beside each other, as tables, JSON and a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import typer

from fedtrain.cli.running import view_of
from fedtrain.cli.terminal import say
from fedtrain.errors import MissingExtraError
from fedtrain.report.compare import Comparison, Group, Stat, compare
from fedtrain.report.compare_page import Table, headline, tables, write_page
from fedtrain.rundir import RunFolder

__all__ = ["compare_runs", "show"]

_DEFAULT_PAGE = Path("compare.html")


def compare_runs(folders: list[Path], *, by: str | None, metric: str | None, out: Path | None, as_json: bool) -> None:
    """Compare runs, print what came of it and write the page.

    Args:
        folders: of the runs, or that hold runs, as a sweep's does; one that is named twice counts once.
        by: field whose values make the groups; None for all but the seed.
        metric: what to compare; None for the runs' own.
        out: the page; `compare.html` unless given.
        as_json: print one JSON object.

    Raises:
        InputError: a folder is no run, the runs do not go together, or the page cannot be written.
    """
    runs = [run for folder in folders for run in _runs_in(folder)]
    opened = {path.resolve(): (str(path), RunFolder.open(path)) for path in runs}
    found = compare({name: view_of(folder) for name, folder in opened.values()}, by, metric)
    show(found, out or _DEFAULT_PAGE, needs_page=out is not None, how="json" if as_json else "text")


def show(of: Comparison, page: Path, *, needs_page: bool, how: Literal["text", "json", "quiet"]) -> None:
    """Print a comparison and write its page.

    Args:
        of: the comparison.
        page: where to write.
        needs_page: whether packages that are missing for the page are an error, not a note.
        how: as tables, as one JSON object, or the page's path alone.

    Raises:
        InputError: the page cannot be written.
    """
    if how == "text":
        _print_tables(of)
    written: Path | None = page
    try:
        write_page(of, page)
    except MissingExtraError as error:
        if needs_page:
            raise
        written = None
        say(f"note: {error}", err=True)
    if how == "json":
        typer.echo(json.dumps(_document(of, written)))
    elif written:
        typer.echo(str(written) if how == "quiet" else f"\nPage: {written}")


def _runs_in(folder: Path) -> list[Path]:
    if RunFolder(folder).manifest.exists() or not folder.is_dir():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/manifest.json")) or [folder]


def _print_tables(of: Comparison) -> None:
    for line in headline(of):
        say(line)
    for table in tables(of):
        typer.echo(f"\n{table.title}")
        for row in _aligned(table):
            typer.echo(row)


def _aligned(table: Table) -> list[str]:
    """Lines of equal columns: words to the left, numbers to the right; the last column of words is not filled up."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column < table.words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]


def _document(of: Comparison, page: Path | None) -> dict[str, object]:
    return {
        "metric": of.metric,
        "measured_on": of.part,
        "target": _number(of.target),
        "target_is": None if of.target is None else "goal" if of.target_is_goal else "best that every run reached",
        "groups": [_group(group) for group in of.groups],
        "differences": [asdict(difference) for difference in of.differences],
        "page": str(page) if page else None,
    }


def _group(group: Group) -> dict[str, object]:
    return {
        "label": group.label,
        "runs": [
            {"run": name, "seed": run.experiment.seed, "status": run.manifest.status}
            for name, run in zip(group.names, group.runs)
        ],
        "final": _stat(group.final),
        "best": _stat(group.best),
        "worst_tenth": _stat(group.worst_tenth),
        "epsilon": _stat(group.epsilon),
        "not_private": group.not_private,
        "bytes_up": _stat(group.total(lambda r: r.bytes_up)),
        "bytes_down": _stat(group.total(lambda r: r.bytes_down)),
        "to_target": {
            "rounds": _stat(group.to_target(lambda p: p.round_number)),
            "bytes_up": _stat(group.to_target(lambda p: p.bytes_up)),
            "bytes_down": _stat(group.to_target(lambda p: p.bytes_down)),
            "seconds": _stat(group.to_target(lambda p: p.seconds)),
            "virtual_seconds": _stat(group.to_target(lambda p: p.virtual_seconds)),
        },
    }


def _stat(stat: Stat | None) -> dict[str, object] | None:
    return None if stat is None else {name: _number(value) for name, value in asdict(stat).items()}


def _number(value: float | None) -> float | str | None:
    """JSON has no infinities."""
    return value if value is None or math.isfinite(value) else str(value)
