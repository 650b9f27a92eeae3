"""Weights & Biases: offline unless WANDB_MODE says otherwise; files in the run's folder, under `wandb/`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping

from fedtrain.records import Histogram
from fedtrain.trackers.base import Memory, TrackedRun

__all__ = ["WeightsAndBiases"]

_SECONDS_FOR_SERVER = 20.0


class WeightsAndBiases:
    """Logs to one W&B run, also over resumes; see `Tracker`.

    Nothing is collected but the numbers and the experiment: no code, output, machine or packages.

    Args:
        run: to show.
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import: nothing is sent unasked
        import wandb

        self._memory = Memory(run, "wandb")
        self._memory.run_id = self._memory.run_id or uuid.uuid4().hex
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            init_timeout=_SECONDS_FOR_SERVER,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedtrain"),
            name=run.folder.name,
            id=self._memory.run_id,
            resume="allow",
            dir=run.folder,
            mode=None if "WANDB_MODE" in os.environ else "offline",
            config=run.experiment.model_dump(mode="json", exclude={"run"}),
            settings=settings,
        )

    def log(self, numbers: Mapping[str, float], round_number: int) -> None:
        """See `Tracker`."""
        if round_number <= self._memory.last_round:
            return
        self._memory.last_round = round_number
        self._memory.save()  # first: a kill in between leaves a gap rather than a round that counts twice
        self._run.log(dict(numbers), step=round_number)

    def look(self, found: Mapping[str, Histogram], round_number: int) -> None:
        """See `Tracker`."""
        if round_number < self._memory.last_round:
            return
        import wandb

        shown = {tag: wandb.Histogram(np_histogram=(one.counts, one.edges)) for tag, one in found.items()}
        self._run.log(shown, step=round_number)

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if status == "complete" else 1)
