"""`fedtrain sweep`: many runs of one experiment, and the comparison at their end."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fedtrain.cli.compare import show
from fedtrain.cli.options import folders
from fedtrain.cli.progress import RunObserver
from fedtrain.cli.running import tracked, tracker_names, view_of, write_report
from fedtrain.cli.terminal import say
from fedtrain.errors import InputError, InterruptedRunError, MissingExtraError, RunError, shorten
from fedtrain.experiment.sections import Experiment
from fedtrain.records import RoundRecord
from fedtrain.report.compare import compare
from fedtrain.report.text import show_metric
from fedtrain.report.view import Facts, RunView, until_result
from fedtrain.rundir import RunFolder
from fedtrain.simulations.run import Places, sigterm_interrupts, simulate
from fedtrain.sweep.checks import try_all
from fedtrain.sweep.grid import Trial, axis, grid
from fedtrain.sweep.runner import carry_through, final_value, holding
from fedtrain.sweep.study import Goal, Study, range_of
from fedtrain.trackers.base import TrackedRun

__all__ = ["SweepOptions", "sweep"]


@dataclass(frozen=True)
class SweepOptions:
    """What the command line says of a sweep.

    Attributes:
        values: KEY=V1,V2,...
        seeds: runs of each combination.
        out: the sweep's folder; runs/NAME-sweep unless given.
        data_root: folder of the built-in data sources.
        trials: of an Optuna study; None for a grid.
        minimize: metric that the study makes small.
        maximize: metric that the study makes large.
        ranges: KEY=LOW:HIGH[:log] of the study.
        dry_run: only list the runs.
        quiet: print only the page's path.
        as_json: print JSON lines.
        folds: the runs are parts of a cross-validation: what the clients measured counts, and they are not compared.
    """

    values: Sequence[str] = ()
    seeds: int = 1
    out: Path | None = None
    data_root: Path | None = None
    trials: int | None = None
    minimize: str | None = None
    maximize: str | None = None
    ranges: Sequence[str] = ()
    dry_run: bool = False
    quiet: bool = False
    as_json: bool = False
    folds: bool = False


def sweep(file: Path, options: SweepOptions) -> list[tuple[Trial, list[Path]]]:
    """Run a sweep, or go on with it, and compare its runs.

    Args:
        file: the experiment file.
        options: of the command line.

    Returns:
        Each combination with its runs' folders; empty where they are only listed.

    Raises:
        InputError: something is wrong with the options, the values or the folder; no run was started.
        RunError: some runs failed; the others are complete.
        InterruptedRunError: it was stopped; the same command goes on.
    """
    study = _study(file, options)
    trials = grid(file, [axis(text) for text in options.values], options.seeds) if study is None else study.corners()
    first = trials[0].experiments[0]
    tracker_names(first)
    out = options.out or Path("runs") / f"{first.name}-sweep"
    if options.dry_run:
        _say_plan(trials, study, out)
        return []
    base, root = folders(file, first, options.data_root)
    try_all(trials, base, root)
    runs = (study.trials if study else len(trials)) * options.seeds
    with sigterm_interrupts(), holding(out), _Watch(runs, options) as watch:
        session = _Session(base, root, out, watch)
        try:
            if study is None:
                for trial in trials:
                    session.run(trial)
            else:
                goal = study.goal
                trials = study.run(out, lambda trial: session.measure(trial, goal.metric))
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "the sweep was interrupted; what was finished is kept", hint="Run the same command again to go on"
            ) from None
    _conclude(trials, session, options)
    return [(one, one.folders(out)) for one in trials]


def _study(file: Path, options: SweepOptions) -> Study | None:
    """The study that was asked for, if one was."""
    if options.trials is None:
        given = {"--range": options.ranges, "--minimize": options.minimize, "--maximize": options.maximize}
        if useless := [name for name, value in given.items() if value]:
            raise InputError(
                "a grid has no such option", got=", ".join(useless), hint="Add --optuna N, or leave it out"
            )
        return None
    metric = options.minimize or options.maximize
    if metric is None or (options.minimize and options.maximize):
        raise InputError("a study needs one metric", hint="Give --minimize METRIC or --maximize METRIC")
    ranges = [range_of(text) for text in options.ranges]
    axes = [axis(text) for text in options.values]
    if not ranges and all(len(one.values) == 1 for one in axes):
        raise InputError("a study needs something to vary", hint="Give --range KEY=LOW:HIGH or --set KEY=V1,V2")
    return Study(file, axes, ranges, Goal(metric, options.maximize is not None), options.trials, options.seeds)


def _say_plan(trials: Sequence[Trial], study: Study | None, out: Path) -> None:
    if study is not None:
        typer.echo(f"{study.trials} trials, {study.seeds * study.trials} runs under {out}:")
        for one in study.ranges:
            scale = ", logarithmic" if one.log else ""
            typer.echo(f"  {one.key} from {one.low:g} to {one.high:g}{scale}{', integers' if one.whole else ''}")
        for choice in study.axes:
            typer.echo(f"  {choice.key}: {', '.join(choice.values)}")
        return
    planned = [pair for trial in trials for pair in zip([trial] * len(trial.experiments), trial.folders(out))]
    typer.echo(f"{len(planned)} runs:")
    for trial, folder in planned:
        manifest = RunFolder(folder).manifest
        status = RunFolder(folder).read_manifest().status if manifest.exists() else "new"
        typer.echo(f"  {folder}  {trial.label}  ({status})")


def _conclude(trials: Sequence[Trial], session: _Session, options: SweepOptions) -> None:
    """Compare what there is, and tell of what failed."""
    paths = dict.fromkeys(folder for trial in trials for folder in trial.folders(session.out))
    opened = {path.name: RunFolder(path) for path in paths if (path / "manifest.json").exists()}
    views = {name: view for name, folder in opened.items() if (view := view_of(folder)).records}
    if views and not options.folds:
        how: Literal["text", "json", "quiet"] = "json" if options.as_json else "quiet" if options.quiet else "text"
        if how == "text":
            typer.echo("")
        show(compare(views), session.out / "compare.html", needs_page=False, how=how)
    if session.failed:
        listed = "\n".join(f"  {path}: {why}" for path, why in session.failed.items())
        raise RunError(f"{len(session.failed)} of {session.started} runs failed; the others are complete\n{listed}")


@dataclass
class _Session:
    """One call of `sweep`: runs what it is given, and remembers what failed."""

    base: Path
    data_root: Path | None
    out: Path
    watch: _Watch
    started: int = 0
    failed: dict[Path, str] = field(default_factory=dict)

    def run(self, trial: Trial) -> bool:
        """Run a combination; False if a run failed."""

        def run(experiment: Experiment, path: Path) -> None:
            self.started += 1
            self.watch.begin(trial, experiment)
            folder = RunFolder(path)
            with tracked(self.watch, TrackedRun(experiment, path), tracker_names(experiment)) as observer:
                simulate(experiment, Places(self.base, path, self.data_root), observer)
            if not folder.report.exists():
                with contextlib.suppress(MissingExtraError):
                    write_report(folder)
            self.watch.end(path, _told(view_of(folder), on_clients=self.watch.folds))

        def failed(path: Path, why: str) -> None:
            self.failed[path] = why
            self.watch.end(path, f"FAILED: {why}", failed=True)

        return carry_through(trial, self.out, run, failed)

    def measure(self, trial: Trial, metric: str) -> float | None:
        """Run a combination; the mean of what was measured at the end, or None if a run failed."""
        if not self.run(trial):
            return None
        return final_value([_of_result(view_of(RunFolder(path))) for path in trial.folders(self.out)], metric)


def _of_result(run: RunView) -> list[Mapping[str, float]]:
    """What a run has measured as far as its result, on the clients' examples and then on the central test set."""
    return [
        *(record.clients for record in until_result(run, "clients")),
        *(record.central for record in until_result(run, "central")),
    ]


