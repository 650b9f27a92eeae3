"""What every tracker is, and what it is told: one flat table of numbers a round."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedtrain.disk import atomic_write
from fedtrain.experiment.privacy import PrivacySection
from fedtrain.experiment.sections import Experiment
from fedtrain.records import Histogram, RoundRecord

__all__ = ["Memory", "TrackedRun", "Tracker", "now", "scalars"]

_LONGEST = 60  # characters of a metric's name
_FILE = "tracking.json"


class Tracker(Protocol):
    """One tracker of one run, opened when the first round is recorded. Whatever it raises, the run goes on."""

    def log(self, numbers: Mapping[str, float], round_number: int) -> None:
        """Take in a round; one that was taken in before, as after a resume, is not shown twice."""

    def look(self, found: Mapping[str, Histogram], round_number: int) -> None:
        """Take in a round's histograms, tag -> histogram; called after `log`, where there are any."""

    def close(self, status: str) -> None:
        """The run is complete, interrupted or failed."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of its run."""

    experiment: Experiment
    folder: Path


def scalars(record: RoundRecord, privacy: PrivacySection | None = None) -> dict[str, float]:
    """Flatten a round's record into the numbers that trackers show.

    Sums and means alone: no client is named. Where clients are protected, what depends on who took part is left out:
    trackers may be elsewhere, and these numbers have no noise.

    Args:
        record: of the round.
        privacy: of the experiment.

    Returns:
        tag, such as "central/accuracy", -> value; what was not measured is left out.
    """
    parts = {"train": record.train, "central": record.central, "clients": record.clients}
    found = {f"{part}/{_tag(name)}": value for part, numbers in parts.items() for name, value in numbers.items()}
    if record.epsilon is not None:
        found["privacy/epsilon"] = record.epsilon
    found["seconds/evaluate"] = record.seconds_evaluate
    if record.round_number == 0:
        return found
    if privacy and privacy.unit == "client":
        return found | {"round/lr_factor": record.lr_factor, "update/norm": record.update_norm}
    found |= {
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        "round/participants": len(record.participants),
        "round/quarantined": len(record.quarantined),
        "round/set_aside": len(record.set_aside),
        "round/ended": len(record.ended),
        "round/late": len(record.late),
        "round/staleness": record.staleness,
        "round/lr_factor": record.lr_factor,
        "update/norm": record.update_norm,
        "seconds/train": record.seconds_train,
    }
    if record.num_examples:
        found["round/examples"] = record.num_examples
    if record.virtual_seconds:
        found["seconds/virtual"] = record.virtual_seconds
        found["seconds/clients"] = record.client_seconds
        found["seconds/wasted"] = record.wasted_seconds
    if record.diversity is not None:
        found["update/diversity"] = record.diversity
    if record.drift:
        found["update/cosine"] = _mean([cosine for cosine, _ in record.drift.values()])
        found["update/norm_ratio"] = _mean([ratio for _, ratio in record.drift.values()])
    return found


def now() -> float:
    """Tell the time, in seconds since 1970."""
    return datetime.datetime.now(datetime.UTC).timestamp()


class Memory:
    """What a tracker without a memory of its own has to find again when the run is resumed: `tracking.json`.

    Args:
        run: whose folder keeps it.
        tracker: whose entry it is.
    """

    def __init__(self, run: TrackedRun, tracker: str) -> None:
        self._path, self._tracker = run.folder / _FILE, tracker
        entry = self._all().get(tracker, {})
        self.run_id: str = entry.get("run_id", "")
        self.last_round: int = entry.get("last_round", -1)

    def save(self) -> None:
        """Write it down."""
        entry = {"run_id": self.run_id, "last_round": self.last_round}
        text = json.dumps({**self._all(), self._tracker: entry}, indent=2) + "\n"
        atomic_write(self._path, lambda file: file.write(text.encode()))

    def _all(self) -> dict[str, dict[str, Any]]:
        content = self._path.read_text(encoding="utf-8") if self._path.exists() else "{}"
        entries: dict[str, dict[str, Any]] = json.loads(content)
        return entries


def _tag(name: str) -> str:
    """Write a metric's name, which its task or a client chose, as a tag that every tracker takes."""
    plain = re.sub(r"[^\w.-]|^\.+", "_", name)[:_LONGEST] or "_"
    # Two names must not become one tag.
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:6]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
