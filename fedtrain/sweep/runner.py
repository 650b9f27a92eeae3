"""Carry a sweep through: run after run, also when some fail, and go on where it was stopped."""

from __future__ import annotations

import contextlib
import fcntl
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fedtrain.errors import FedtrainError, InputError, InterruptedRunError, RunFolderError, nearest, shorten
from fedtrain.experiment.sections import Experiment
from fedtrain.sweep.grid import Trial

__all__ = ["Run", "carry_through", "final_value", "holding"]

Run = Callable[[Experiment, Path], object]
"""Runs an experiment in a folder, or goes on with it; returns when it is complete."""


@contextlib.contextmanager
def holding(out: Path) -> Iterator[None]:
    """Make a sweep's folder and hold it against a second sweep.

    Raises:
        RunFolderError: another sweep holds it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("ab")
    except OSError as error:
        raise RunFolderError(
            f"the sweep's folder cannot be written ({error.strerror})",
            got=out,
            hint="Choose another one with --out",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                "another sweep is running in this folder",
                got=out,
                hint="Wait for it to end, or choose another folder with --out",
            ) from error
        yield


def carry_through(trial: Trial, out: Path, run: Run, failed: Callable[[Path, str], None]) -> bool:
    """Run a combination with each of its seeds.

    Args:
        trial: the combination.
        out: the sweep's folder.
        run: runs one experiment.
        failed: is told of each run that failed, and why.

    Returns:
        Whether all runs are complete.

    Raises:
        InterruptedRunError: the sweep was stopped.
    """
    complete = True
    for experiment, folder in zip(trial.experiments, trial.folders(out)):
        try:
            run(experiment, folder)
        except InterruptedRunError:
            raise
        except Exception as error:  # a sweep over night must not end with its first bad hour
            words = str(error) if isinstance(error, FedtrainError) else f"{type(error).__name__}: {error}"
            failed(folder, shorten(" ".join(words.split()), 300))
            complete = False
    return complete


def final_value(runs: Sequence[Sequence[Mapping[str, float]]], metric: str) -> float:
    """The mean over runs of a metric's last value.

    Args:
        runs: what each run has measured, by name; what counts most last.
        metric: its name.

    Returns:
        The mean; NaN if a run diverged.

    Raises:
        InputError: it was not measured.
    """
    finals = []
    for measured in runs:
        values = [numbers[metric] for numbers in measured if metric in numbers]
        if not values:
            known = dict.fromkeys(name for numbers in measured for name in numbers)
            raise InputError("the runs do not measure this", got=metric, hint=nearest(metric, known))
        finals.append(values[-1])
    return statistics.fmean(finals) if all(map(math.isfinite, finals)) else math.nan
