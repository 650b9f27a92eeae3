"""What an authority has issued and revoked, and whom it has invited: one file that is whole or refused."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from fedtrain.disk import atomic_write
from fedtrain.errors import RunError
from fedtrain.link.identity import peer_name

__all__ = ["Invitation", "Issued", "Passing", "Register", "Revocations", "read_register", "stamp_of", "write_register"]

_LOG = logging.getLogger("fedtrain.link")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Issued(_Entry):
    """One certificate."""

    name: str
    kind: Literal["client", "server"]
    serial: str  # in hex
    not_after: AwareDatetime
    revoked_at: AwareDatetime | None = None

    def state(self, now: datetime) -> tuple[Literal["valid", "revoked", "expired"], datetime]:
        """What it is, and until or since when."""
        if self.revoked_at is not None:
            return "revoked", self.revoked_at
        return "valid" if now <= self.not_after else "expired", self.not_after

    def valid(self, now: datetime) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.state(now)[0] == "valid"


class Invitation(_Entry):
    """One invitation. The secret itself is kept nowhere."""

    name: str
    secret_sha256: str
    server: str
    expires: AwareDatetime
    certificate: str | None = None  # in PEM, once it was redeemed

    def state(self, now: datetime) -> tuple[Literal["open", "used", "expired"], datetime]:
        """What it is, and until or since when; a used one still answers the key that has used it."""
        if now >= self.expires:
            return "expired", self.expires
        return "open" if self.certificate is None else "used", self.expires


class Register(_Entry):
    """All of it, in the order in which it came."""

    issued: list[Issued] = []
    invitations: list[Invitation] = []  # at most one per name
    hosts: list[str] = []  # by which clients know the server


class Passing(str):
    """An objection that may pass, so that it is worth trying again."""

    __slots__ = ()


class Revocations:
    """Which clients' certificates are in force: reads the register again whenever it has changed.

    Fails closed: what the register does not list, and everything while the register is missing or damaged, counts as
    revoked.

    Args:
        path: of the register.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] | None = None
        self._clients: dict[int, Issued] | None = {}  # None while the register cannot be read

    def is_revoked(self, serial: int) -> bool:
        """Whether the certificate of this serial number is not, or no longer, in force; its dates apart."""
        entry = (self._read() or {}).get(serial)
        return entry is None or entry.revoked_at is not None

    def objection(self, certificate: bytes, now: datetime | None = None) -> str | None:
        """Say why a certificate in PEM, whose chain TLS has verified, must not be served; None if it may."""
        client = peer_name({"x509_pem_cert": [certificate]})
        if client is None:
            return "it is no client's certificate"
        listed = self._read()
        if listed is None:
            return Passing("the certificate cannot be verified now")
        entry = listed.get(client[1])
        if entry is None:
            return "the authority's register does not list the certificate"
        state, moment = entry.state(now or datetime.now(UTC))
        if state == "valid":
            return None
        why = f"the certificate is {state} since {moment:%Y-%m-%d %H:%M} UTC"
        return Passing(why) if state == "expired" else why  # a session may have outlived it, and a new one be there

    def _read(self) -> dict[int, Issued] | None:
        with self._lock:
            stamp = stamp_of(self._path)  # before the content: a change in between is seen next time
            if stamp != self._stamp or self._clients is None:
                try:
                    issued = read_register(self._path).issued
                    self._clients = {int(entry.serial, 16): entry for entry in issued if entry.kind == "client"}
                except (RunError, ValueError) as error:
                    if stamp != self._stamp:
                        _LOG.error("Every client is refused: %s", error)
                    self._clients = None
                self._stamp = stamp
            return self._clients


def read_register(path: Path) -> Register:
    """Read a register.

    Raises:
        RunError: it is missing, damaged, or was changed by hand.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["sha256"] != _digest(document["register"]):
            raise ValueError("its checksum does not match")
        return Register.model_validate(document["register"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fault = "it is of another version" if isinstance(error, ValidationError) else str(error)
        raise RunError(
            f"the authority's register {path} cannot be trusted ({fault})",
            hint="Restore it from a backup, and then revoke again what was revoked since",
        ) from error


def write_register(path: Path, register: Register) -> None:
    """Replace a register.

    Raises:
        OSError: from the file system; the old one stays as it was.
    """
    content = register.model_dump(mode="json")
    text = json.dumps({"sha256": _digest(content), "register": content}, indent=1) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stamp_of(path: Path) -> tuple[int, ...]:
    """Tell one state of a file from another."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
