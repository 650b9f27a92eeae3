"""`fedtrain lr-find`: the range test of learning rates, in a terminal and as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtrain.cli.options import DataRoot, ExperimentFile, Overrides, folders
from fedtrain.cli.terminal import say
from fedtrain.errors import shorten

if TYPE_CHECKING:
    from fedtrain.simulations.range_test import RangeTest

__all__ = ["lr_find"]

_LINES, _BAR = 25, 40
_CLEAR = 0.01  # share of the first loss: a smaller fall is noise


def lr_find(
    experiment_file: ExperimentFile,
    overrides: Overrides = None,
    data_root: DataRoot = None,
    clients: Annotated[
        list[str] | None,
        typer.Option("--client", metavar="NAME", help="A client that trains; the largest unless given. Repeatable."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--clients", metavar="N", help="Train N clients drawn by lot; the mean of their curves."),
    ] = None,
    low: Annotated[float, typer.Option("--from", help="The lowest learning rate.")] = 1e-6,
    high: Annotated[float, typer.Option("--to", help="The highest learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option("--steps", help="Learning rates between them, one for each step.")] = 100,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also draw it into this .svg, .png or .pdf file; a .csv beside it.", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find a learning rate by a range test. Nothing of a run is touched."""
    import torch

    from fedtrain.data.federated import build
    from fedtrain.experiment import load
    from fedtrain.report.rates import check_format, draw, write
    from fedtrain.simulations.checks import try_task
    from fedtrain.simulations.range_test import Rates, find_clients, range_test
    from fedtrain.tasks.adapted import experiment_task
    from fedtrain.training.device import find_device
    from fedtrain.training.loop import build_model
    from fedtrain.training.optimizer import check_optimizer

    experiment = load(experiment_file, overrides or ())
    base, root = folders(experiment_file, experiment, data_root)
    if out is not None:
        check_format(out)
    rates, device = Rates(low, high, steps), find_device(experiment.run.device)
    torch.set_num_threads(experiment.run.threads)
    data = build(experiment.data, root, base, experiment.seed)
    task = experiment_task(experiment, data.spec, base)
    try_task(task, data)
    check_optimizer(experiment.training, base, build_model(task, experiment.seed))
    names = find_clients(data, clients or (), count, experiment.seed)
    found = range_test(experiment, task, [(name, data.client(name).train) for name in names], device, rates)
    if as_json:
        typer.echo(json.dumps(_document(found, names), indent=2))
    else:
        of = shorten(names[0]) if len(names) == 1 else f"{len(names)} clients"
        say(f"{shorten(experiment.name)}: {experiment.training.optimizer.name} on {of}, a rate for each step\n")
        for line in (*_chart(found), "", *_verdict(found, high)):
            say(line)
    if out is not None:
        table = out.with_suffix(".csv")
        write(found, table)
        draw(found, out)
        if not as_json:
            say(f"Picture: {out}\nNumbers: {table}")


def _document(found: RangeTest, clients: list[str]) -> dict[str, object]:
    return {
        "clients": clients,
        "steepest": found.steepest,
        "least": found.least,
        "diverged": found.diverged,
        "rates": found.rates.tolist(),
        "losses": found.losses.tolist(),
        "smoothed": found.smoothed.tolist(),
    }


def _chart(found: RangeTest) -> Iterator[str]:
    """A line for every few steps: rate, smoothed loss, and a bar as long as the loss; too long ones end in a plus."""
    low, first = float(found.smoothed.min()), float(found.smoothed[0])
    span = max(first - low, 1e-12) * 1.25
    yield "      rate      loss"
    for i in range(0, len(found.rates), -(-len(found.rates) // _LINES)):
        share = (float(found.smoothed[i]) - low) / span
        bar = "#" * max(1, round(_BAR * min(share, 1.0))) + ("+" if share > 1 else "")
        yield f"  {found.rates[i]:8.2e}  {found.smoothed[i]:8.4g}  {bar}"


def _verdict(found: RangeTest, high: float) -> Iterator[str]:
    if found.steepest is None:
        yield "The loss does not fall at any rate: lower --from, or give more --steps. See also `fedtrain check`."
        return
    fall = 1 - found.smoothed.min() / found.smoothed[0]
    if found.smoothed[0] > 0 and fall < _CLEAR:
        yield f"The loss falls by no more than {fall:.1%} at any rate: raise --to, or look at the scale of the targets."
        return
    yield f"Try training.optimizer.lr = {found.steepest:.2g}: there the loss falls fastest."
    yield f"A tenth of the rate of least loss: {found.least / 10:.2g}. Choose between the two, or sweep over both."
    if found.diverged:
        yield f"The loss diverges at {found.rates[-1]:.2g}."
    elif found.least * 2 > high:
        yield f"The loss is least near the highest rate, {high:g}: raise --to."
