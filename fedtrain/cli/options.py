"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtrain.errors import InputError

if TYPE_CHECKING:
    from fedtrain.experiment.sections import Experiment

__all__ = [
    "AsJson",
    "DataRoot",
    "ExperimentFile",
    "Out",
    "Overrides",
    "Quiet",
    "RunArgument",
    "folders",
    "refuse_what_does_nothing",
]

# What no Flower fleet takes, by the parameters of `server`; and what only one takes that is not started here.
_OF_OUR_SERVER = (
    "listen",
    "hosts",
    "enrol",
    "own_data",
    "min_clients",
    "wait",
    "max_clients",
    "metrics",
    "with_clients",
)
_OF_A_SUPERLINK = ("ca", "insecure")

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


def refuse_what_does_nothing(context: typer.Context, *, fleet: bool) -> None:
    """Make sure that no option of `server` is given that would be left aside without a word.

    Args:
        context: of the command.
        fleet: messages travel by a Flower fleet.

    Raises:
        InputError: one is.
    """
    given = {}
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if source is not None and source.name == "COMMANDLINE":
            given[option.name] = option.opts[0]
    if fleet:
        if useless := [given[name] for name in _OF_OUR_SERVER if name in given]:
            raise InputError(
                "a Flower fleet has no such option", got=", ".join(useless), hint="Leave out --runtime flower, or this"
            )
        if "superlink" not in given and (useless := [given[name] for name in _OF_A_SUPERLINK if name in given]):
            raise InputError(
                "a fleet that is started here has no use for this option",
                got=", ".join(useless),
                hint="Leave it out, or name a fleet of yours: --superlink HOST:PORT",
            )
    elif "superlink" in given:
        raise InputError("--superlink is for a Flower fleet", hint="Add --runtime flower, or leave it out")
    elif "enrol" in given and "ca" not in given:
        raise InputError("--enrol needs the authority that certifies sites", hint="Name its folder: --ca DIR")