def _told(run: RunView, *, on_clients: bool) -> str:
    facts = Facts.of(run)
    value = facts.clients_mean if on_clients or facts.final is None else facts.final
    return f"{shorten(facts.metric, 40)} {show_metric(facts.metric, value)} after round {facts.rounds_done}"


class _Watch(RunObserver):
    """Shows a sweep: a line for each run, and in a terminal a bar below."""

    def __init__(self, runs: int, options: SweepOptions) -> None:
        self._runs, self._options, self.folds = runs, options, options.folds
        self._done, self._now, self._rounds = 0, "", 1
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            console=Console(highlight=False),
            transient=True,
            disable=options.quiet or options.as_json or not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=runs)

    def __enter__(self) -> _Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, trial: Trial, experiment: Experiment) -> None:
        """A run starts."""
        self._done += 1
        self._rounds = experiment.rounds
        self._now = f"{self._done}/{self._runs}  {shorten(trial.label, 100)}, seed {experiment.seed}"
        self._bar.update(self._task, completed=self._done - 1, description=f"run {self._done}/{self._runs}  loading")

    def round_finished(self, record: RoundRecord) -> None:
        number = record.round_number
        self._bar.update(
            self._task,
            completed=self._done - 1 + number / self._rounds,
            description=f"run {self._done}/{self._runs}  round {number}/{self._rounds}",
        )

    def end(self, path: Path, text: str, *, failed: bool = False) -> None:
        """A run is complete, or has failed."""
        if self._options.as_json:
            event = {"event": "run", "run": str(path), "status": "failed" if failed else "complete", "text": text}
            print(json.dumps(event), flush=True)
        elif not self._options.quiet:
            self._bar.console.print(f"{self._now}: {text}", markup=False, soft_wrap=True)

    def notice(self, text: str) -> None:
        if self._options.as_json:
            print(json.dumps({"event": "notice", "text": text}), flush=True)
        elif self._bar.disable:
            say(f"note: {text}", err=True)
        else:
            self._bar.console.print(f"note: {text}", markup=False)
