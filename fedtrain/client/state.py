"""What a client keeps between rounds: control variates, private layers, a model of its own. None of it leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedtrain.errors import RunError
from fedtrain.statefile import DamagedStateError, UnsavableStateError, read_state, write_state

__all__ = ["ClientState"]

_LONGEST = 100  # characters of a client's name that are still a file's name


class ClientState:
    """Versions of the clients' states, one file each, so that a server that goes back finds the state it left behind.

    Args:
        folder: made when the first state is saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, client_id: str, round_number: int) -> Mapping[str, Any]:
        """Read what the client kept from its last round before `round_number`; empty if there was none.

        Raises:
            RunError: the file is damaged or cannot be read.
        """
        for path in reversed(self._versions(client_id)):
            if _round_of(path) < round_number:
                try:
                    return read_state(path)
                except (DamagedStateError, OSError) as error:
                    raise RunError(f"the client's state {path.name} is damaged ({error})") from error
        return {}

    def save(self, client_id: str, round_number: int, state: Mapping[str, Any], kept_round: int) -> None:
        """Write what the client keeps from a round; forget versions that no server can ask for any more.

        Args:
            client_id: whose state.
            round_number: the round it comes from.
            state: as `write_state` takes it; nothing is written if it is empty.
            kept_round: the server will not go back before this round.

        Raises:
            RunError: it cannot be written.
        """
        if not state:
            return
        before = self._versions(client_id)
        path = self._place(client_id) / f"round-{round_number:07d}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_state(path, state)
            reachable = [old for old in before if _round_of(old) <= kept_round][-1:]
            for old in before:
                # Later ones are of a future that the server has taken back.
                if old not in reachable and not kept_round < _round_of(old) <= round_number:
                    old.unlink(missing_ok=True)
        except UnsavableStateError as error:
            raise RunError(f"what a client was to keep cannot be kept: {error}") from error
        except OSError as error:
            raise RunError(f"the client's state cannot be written ({error.strerror})", got=path.name) from error

    def keep_last(self) -> None:
        """Forget all versions but each client's last: the run is complete, and nobody goes back."""
        for place in self._folder.iterdir() if self._folder.is_dir() else ():
            for old in sorted(place.glob("round-*.safetensors"))[:-1]:
                old.unlink(missing_ok=True)

    def _versions(self, client_id: str) -> list[Path]:
        place = self._place(client_id)
        return sorted(place.glob("round-*.safetensors")) if place.is_dir() else []  # most clients keep nothing

    def _place(self, client_id: str) -> Path:
        name = quote(client_id, safe="")
        if len(name) > _LONGEST or name.startswith("."):
            name = hashlib.sha256(client_id.encode()).hexdigest()
        return self._folder / name


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
