"""The commands over many runs. Heavy imports stay inside them, as in `app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtrain.cli.options import AsJson, DataRoot, ExperimentFile
from fedtrain.errors import InputError

__all__ = ["compare", "crossval", "sweep"]


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs' folders.", show_default=False)],
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="FIELD", help="Group runs by this field; by all but the seed unless given."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What to compare; the runs' own metric unless given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PAGE.html", help="The page to write; compare.html unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put runs beside each other: tables, and a page of curves."""
    from fedtrain.cli.compare import compare_runs

    compare_runs(runs, by=by, metric=metric, out=out, as_json=as_json)


def sweep(
    experiment_file: ExperimentFile,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=V1,V2,...",
            help="Values of a field: --set training.optimizer.lr=0.1,0.3, or a TOML array. Repeatable: every "
            "combination is run.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, max=1000, help="Runs of each combination: the file's seed and the next.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the runs; runs/NAME-sweep unless given."),
    ] = None,
    data_root: DataRoot = None,
    trials: Annotated[
        int | None,
        typer.Option("--optuna", metavar="N", min=1, help="Let Optuna choose N combinations; needs fedtrain[sweep]."),
    ] = None,
    minimize: Annotated[
        str | None, typer.Option("--minimize", metavar="METRIC", help="What Optuna makes small, such as loss.")
    ] = None,
    maximize: Annotated[
        str | None, typer.Option("--maximize", metavar="METRIC", help="What Optuna makes large, such as accuracy.")
    ] = None,
    ranges: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="KEY=LOW:HIGH[:log]", help="Numbers for Optuna to choose from. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs; train nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the comparison's path at the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run many variants of an experiment and compare them. The same command again goes on."""
    from fedtrain.cli.sweep import SweepOptions, sweep

    if quiet and as_json:
        raise InputError("--quiet and --json are two ways to print a sweep", hint="Leave one of them out")
    options = SweepOptions(
        values=values or (),
        seeds=seeds,
        out=out,
        data_root=data_root,
        trials=trials,
        minimize=minimize,
        maximize=maximize,
        ranges=ranges or (),
        dry_run=dry_run,
        quiet=quiet,
        as_json=as_json,
    )
    sweep(experiment_file, options)


def crossval(
    experiment_file: ExperimentFile,
    folds: Annotated[
        int | None, typer.Option("--folds", metavar="K", min=2, max=1000, help="Parts of each client's rows; 5.")
    ] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Hold out one client at a time in place of folds.")
    ] = False,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=V1,V2,...", help="As for sweep: each combination is validated. Repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="Runs of each fold.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the runs; runs/NAME-crossval unless given.")
    ] = None,
    data_root: DataRoot = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs; train nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the result.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cross-validate an experiment. By folds of the clients' rows, or by clients; goes on where it was stopped."""
    from fedtrain.cli.crossval import crossval
    from fedtrain.cli.sweep import SweepOptions

    if quiet and as_json:
        raise InputError("--quiet and --json are two ways to print a sweep", hint="Leave one of them out")
    if leave_one_out and folds is not None:
        raise InputError("--folds and --leave-one-out contradict each other", hint="Give one of them")
    options = SweepOptions(
        values=values or (),
        seeds=seeds,
        out=out,
        data_root=data_root,
        dry_run=dry_run,
        quiet=quiet,
        as_json=as_json,
    )
    crossval(experiment_file, None if leave_one_out else folds or 5, options)
