"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedtrain.experiment.sections import Experiment

__all__ = ["AsJson", "DataRoot", "ExperimentFile", "Out", "Overrides", "Quiet", "RunArgument", "folders"]

ExperimentFile = Annotated[Path, typer.Argument(help="The experiment file (TOML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: --set training.optimizer.lr=0.1. Repeatable."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        envvar="FEDTRAIN_DATA",
        help="Folder of the built-in data sets, one sub-folder each.",
        show_default=False,
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", help="The run's folder; runs/NAME-HASH unless given.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the report's path at the end.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line and event.")]


def folders(file: Path, experiment: Experiment, data_root: Path | None) -> tuple[Path, Path | None]:
    """The experiment file's folder, and the data root: from the command line, the environment or the file."""
    base = file.absolute().parent
    if data_root is None and experiment.run.data_root is not None:
        data_root = base / Path(experiment.run.data_root).expanduser()
    return base, data_root
