"""What a person or a machine sees of a run while it goes on."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fedtrain.cli.members import Comings, member_table
from fedtrain.experiment.sections import Experiment
from fedtrain.report.text import show_bytes, show_epsilon
from fedtrain.report.view import measured

if TYPE_CHECKING:
    from fedtrain.link.roster import Member
    from fedtrain.records import RoundRecord

__all__ = ["RunObserver", "downloads", "make_observer"]

_WIDE = 120  # columns in which the live line has room for epsilon; the plain lines above it tell it anyway


class RunObserver:
    """Base: sees everything, says nothing but notices, which go to standard error."""

    def opening(self, folder: Path) -> None:
        """The run's folder is known; data and workers are being loaded."""

    def round_started(self, round_number: int, clients: int) -> None:
        """So many clients were asked to train."""

    def client_finished(self, round_number: int) -> None:
        """One more of them has answered."""

    def round_finished(self, record: RoundRecord) -> None:
        """The record was written."""

    def notice(self, text: str) -> None:
        """Something that a person should know."""
        print(f"note: {text}", file=sys.stderr)

    def clients(self, members: Sequence[Member]) -> None:
        """Who takes part in a deployment, twice a second."""


@contextlib.contextmanager
def make_observer(experiment: Experiment, *, quiet: bool, as_json: bool) -> Iterator[RunObserver]:
    """Choose how to show a run: JSON lines, nothing, a live line in a terminal, or plain lines in a pipe."""
    if as_json:
        yield _JsonLines()
    elif quiet:
        yield RunObserver()
    elif sys.stdout.isatty():
        with _Live(experiment) as live:
            yield live
    else:
        yield _PlainLines(experiment)


@contextlib.contextmanager
def downloads() -> Iterator[Callable[[str, int, int], None]]:
    """Show bars of downloads in a terminal, nothing in a pipe."""
    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:

        def advance(name: str, there: int, size: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=size)
            progress.update(tasks[name], completed=there)

        yield advance


class _JsonLines(RunObserver):
    def __init__(self) -> None:
        self._comings = Comings()

    def opening(self, folder: Path) -> None:
        self._emit({"event": "start", "run": str(folder)})

    def round_finished(self, record: RoundRecord) -> None:
        self._emit({"event": "round", **json.loads(record.model_dump_json())})

    def notice(self, text: str) -> None:
        self._emit({"event": "notice", "text": text})

    def clients(self, members: Sequence[Member]) -> None:
        for change in self._comings.changes(members):
            self._emit(change.event())

    def _emit(self, event: dict[str, object]) -> None:
        print(f"{json.dumps(event)}\n", end="", flush=True)  # in one piece: two threads print


class _PlainLines(RunObserver):
    def __init__(self, experiment: Experiment) -> None:
        self._experiment, self._comings = experiment, Comings()

    def opening(self, folder: Path) -> None:
        print(f"run {folder}", flush=True)

    def round_finished(self, record: RoundRecord) -> None:
        print(f"{_line(record, self._experiment)}\n", end="", flush=True)

    def clients(self, members: Sequence[Member]) -> None:
        for change in self._comings.changes(members):
            print(f"{change.line()}\n", end="", flush=True)


class _ProgressAndClients(Progress):
    """The live line, and under it the clients of a deployment."""

    members: Sequence[Member] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.members:
            yield member_table(self.members, self.console.width, self.console.height)


