"""`fedtrain data`: fetch data sets, and see how they lie on the clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtrain.cli.options import DataRoot, ExperimentFile, Overrides, folders
from fedtrain.cli.terminal import say
from fedtrain.errors import InputError

__all__ = ["app"]

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
) -> None:
    """Show how data lies on the clients. Sizes, labels, and how far from IID they are."""
    import shutil

    from fedtrain.data.federated import build
    from fedtrain.experiment import load
    from fedtrain.report.labels import draw, render

    experiment = load(experiment_file, overrides or ())
    base, root = folders(experiment_file, experiment, data_root)
    summary = build(experiment.data, root, base, experiment.seed).summary()
    for line in render(summary, min(120, shutil.get_terminal_size().columns)):
        typer.echo(line)
    if picture is not None:
        draw(summary, picture)
        typer.echo(f"Picture: {picture}")


def _lies_in(data_root: Path, source: str) -> bool:
    """Whether a source's files are there, at a glance; what is in them is checked when they are read."""
    from fedtrain.data.fetch import OFFICIAL

    if source in OFFICIAL:
        return all((data_root / source / file.name).exists() for file in OFFICIAL[source].files)
    return (data_root / source.replace("-", "_")).is_dir()
