"""Finished updates on a client's disk: each is kept until no server can ask for it again."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from fedtrain.errors import LinkError, RunError
from fedtrain.link.channel import Task
from fedtrain.link.frames import Packed
from fedtrain.link.spool import load, save

__all__ = ["Outbox"]

_LOG = logging.getLogger("fedtrain.client")


class Outbox:
    """One run's finished updates, by what was asked: the round, and the digest of the parameters.

    A server that lost an update, because it was killed, asks for the same again. The client then sends what it has: no
    work is lost, and under privacy no second noisy copy of one round leaves.

    Args:
        folder: made with the first update.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, task: Task) -> Packed | None:
        """The update that answers a task, if it is there and whole."""
        path = self._path(task)
        try:
            return load(path)
        except FileNotFoundError:
            return None
        except (LinkError, OSError) as error:
            _LOG.warning("the kept update %s cannot be used, and is made anew: %s", path.name, error)
            return None

    def keep(self, task: Task, packed: Packed) -> None:
        """Write an update to disk before it is sent.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save(packed, self._path(task))
        except OSError as error:
            raise RunError(
                f"an update cannot be kept in {self._folder} ({os.strerror(error.errno or 0)})",
                hint="Free some space, or make it writable",
            ) from error

    def drop(self, round_number: int) -> None:
        """Remove updates of this round and those before: the server will not go back there."""
        for path in self._folder.glob("*.update"):
            if int(path.name.partition("-")[0]) <= round_number:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all updates: nobody will ask for them again."""
        try:
            for path in self._folder.glob("*.update"):
                path.unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("finished updates stay in %s: %s", self._folder, error)

    def _path(self, task: Task) -> Path:
        digest = hashlib.sha256(f"{task.kind} {task.group} {task.checksum}".encode()).hexdigest()
        return self._folder / f"{int(task.group):07d}-{digest[:32]}.update"
