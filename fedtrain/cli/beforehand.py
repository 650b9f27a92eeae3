"""The commands that look at an experiment before it is run. Heavy imports stay inside them, as in `app`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedtrain.cli.options import DataRoot, ExperimentFile, Overrides, folders

__all__ = ["audit", "check", "plan"]


def check(
    experiment_file: ExperimentFile,
    overrides: Overrides = None,
    data_root: DataRoot = None,
    client: Annotated[
        str | None, typer.Option("--client", metavar="NAME", help="Whose examples; the largest's unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look for faults of a model and its training. Nothing of a run is touched."""
    from fedtrain.cli.check import check
    from fedtrain.experiment import load

    experiment = load(experiment_file, overrides or ())
    check(experiment, folders(experiment_file, experiment, data_root), client, as_json=as_json)


def plan(
    experiment_file: ExperimentFile,
    overrides: Overrides = None,
    data_root: DataRoot = None,
    pld: Annotated[
        bool, typer.Option("--pld", help="Have a third accountant check epsilon; needs fedtrain[pld].")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a run will cost in bytes, time and privacy. Nothing is trained."""
    from fedtrain.cli.plan import plan
    from fedtrain.experiment import load

    experiment = load(experiment_file, overrides or ())
    plan(experiment, *folders(experiment_file, experiment, data_root), pld=pld, as_json=as_json)


def audit(
    experiment_file: ExperimentFile,
    overrides: Overrides = None,
    data_root: DataRoot = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the one-run audit: seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Test an experiment's privacy by statistics. Fails if what it promises is refuted."""
    from fedtrain.cli.audit import audit
    from fedtrain.experiment import load

    experiment = load(experiment_file, overrides or ())
    audit(experiment, *folders(experiment_file, experiment, data_root), quick=quick, as_json=as_json)
