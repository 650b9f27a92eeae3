"""MLflow: `mlflow.db` in the run's folder, or the store that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping

from fedtrain.experiment.fields import fields
from fedtrain.records import Histogram
from fedtrain.trackers.base import Memory, TrackedRun, now

__all__ = ["MLflow"]

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # a server that is away is to cost seconds, not minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_STATUS = {"complete": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_MOST_PARAMS = 100  # in one message
_LONGEST_VALUE = 500  # characters, which older servers take


class MLflow:
    """Logs to one MLflow run, also over resumes; see `Tracker`.

    Args:
        run: to show.
    """

    def __init__(self, run: TrackedRun) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        own = run.folder / "mlflow.db"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own.absolute()}"
        self._client = MlflowClient(uri, registry_uri=uri)
        self._memory = Memory(run, "mlflow")
        if self._memory.run_id:
            self._client.update_run(self._memory.run_id, status="RUNNING")
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedtrain")
        known = self._client.get_experiment_by_name(project)
        experiment_id = known.experiment_id if known else self._client.create_experiment(project)
        self._memory.run_id = self._client.create_run(experiment_id, run_name=run.folder.name).info.run_id
        self._memory.save()
        values = (Param(path, text[:_LONGEST_VALUE]) for path, text in fields(run.experiment).items())
        while some := list(itertools.islice(values, _MOST_PARAMS)):
            self._client.log_batch(self._memory.run_id, params=some)

    def log(self, numbers: Mapping[str, float], round_number: int) -> None:
        """See `Tracker`."""
        if round_number <= self._memory.last_round:
            return
        from mlflow.entities import Metric

        self._memory.last_round = round_number
        self._memory.save()  # first: a kill in between leaves a gap rather than a round that counts twice
        at = int(1000 * now())
        metrics = [Metric(tag, value, at, round_number) for tag, value in numbers.items()]
        self._client.log_batch(self._memory.run_id, metrics=metrics)

    def look(self, found: Mapping[str, Histogram], round_number: int) -> None:
        """See `Tracker`; MLflow knows no histograms."""

    def close(self, status: str) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._memory.run_id, _STATUS[status])
