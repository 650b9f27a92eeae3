"""A run's folder: everything a run leaves behind, written so that a kill at any moment loses nothing finished.

RUN/experiment.toml      the resolved experiment
RUN/manifest.json        versions, seed, hardware, data fingerprint, status
RUN/data.json            how the data lies on the clients
RUN/preparation.json     what is done to inputs before the model sees them
RUN/rounds.jsonl         one typed record per round
RUN/histograms/          of weights, their changes and activations, where run.histograms_every asks for them
RUN/checkpoints/         the last two, each whole in one file
RUN/privacy.json         what a private run promises
RUN/asked.jsonl          how often each client was asked, where it adds its own noise
RUN/ledgers/             what was spent on whose privacy
RUN/clients/             what clients keep between rounds, where the strategy has them keep something
RUN/roster.json          the clients of a server, and the run's name
RUN/spool/               updates that a server is receiving; they have no names there
RUN/server.json          where a server listens, while there is one
RUN/local-clients/       homes and logs of the clients that a server has started itself
RUN/model.safetensors    the final model's full state dict
RUN/report.html
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from fedtrain.disk import atomic_write
from fedtrain.errors import RunError, RunFolderError
from fedtrain.params import Params
from fedtrain.records import DataSummary, Histogram, Manifest, PrivacySummary, RoundRecord
from fedtrain.statefile import DamagedStateError, read_state, write_state

__all__ = ["Checkpoint", "RunFolder"]

_KEPT = 2
Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True)
class Checkpoint:
    """The state between two rounds.

    Attributes:
        round_number: the last finished round; 0 before the first.
        params: the global exchanged tensors.
        state: the strategy's state.
        server: what the server remembers besides: the gate's medians, losses, updates in flight.
        result: the best model so far and the average over rounds, where there are such.
    """

    round_number: int
    params: Params
    state: Mapping[str, Any]
    server: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Params] = field(default_factory=dict)


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; `create` makes it, `open` expects it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.experiment = path / "experiment.toml"
        self.manifest = path / "manifest.json"
        self.data = path / "data.json"
        self.preparation = path / "preparation.json"
        self.rounds = path / "rounds.jsonl"
        self.histograms = path / "histograms"
        self.checkpoints = path / "checkpoints"
        self.clients = path / "clients"
        self.privacy = path / "privacy.json"
        self.asked = path / "asked.jsonl"
        self.ledgers = path / "ledgers"
        self.model = path / "model.safetensors"
        self.report = path / "report.html"
        self.server = path / "server.json"
        self.roster = path / "roster.json"
        self.spool = path / "spool"
        self.local_clients = path / "local-clients"
        self._lock, self._stop = path / ".lock", path / ".stop"

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run that exists.

        Raises:
            RunFolderError: there is no run at this path.
        """
        folder = cls(path)
        if not folder.manifest.is_file():
            raise RunFolderError(
                "this is not a run's folder",
                got=path,
                expected="a folder with manifest.json, as `fedtrain simulate` makes",
            )
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it against a second process.

        Raises:
            RunFolderError: another process is running in it, or it cannot be made.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = self._lock.open("ab")
        except OSError as error:
            raise RunFolderError(
                f"the run's folder cannot be written ({error.strerror})",
                got=self.path,
                hint="Choose another one with --out",
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise self._held() from error
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
            lock.flush()
            self._stop.unlink(missing_ok=True)
            try:
                yield
            finally:
                self._stop.unlink(missing_ok=True)  # whoever waits for a next run's clients looks for it

    def holder(self) -> int | None:
        """The process that is running in this folder; None if there is none."""
        try:
            with self._lock.open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(lock.read() or 0) or None
        except FileNotFoundError:
            pass
        return None

    def _held(self) -> RunFolderError:
        return RunFolderError(
            "another process is running in this folder",
            got=self.path,
            hint="Wait for it to end, or choose another folder with --out",
        )

    def ask_to_stop(self) -> None:
        """Have the running process stop after its round."""
        self._stop.touch()

    def stop_wanted(self) -> bool:
        """Whether somebody has asked for it."""
        return self._stop.exists()

    def is_foreign(self) -> bool:
        """Whether the folder holds files, but none of a run that was cut short before its manifest."""
        if not self.path.is_dir():
            return self.path.exists()
        names = {entry.name for entry in self.path.iterdir()}
        names -= {name for name in names if name.startswith(".") and name.endswith(".tmp")}
        ours = {".lock", self.checkpoints.name, self.experiment.name, self.data.name, self.preparation.name}
        ours |= {self.clients.name, self.privacy.name, self.ledgers.name}
        ours |= {self.server.name, self.roster.name, self.spool.name, self.local_clients.name}
        return bool(names) and not names <= ours

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest."""
        self._write_text(self.manifest, manifest.model_dump_json(indent=2) + "\n")

    def read_manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            RunFolderError: it is damaged.
        """
        return _parse(self.manifest, Manifest)

    def write_privacy(self, summary: PrivacySummary) -> None:
        """Replace the promise of privacy."""
        self._write_text(self.privacy, summary.model_dump_json(indent=2) + "\n")

    def read_privacy(self) -> PrivacySummary | None:
        """Read the promise of privacy; None where the run makes none."""
        return _parse(self.privacy, PrivacySummary) if self.privacy.exists() else None

    def write_data(self, summary: DataSummary) -> None:
        """Replace the summary of the data."""
        self._write_text(self.data, summary.model_dump_json() + "\n")

    def read_data(self) -> DataSummary | None:
        """Read the summary of the data; None if the run ended before it was made."""
        return _parse(self.data, DataSummary) if self.data.exists() else None

    def write_preparation(self, preparation: BaseModel) -> None:
        """Replace what is done to inputs."""
        self._write_text(self.preparation, preparation.model_dump_json() + "\n")

    def read_preparation(self, kind: type[Record]) -> Record:
        """Read what is done to inputs.

        Args:
            kind: its class, which lies above this module: `fedtrain.data.prepare.Preparation`.

        Raises:
            RunFolderError: it is missing or damaged.
        """
        return _parse(self.preparation, kind, hint="Run the experiment again in another folder")

    def write_experiment(self, toml: str) -> None:
        """Replace the resolved experiment."""
        self._write_text(self.experiment, toml)

    def append(self, record: RoundRecord) -> None:
        """Add a round's record."""
        with _naming_disk_errors(self.rounds), self.rounds.open("a", encoding="utf-8") as lines:
            lines.write(record.model_dump_json() + "\n")

    def write_histograms(self, round_number: int, found: Mapping[str, Histogram]) -> None:
        """Write what was seen of the model after a round: tag -> histogram."""
        with _naming_disk_errors(self.histograms):
            self.histograms.mkdir(exist_ok=True)
        text = json.dumps({tag: one.model_dump() for tag, one in found.items()})
        self._write_text(self._histograms_of(round_number), text + "\n")

    def read_histograms(self, round_number: int) -> dict[str, Histogram]:
        """Read what was seen of the model after a round; empty if nobody looked, or the file is damaged."""
        try:
            content = json.loads(self._histograms_of(round_number).read_bytes())
            return {str(tag): Histogram.model_validate(one) for tag, one in content.items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def _histograms_of(self, round_number: int) -> Path:
        return self.histograms / f"round-{round_number:07d}.json"

    def read_rounds(self) -> list[RoundRecord]:
        """Read the records; a last line that a kill cut short is left out."""
        if not self.rounds.exists():
            return []
        records = []
        for line in self.rounds.read_bytes().splitlines():
            try:
                records.append(RoundRecord.model_validate_json(line))
            except ValidationError:
                break
        return records

    def drop_rounds_after(self, round_number: int) -> None:
        """Forget records of rounds that will be run again."""
        kept = [record for record in self.read_rounds() if record.round_number <= round_number]
        self._write_text(self.rounds, "".join(record.model_dump_json() + "\n" for record in kept))

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and remove all but the one before it."""
        path = self.checkpoints / f"round-{checkpoint.round_number:07d}.safetensors"
        with _naming_disk_errors(path):
            self._sync_rounds()  # a checkpoint must not outlive the records of its rounds
            for later in self._checkpoint_paths():
                if later.name > path.name:  # of a future that was given up, for its files were damaged
                    later.unlink(missing_ok=True)
            write_state(path, vars(checkpoint))
        for old in self._checkpoint_paths()[_KEPT:]:
            old.unlink(missing_ok=True)

    def _sync_rounds(self) -> None:
        if self.rounds.exists():
            with self.rounds.open("rb") as lines:
                os.fsync(lines.fileno())

    def oldest_checkpoint_round(self) -> int:
        """The round that a resumed run might go back to at worst; 0 if there is no checkpoint."""
        paths = self._checkpoint_paths()
        return int(paths[-1].stem.removeprefix("round-")) if len(paths) == _KEPT else 0

    def latest_checkpoint(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; tell `warn` of each damaged one that was passed over."""
        for path in self._checkpoint_paths():
            try:
                return Checkpoint(**read_state(path))
            except (DamagedStateError, TypeError, OSError) as error:
                warn(f"checkpoint {path.name} is damaged ({error}); trying the one before it")
                with contextlib.suppress(OSError):  # out of the way of the two that are kept
                    path.rename(path.with_suffix(".damaged"))
        return None

    def write_model(self, state_dict: Mapping[str, Tensor]) -> str:
        """Write the final model and return its SHA-256; tied tensors are written under each of their names."""
        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state_dict.items()}
        content = safetensors.torch.save(tensors, {"format": "pt"})
        with _naming_disk_errors(self.model):
            atomic_write(self.model, lambda file: file.write(content))
        return hashlib.sha256(content).hexdigest()

    def read_model(self) -> dict[str, Tensor]:
        """Read the final model's full state dict.

        Raises:
            RunFolderError: the run is not complete, or the file is not the one that it wrote.
        """
        manifest = self.read_manifest()
        if manifest.status != "complete":
            raise RunFolderError(
                "this run has no final model yet",
                got=f"status {manifest.status}",
                hint="Run the same `fedtrain simulate` command again: it goes on where it was"
                + (", once what it failed of is mended" if manifest.status == "failed" else ""),
            )
        content = self.model.read_bytes() if self.model.is_file() else b""
        digest = hashlib.sha256(content).hexdigest()
        if digest != manifest.model_sha256:
            raise RunFolderError(
                f"{self.model} is missing, damaged or changed",
                got=f"SHA-256 {digest[:12]}",
                expected=manifest.model_sha256[:12],
                hint="Bring the run's own file back, or run the experiment again in another folder",
            )
        return safetensors.torch.load(content)

    def _checkpoint_paths(self) -> list[Path]:
        return sorted(self.checkpoints.glob("round-*.safetensors"), reverse=True)

    def _write_text(self, path: Path, text: str) -> None:
        with _naming_disk_errors(path):
            atomic_write(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def _naming_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Make the folder writable"
        raise RunError(
            f"cannot write {path} ({error.strerror})", hint=f"{hint} and run the same command again: it resumes"
        ) from error


def _parse(path: Path, kind: type[Record], hint: str = "Choose another folder with --out") -> Record:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise RunFolderError(f"{path} is missing, damaged or of another version of fedtrain", hint=hint) from error
