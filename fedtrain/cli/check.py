"""`fedtrain check`: what is wrong with the model, the data or the rates, before the first round."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer

from fedtrain.cli.terminal import say
from fedtrain.data.federated import build
from fedtrain.errors import DataError, nearest, shorten
from fedtrain.experiment.sections import Experiment
from fedtrain.seeds import global_torch_seed
from fedtrain.simulations.checks import try_task
from fedtrain.simulations.checkup import Finding, Layer, check_up, layers
from fedtrain.tasks.adapted import experiment_task
from fedtrain.training.loop import build_model

__all__ = ["check"]


def check(experiment: Experiment, places: tuple[Path, Path | None], client: str | None, *, as_json: bool) -> None:
    """Check an experiment on one client's examples, and print what was found. Nothing of a run is touched.

    Args:
        experiment: what would be run.
        places: the experiment file's folder, and the folder of the built-in data sources.
        client: whose examples; the largest client's unless given.
        as_json: print one JSON object.

    Raises:
        InputError: the data or the task does not fit.
        typer.Exit: with code 1 where training cannot work.
    """
    base, root = places
    data = build(experiment.data, root, base, experiment.seed)
    names = data.client_ids()
    name = names[int(data.sizes().argmax())] if client is None else client
    if name not in names:
        raise DataError("there is no such client", got=name, hint=nearest(name, names))
    task = experiment_task(experiment, data.spec, base)
    try_task(task, data)
    examples = data.client(name).train
    if not len(examples):
        raise DataError("this client has no examples to train on", got=name)
    with global_torch_seed(experiment.seed, "check", "layers"):
        table = layers(build_model(task, experiment.seed), examples.inputs[:512])
    if not as_json:
        say(f"{shorten(experiment.task.name)} on {len(examples)} examples of {shorten(name)}\n")
        for line in _rows(table):
            typer.echo(line)
        typer.echo("")
    found = []
    for finding in check_up(experiment, task, data.spec, examples):
        found.append(finding)
        if not as_json:
            say(f"{finding.verdict:6}{finding.name:16}{finding.text}", indent=22)
    if as_json:
        whole = {"client": name, "layers": [_plain(asdict(one)) for one in table], "findings": list(map(asdict, found))}
        typer.echo(json.dumps(whole, indent=2))
    else:
        typer.echo(f"\n{_conclusion(found)}")
    if any(finding.verdict == "wrong" for finding in found):
        raise typer.Exit(1)


def _rows(table: Sequence[Layer]) -> list[str]:
    """The layers as lines of equal columns."""
    header = ("Layer", "Kind", "Output", "Parameters", "Trained", "Deviation", "Dead")
    rows = [header]
    for layer in table:
        shape = " x ".join(map(str, layer.shape)) or "1"
        dead = "" if layer.dead is None else f"{layer.dead:.0%}"
        deviation = f"{layer.deviation:.2g}" if math.isfinite(layer.deviation) else ""
        counts = (f"{layer.parameters:,}", f"{layer.trained:,}")
        rows.append((shorten(layer.name, 30), shorten(layer.kind, 20), shape, *counts, deviation, dead))
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = ("<", "<", "<", ">", ">", ">", ">")
    return ["  ".join(f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths)).rstrip() for row in rows]


def _plain(layer: dict[str, object]) -> dict[str, object]:
    """JSON knows no NaN."""
    return {key: None if value != value else value for key, value in layer.items()}


def _conclusion(found: Sequence[Finding]) -> str:
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in ("wrong", "odd")}
    if counts["wrong"]:
        return f"{counts['wrong']} of {len(found)} checks failed: training cannot work like this."
    if counts["odd"]:
        return f"{counts['odd']} of {len(found)} checks found something odd."
    return f"All {len(found)} checks are ok."
