"""A run on the command line: shown while it goes on, summed up and reported at its end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedtrain.cli.progress import RunObserver, make_observer
from fedtrain.cli.terminal import say
from fedtrain.errors import FedtrainError, InputError, InterruptedRunError, MissingExtraError, RunError
from fedtrain.experiment import identity, load
from fedtrain.experiment.sections import Experiment
from fedtrain.report.view import RunView
from fedtrain.rundir import RunFolder
from fedtrain.trackers.base import TrackedRun
from fedtrain.trackers.feed import Feed, chosen

if TYPE_CHECKING:
    from fedtrain.link.roster import Member
    from fedtrain.records import RoundRecord

__all__ = ["carry_out", "run_folder", "summary", "tracked", "tracker_names", "view_of", "write_report"]


def run_folder(experiment: Experiment, out: Path | None) -> RunFolder:
    """The folder of an experiment's run: the same for the same experiment."""
    return RunFolder(out or Path("runs") / f"{experiment.name}-{identity(experiment)[:8]}")


def carry_out(
    experiment: Experiment, folder: RunFolder, run: Callable[[RunObserver], object], *, quiet: bool, as_json: bool
) -> None:
    """Run, and tell what came of it.

    Args:
        experiment: what is run.
        folder: where.
        run: does it, and tells the observer.
        quiet: print only the report's path.
        as_json: print JSON lines.

    Raises:
        FedtrainError: as `run`; or both `quiet` and `as_json`.
    """
    if quiet and as_json:
        raise InputError("--quiet and --json are two ways to print a run", hint="Leave one of them out")
    complete_before = folder.manifest.exists() and folder.read_manifest().status == "complete"
    trackers = [] if complete_before else tracker_names(experiment)
    run_of = TrackedRun(experiment, folder.path)
    with make_observer(experiment, quiet=quiet, as_json=as_json) as shown, tracked(shown, run_of, trackers) as observer:
        observer.opening(folder.path)
        try:
            run(observer)
        except (InterruptedRunError, RunError):
            with contextlib.suppress(FedtrainError):  # the first error is the one to tell
                if folder.rounds.exists():
                    write_report(folder)
            raise
    report: Path | None = folder.report
    if not (complete_before and folder.report.exists()):
        try:
            report = write_report(folder)
        except MissingExtraError as error:  # the run is complete all the same
            report = None
            say(f"note: {error}", err=True)
    where = str(report) if report else None
    if as_json:
        status = {"event": "complete", "run": str(folder.path), "report": where, "already": complete_before}
        typer.echo(json.dumps(status))
    elif quiet:
        typer.echo(where or str(folder.path))
    else:
        if complete_before:
            typer.echo("This run is complete; nothing to do.")
        for line in summary(folder):
            say(line)
        typer.echo(f"Results: {folder.path}")
        if where:
            typer.echo(f"Report:  {where}")


def tracker_names(experiment: Experiment) -> list[str]:
    """Name the trackers that an experiment's run feeds.

    Raises:
        MissingExtraError: one is asked for and not installed.
    """
    return chosen(experiment.run.trackers)


@contextlib.contextmanager
def tracked(shown: RunObserver, run: TrackedRun, names: Sequence[str]) -> Iterator[RunObserver]:
    """Feed trackers with what an observer is told, while the block runs.

    Args:
        shown: is told everything, and what fails in the trackers.
        run: that they show.
        names: of `tracker_names`.
    """
    feed = Feed(names, run, shown.notice)
    try:
        yield _Tracked(shown, feed)
    except (InterruptedRunError, KeyboardInterrupt, BrokenPipeError):
        feed.close("interrupted")
        raise
    except BaseException:
        feed.close("failed")
        raise
    feed.close("complete")


def summary(folder: RunFolder) -> list[str]:
    """A run in some sentences."""
    from fedtrain.report.text import summary_lines

    return summary_lines(view_of(folder))


def write_report(folder: RunFolder) -> Path:
    """Write a run's report anew."""
    from fedtrain.report.html import write_report

    write_report(view_of(folder), folder.report)
    return folder.report


def view_of(folder: RunFolder) -> RunView:
    """Read what a run's folder tells."""
    return RunView(
        experiment=load(folder.experiment),
        experiment_text=folder.experiment.read_text(encoding="utf-8"),
        manifest=folder.read_manifest(),
        records=folder.read_rounds(),
        data=folder.read_data(),
        privacy=folder.read_privacy(),
    )


class _Tracked(RunObserver):
    """Tells the person who watches, and then the trackers."""

    def __init__(self, shown: RunObserver, feed: Feed) -> None:
        self._shown, self._feed = shown, feed

    def opening(self, folder: Path) -> None:
        self._shown.opening(folder)

    def round_started(self, round_number: int, clients: int) -> None:
        self._shown.round_started(round_number, clients)

    def client_finished(self, round_number: int) -> None:
        self._shown.client_finished(round_number)

    def round_finished(self, record: RoundRecord) -> None:
        self._shown.round_finished(record)
        self._feed.round_finished(record)

    def notice(self, text: str) -> None:
        self._shown.notice(text)

    def clients(self, members: Sequence[Member]) -> None:
        self._shown.clients(members)
