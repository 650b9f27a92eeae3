"""`fedtrain data`: fetch data sets, see how they lie on the clients, and how good they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from fedtrain.cli.options import AsJson, DataRoot, ExperimentFile, Overrides, folders
from fedtrain.cli.terminal import fold, say
from fedtrain.errors import InputError, shorten

if TYPE_CHECKING:
    from fedtrain.data.quality import ClientQuality

__all__ = ["app"]

_MOST_SHOWN, _WORST_SHOWN = 20, 10  # clients in the table of --quality
_WIDEST_NAME = 16


class _Column(NamedTuple):
    """A column of the table of --quality."""

    of_client: Callable[[ClientQuality], str]  # "" where its data cannot have that
    of_all: Callable[[Sequence[ClientQuality]], str]
    meaning: str


app = typer.Typer(help="Fetch data sets; describe how they lie on the clients.", no_args_is_help=True)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Data sets to fetch; none: list them.", show_default=False)
    ] = None,
    data_root: DataRoot = None,
    mirror: Annotated[
        str | None, typer.Option("--mirror", help="Base URL to use instead of the official one.", show_default=False)
    ] = None,
) -> None:
    """Download data sets from their official sources. Every byte is checked, and a broken download goes on."""
    from fedtrain.cli.progress import downloads
    from fedtrain.data.fetch import OFFICIAL
    from fedtrain.data.fetch import fetch as fetch_data
    from fedtrain.data.sources import SOURCES

    if not names:
        for name, source in SOURCES.items():
            where = "can be fetched" if name in OFFICIAL else "bring it yourself"
            if not source.needs_root:
                where = "built in"
            elif data_root and _lies_in(data_root, name):
                where = "in the data root"
            say(f"  {name:14} {where:18} {source.summary}", indent=34)
        return
    if data_root is None:
        raise InputError(
            "where to put the data is not known",
            hint="Name a folder: fedtrain data fetch ... --data-root DIR, or set FEDTRAIN_DATA",
        )
    for name in names:
        with downloads() as progress:
            paths = fetch_data(name, data_root, progress, mirror)
        typer.echo(f"{name}: {len(paths)} files in {data_root / name}")


@app.command()
def describe(
    experiment_file: ExperimentFile,
    overrides: Overrides = None,
    data_root: DataRoot = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Also draw it into this .svg, .png or .pdf file.", show_default=False),
    ] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="Look for missing values, duplicates, outliers and wrong labels.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how data lies on the clients. Sizes, labels, how far from IID they are, and how good they are."""
    from fedtrain.data.federated import build
    from fedtrain.experiment import load
    from fedtrain.report.labels import draw, render

    experiment = load(experiment_file, overrides or ())
    base, root = folders(experiment_file, experiment, data_root)
    data = build(experiment.data, root, base, experiment.seed)
    summary, width = data.summary(), min(120, shutil.get_terminal_size().columns)
    if as_json:
        typer.echo(json.dumps({"event": "data", **json.loads(summary.model_dump_json())}))
    else:
        typer.echo("\n".join(render(summary, width)))
    if quality:
        from fedtrain.data.quality import quality as quality_of

        found = quality_of(data.dataset, data.partition, experiment.seed)
        if as_json:
            typer.echo("\n".join(json.dumps({"event": "quality", **asdict(client)}) for client in found))
        else:
            typer.echo("\n".join(["", *_quality_lines(found, width)]))
    if picture is not None:
        draw(summary, picture)
        typer.echo(f"Picture: {picture}")


def _quality_lines(found: Sequence[ClientQuality], width: int) -> list[str]:
    """A table of clients, the worst where there are many, then all together, and what the columns mean."""
    columns = {name: column for name, column in _COLUMNS.items() if any(map(column.of_client, found))}
    shown = list(found)
    if len(found) > _MOST_SHOWN:
        shown = sorted(found, key=_oddness, reverse=True)[:_WORST_SHOWN]
    left = min(max(len("all clients"), *(len(one.client) for one in shown)), _WIDEST_NAME)

    def line(name: str, cells: Sequence[str]) -> str:
        padded = (f"{cell:>{max(len(column), 6)}}" for column, cell in zip(columns, cells))
        return f"{shorten(name, left):{left}} {' '.join(padded)}".rstrip()

    lines = [line("", list(columns))]
    lines += [line(one.client, [column.of_client(one) or "-" for column in columns.values()]) for one in shown]
    lines += [line("all clients", [column.of_all(found) for column in columns.values()])]
    if len(shown) < len(found):
        lines += ["", f"The {len(shown)} worst of {len(found):,} clients, by the largest share of odd rows or values."]
    lines += ["", *_worst_features(found)]
    lines += [f"{name}: {column.meaning}." for name, column in columns.items() if column.meaning]
    return [part for text in lines for part in (fold(text, width).splitlines() if len(text) > width else [text])]


def _worst_features(found: Sequence[ClientQuality]) -> list[str]:
    """Name the features that are missing most, over all clients and where."""
    lacking: dict[str, float] = {}
    for one in found:
        for name, share in one.missing_of.items():
            lacking[name] = lacking.get(name, 0.0) + share * one.rows
    rows = sum(one.rows for one in found)
    worst = sorted(lacking.items(), key=lambda item: -item[1])[:_WORST_SHOWN]
    told = [f"{shorten(name, 30)} {_percent(count / rows)}" for name, count in worst]
    more = f", and {len(lacking) - len(worst)} more" if len(lacking) > len(worst) else ""
    return [f"Missing by feature: {', '.join(told)}{more}.", ""] if told else []


def _oddness(one: ClientQuality) -> float:
    counted = max(one.duplicates, one.elsewhere) / max(one.rows, 1)
    return max(counted, one.missing or 0.0, one.outliers or 0.0, one.label_noise or 0.0)


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def _count(key: str, meaning: str) -> _Column:
    return _Column(
        lambda one: f"{getattr(one, key):,}", lambda found: f"{sum(getattr(one, key) for one in found):,}", meaning
    )


def _share(key: str, meaning: str) -> _Column:
    def of_all(found: Sequence[ClientQuality]) -> str:
        known = [(getattr(one, key), one.rows) for one in found if getattr(one, key) is not None]
        return _percent(sum(share * rows for share, rows in known) / sum(rows for _, rows in known))

    return _Column(lambda one: _percent(getattr(one, key)), of_all, meaning)


_COLUMNS = {
    "rows": _count("rows", ""),
    "missing": _share("missing", "share of the values"),
    "copies": _count("duplicates", "rows equal to an earlier one of the client, target too"),
    "shared": _count("elsewhere", "rows that another client has too"),
    "outliers": _share("outliers", "share of the values more than 5 robust deviations (1.4826 MAD) from the median"),
    "constant": _Column(
        lambda one: "" if one.constant is None else str(len(one.constant)),
        lambda _: "",
        "features with one value on the client; each text of a column is one",
    ),
    "largest": _share("largest_class", "share of the client's most frequent class"),
    "noise": _share(
        "label_noise",
        "share of labels that look wrong: confident learning on 10 nearest neighbours. Classes that overlap count too",
    ),
}


def _lies_in(data_root: Path, source: str) -> bool:
    """Whether a source's files are there, at a glance; what is in them is checked when they are read."""
    from fedtrain.data.fetch import OFFICIAL

    if source in OFFICIAL:
        return all((data_root / source / file.name).exists() for file in OFFICIAL[source].files)
    return (data_root / source.replace("-", "_")).is_dir()