class _Live(RunObserver):
    """One line that lives at the bottom, and a plain line above it for about every twentieth of the run."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment, self._rounds = experiment, experiment.rounds
        self._every = max(1, experiment.rounds // 20)
        self._asked = self._answered = 0
        self._console = Console(highlight=False)
        self._progress = _ProgressAndClients(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10 if self._console.width < 100 else 24),
            TextColumn("{task.fields[clients]}"),
            TextColumn("[bold]{task.fields[score]}[/bold]"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("loading", total=None, clients="", score="", left="")

    def __enter__(self) -> _Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def opening(self, folder: Path) -> None:
        self._console.print(f"run {folder}", markup=False, soft_wrap=True)

    def round_started(self, round_number: int, clients: int) -> None:
        self._asked, self._answered = clients, 0
        if self._progress.tasks[0].total is None:  # the rate counts from here, also after a resume
            self._progress.reset(self._task, total=self._rounds, completed=round_number - 1)
        self._show(round_number)

    def client_finished(self, round_number: int) -> None:
        self._answered += 1
        self._show(round_number)

    def round_finished(self, record: RoundRecord) -> None:
        number = record.round_number
        self._progress.update(self._task, completed=number)
        if score := _score(record.central or measured(record, "clients") or record.train):
            spent = _epsilon(record, self._experiment) if self._console.width >= _WIDE else []
            self._progress.update(self._task, score="  ".join([score, *spent]))
        if number % self._every == 0 or number == self._rounds:
            self._console.print(_brief(record, self._experiment), markup=False, no_wrap=True, overflow="ellipsis")

    def notice(self, text: str) -> None:
        self._console.print(f"note: {text}", markup=False)

    def clients(self, members: Sequence[Member]) -> None:
        self._progress.members = members
        if self._progress.tasks[0].total is None:
            self._progress.update(self._task, description="waiting for clients")

    def _show(self, round_number: int) -> None:
        in_flight = f"{self._asked - self._answered}/{self._asked} clients in flight"
        self._progress.update(
            self._task, description=f"round {round_number}/{self._rounds}", clients=in_flight, left="left"
        )


def _line(record: RoundRecord, experiment: Experiment) -> str:
    """Everything that was measured."""
    parts = [_number(record, experiment.rounds)]
    parts += [f"train loss {record.train['loss']:.4f}"] if "loss" in record.train else []
    parts += [f"test {name} {value:.4f}" for name, value in record.central.items()]
    parts += [f"clients' {name} {value:.4f}" for name, value in measured(record, "clients").items()]
    parts += [f"personal {name} {value:.4f}" for name, value in measured(record, "personal").items()]
    parts += _epsilon(record, experiment)
    if record.round_number:
        used = len(record.participants)
        parts.append("1 client" if used == 1 else f"{used} clients")
        parts += [f"{len(record.late)} late"] if record.late else []
        parts += [f"staleness {record.staleness:.1f}"] if record.staleness else []
        parts.append(show_bytes(record.bytes_up + record.bytes_down))
        parts += [f"{record.virtual_seconds:.2f} s virtual"] if record.virtual_seconds else []
    parts.append(f"{record.seconds_train + record.seconds_evaluate:.2f} s")
    return "  ".join(parts)


def _brief(record: RoundRecord, experiment: Experiment) -> str:
    """What fits into 80 columns."""
    clients, personal = measured(record, "clients"), measured(record, "personal")
    scores = [f"{whose} {_score(of)}" for whose, of in (("test", record.central), ("clients'", clients)) if of]
    scores += [f"personal {_score(personal).rpartition(' ')[2]}"] if personal else []  # what is measured was just named
    loss = [f"loss {record.train['loss']:.4f}"] if "loss" in record.train and not personal else []
    return "  ".join([_number(record, experiment.rounds), *loss, *scores, *_epsilon(record, experiment)])


def _epsilon(record: RoundRecord, experiment: Experiment) -> list[str]:
    if record.epsilon is None:
        return []
    seeded = experiment.privacy is not None and experiment.privacy.noise_seed is not None
    return [f"epsilon {show_epsilon(record.epsilon)}{' NOT PRIVATE' if seeded else ''}"]


def _number(record: RoundRecord, rounds: int) -> str:
    return f"round {record.round_number:>{len(str(rounds))}}/{rounds}"


def _score(measured: Mapping[str, float]) -> str:
    """The number to watch: the first metric, else the loss."""
    names = [name for name in measured if name != "loss"] or list(measured)
    return f"{names[0]} {measured[names[0]]:.4f}" if names else ""
