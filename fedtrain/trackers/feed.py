"""The trackers of a run: chosen by name, fed with its records, and dropped when they fail."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal

from fedtrain.errors import MissingExtraError, shorten
from fedtrain.records import RoundRecord
from fedtrain.rundir import RunFolder
from fedtrain.trackers.base import TrackedRun, Tracker, scalars

__all__ = ["Feed", "chosen"]

# Name -> the module in this package and its class; the module is imported when the first round is recorded.
_TRACKERS = {"tensorboard": "TensorBoard", "wandb": "WeightsAndBiases", "mlflow": "MLflow"}


def chosen(names: Literal["auto"] | Sequence[str]) -> list[str]:
    """Name the trackers of a run.

    Args:
        names: of `run.trackers`; "auto" is TensorBoard where it is installed.

    Raises:
        MissingExtraError: one is asked for and not installed.
    """
    if names == "auto":
        return ["tensorboard"] if _is_installed("tensorboard") else []
    for name in names:
        if not _is_installed(name):
            raise MissingExtraError(name, name, f'run.trackers = ["{name}"]')
    return list(dict.fromkeys(names))


class Feed:
    """Hands each record to the trackers.

    Args:
        names: as of `chosen`.
        run: that they show; its folder is written to from the first record on, not before.
        notice: is told, once, of a tracker that fails; it gets nothing more.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun, notice: Callable[[str], None]) -> None:
        self._waiting, self._run, self._notice = list(names), run, notice
        self._open: dict[str, Tracker] = {}

    def round_finished(self, record: RoundRecord) -> None:
        """Log a round."""
        while self._waiting:
            name = self._waiting.pop(0)
            try:
                self._open[name] = _tracker(name, self._run)
            except Exception as error:
                self._tell(name, error)
        numbers = scalars(record, self._run.experiment.privacy) if self._open else {}
        found = RunFolder(self._run.folder).read_histograms(record.round_number) if self._open else {}
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(numbers, record.round_number)
                if found:
                    tracker.look(found, record.round_number)
            except Exception as error:
                self._tell(name, error)
                self._close(self._open.pop(name), "failed")

    def close(self, status: Literal["complete", "interrupted", "failed"]) -> None:
        """The run has ended."""
        for name, tracker in self._open.items():
            if error := self._close(tracker, status):
                self._tell(name, error)
        self._open.clear()

    def _close(self, tracker: Tracker, status: str) -> Exception | None:
        try:
            tracker.close(status)
        except Exception as error:
            return error
        return None

    def _tell(self, name: str, error: Exception) -> None:
        reason = shorten(" ".join(f"{type(error).__name__}: {error}".split()), 200)
        self._notice(f"the tracker {name} is left out from here on: {reason}")


def _is_installed(name: str) -> bool:
    # Our own modules of these names lie in this package and are not looked up.
    return importlib.util.find_spec(name) is not None


def _tracker(name: str, run: TrackedRun) -> Tracker:
    module = importlib.import_module(f"fedtrain.trackers.{name}")
    tracker: Tracker = getattr(module, _TRACKERS[name])(run)
    return tracker
