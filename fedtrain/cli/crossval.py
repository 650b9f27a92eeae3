"""`fedtrain crossval`: every fold of a cross-validation, and means over them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import typer

from fedtrain.cli.options import folders
from fedtrain.cli.sweep import SweepOptions, sweep
from fedtrain.cli.terminal import say
from fedtrain.data.federated import build
from fedtrain.errors import InputError, RunError, shorten
from fedtrain.experiment.load import load
from fedtrain.experiment.schema import inline
from fedtrain.report.text import show_metric
from fedtrain.rundir import RunFolder
from fedtrain.sweep.grid import axis

__all__ = ["crossval"]

_MOST_CLIENTS = 200
_OURS = ("data.fold", "data.held_out")
_FIXED = {"data.test": "0.0", "evaluation.max_clients": "1000000000"}  # all clients are measured, and not a sample


def crossval(file: Path, folds: int | None, options: SweepOptions) -> None:
    """Run all folds, or go on with them, and sum them up.

    Args:
        file: the experiment file.
        folds: into how many parts each client's rows fall; None to hold out one client at a time.
        options: of the sweep that this is.

    Raises:
        InputError: something is wrong with the options or the file; no run was started.
        RunError: some runs failed; the others are complete.
        InterruptedRunError: it was stopped; the same command goes on.
    """
    axes = [axis(text) for text in options.values]
    first = load(file, [f"{one.key}={one.values[0]}" for one in axes])
    if first.privacy is not None:
        raise InputError(
            "a cross-validation measures on the clients' examples, which privacy does not let out",
            hint="Leave out [privacy], or measure one run on data.central_test",
        )
    if own := [one.key for one in axes if one.key in (*_OURS, *_FIXED)]:
        raise InputError("a cross-validation sets this itself", got=f"--set {own[0]}", hint="Leave it out")
    if folds is not None:
        parts = ", ".join(inline({"number": number, "of": folds}) for number in range(1, folds + 1))
        ours = f"data.fold=[{parts}]"
    else:
        base, root = folders(file, first, options.data_root)
        names = build(first.data, root, base, first.seed).client_ids()
        if not 2 <= len(names) <= _MOST_CLIENTS:
            raise InputError(
                "to leave each client out once takes a run for each",
                got=f"{len(names)} clients",
                expected=f"2 to {_MOST_CLIENTS}",
                hint="Take --folds K",
            )
        ours = f"data.held_out=[{', '.join(inline([name]) for name in names)}]"
    out = options.out or Path("runs") / f"{first.name}-crossval"
    fixed = [f"{key}={value}" for key, value in _FIXED.items()]
    done = sweep(file, replace(options, values=(*options.values, *fixed, ours), out=out, folds=True))
    found: dict[str, list[Mapping[str, float]]] = {}
    for trial, paths in done:
        label = ", ".join(text for text in trial.overrides if not text.startswith(_OURS)) or "as in the file"
        found.setdefault(label, []).extend(RunFolder(path).read_rounds()[-1].clients for path in paths)
    _tell(found, "clients" if folds is None else "folds", options)
    if found and not options.as_json:
        say(f"Runs: {out}")
    _refuse_nothing(found)


def _refuse_nothing(found: Mapping[str, list[Mapping[str, float]]]) -> None:
    empty = [label for label, runs in found.items() if not any(runs)]
    if empty:
        raise RunError(
            "nothing was measured on the held-out examples",
            got=shorten("; ".join(empty)),
            hint="The notes of the runs say why",
        )


def _tell(found: Mapping[str, list[Mapping[str, float]]], parts: str, options: SweepOptions) -> None:
    for label, runs in found.items():
        names = dict.fromkeys(name for run in runs for name in run)  # a fold may not define all of them
        metrics = {name: [run[name] for run in runs if name in run] for name in names}
        if options.as_json:
            typer.echo(json.dumps({"event": "crossval", "label": label, "by": parts, "clients": metrics}))
            continue
        say(f"Held-out examples, {shorten(label)}: mean and sample deviation of {len(runs)} runs over the {parts}")
        for name, values in metrics.items():
            mean = statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan
            spread = statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else math.nan
            least, most = show_metric(name, min(values)), show_metric(name, max(values))
            say(f"  {name:24} {show_metric(name, mean)} ± {show_metric(name, spread)}  (from {least} to {most})")
