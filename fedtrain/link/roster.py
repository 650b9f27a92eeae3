"""Who is connected, and what was heard of whom."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from fedtrain.link.control import Accepted, Beat, Farewell, Hello, Refused, ServerMessage
from fedtrain.link.identity import peer_name

__all__ = ["Guest", "Member", "Roster", "identity"]


@dataclass(frozen=True)
class Member:
    """A client as tables and metrics show it.

    Attributes:
        text: its last status.
        group: of its open task; empty if it has none.
        facts: what it said of itself when it was ready.
        last_seen: seconds ago.
        bytes_up: of payload, from the client to the server.
        bytes_down: the other way.
    """

    name: str
    connected: bool
    text: str
    group: str
    facts: Mapping[str, Any]
    last_seen: float
    bytes_up: int
    bytes_down: int


class Guest:
    """The server's end of one session.

    Args:
        context: of the session's stream.
    """

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.certified, self.certificate = identity(context)
        self.peer = str(context.peer())
        self.hello: Hello | None = None
        self.ready = self.done = False  # it has asked to take part; it was told the last word
        self.seen = time.monotonic()
        self._context = context
        self._outbox: queue.SimpleQueue[ServerMessage | None] = queue.SimpleQueue()
        context.add_callback(self.end)

    def send(self, message: ServerMessage) -> None:
        """Queue a message; after the last word the stream ends."""
        self._outbox.put(message)
        if isinstance(message, Refused | Farewell):
            self.done = True
            self.end()

    def next(self, heartbeat: float) -> ServerMessage | None:
        """Wait for what to send next, a sign of life if there is nothing else; None ends the stream."""
        try:
            return self._outbox.get(timeout=heartbeat)
        except queue.Empty:
            return Beat()

    def end(self) -> None:
        """End the stream after what is queued."""
        self._outbox.put(None)

    def cut(self) -> None:
        """End the stream at once: nobody is there any more."""
        self._context.cancel()


@dataclass
class _Seat:
    """What stays of a client between its sessions."""

    guest: Guest | None = None
    session: str = ""  # of a client that takes part
    text: str = ""
    progress: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    seen: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    transfers: dict[str, grpc.ServicerContext] = field(default_factory=dict)


class Roster:
    """One seat per name. Its lock also orders what clients are told: see `Hub`.

    Args:
        size: most clients at once.
        silence: seconds after which a session that says nothing is dead.
    """

    def __init__(self, size: int, silence: float) -> None:
        self.lock = threading.RLock()
        self._size, self._silence = size, silence
        self._seats: dict[str, _Seat] = {}
        self._guests: set[Guest] = set()

    def enter(self, guest: Guest) -> None:
        """Note a session that has not said who it is."""
        with self.lock:
            self._guests.add(guest)

    def forget(self, guest: Guest) -> None:
        """Note that a session's stream has ended."""
        with self.lock:
            self._guests.discard(guest)

    def outdated(self, hello: Hello) -> Guest | None:
        """The older session of the same process, or of one that is dead, if there is one."""
        with self.lock:
            seat = self._seats.get(hello.name)
            old = seat.guest if seat else None
            return old if old and old.hello and (old.hello.instance == hello.instance or self._is_dead(old)) else None

    def sit(self, guest: Guest, hello: Hello) -> str | None:
        """Give a session its name's seat, or say why it cannot have it."""
        with self.lock:
            if sum(seat.guest is not None for seat in self._seats.values()) >= self._size:
                return f"there are {self._size} clients already"
            seat = self._seats.setdefault(hello.name, _Seat())
            if seat.guest:
                return "its name is in use by another process"
            seat.guest, seat.text, seat.progress = guest, "", 0
            guest.hello = hello
        return None

    def admit(self, guest: Guest, facts: Mapping[str, Any]) -> bool:
        """Let a client take part; False if its session has ended meanwhile."""
        with self.lock:
            seat = self._seat_of(guest)
            if seat is None:
                return False
            seat.session, seat.facts = secrets.token_hex(16), facts
            guest.send(Accepted(session=seat.session))
            return True

    def leave(self, guest: Guest) -> bool:
        """Free a session's seat; True if the client took part until now."""
        with self.lock:
            seat = self._seat_of(guest)
            if seat is None:
                return False
            took_part = bool(seat.session)
            seat.guest, seat.session, seat.seen = None, "", guest.seen
            return took_part

    def hear(self, guest: Guest, text: str, progress: int) -> bool:
        """Note a status; True if the client has made progress."""
        with self.lock:
            seat = self._seat_of(guest)
            if seat is None:
                return False
            moved = progress > seat.progress
            seat.text, seat.progress = text, max(progress, seat.progress)
            return moved

    def guests(self) -> list[Guest]:
        """All open sessions."""
        with self.lock:
            return list(self._guests)

    def silent(self) -> list[Guest]:
        """Sessions that have given no sign of life for too long."""
        with self.lock:
            return [guest for guest in self._guests if self._is_dead(guest)]

    def present(self, name: str) -> Guest | None:
        """The session of a client that takes part."""
        seat = self._seats.get(name)
        return seat.guest if seat and seat.session else None

    def owner(self, session: str) -> str | None:
        """The name of a session that takes part."""
        with self.lock:
            names = (name for name, seat in self._seats.items() if seat.session == session and session)
            return next(names, None)

    def transfer(self, name: str, kind: str, context: grpc.ServicerContext) -> None:
        """Begin a fetch or a submit; an older one of the same client and kind ends."""
        with self.lock:
            seat = self._seats[name]
            if older := seat.transfers.get(kind):
                older.cancel()
            seat.transfers[kind] = context
        context.add_callback(lambda: self._transferred(seat, kind, context))

    def count(self, name: str, *, up: int = 0, down: int = 0) -> None:
        """Count payload bytes; those that come are a sign of life."""
        seat = self._seats[name]
        seat.bytes_up += up
        seat.bytes_down += down
        if up and seat.guest:
            seat.guest.seen = time.monotonic()

    def members(self, groups: Mapping[str, str]) -> list[Member]:
        """All clients that have ever taken part, by name.

        Args:
            groups: client -> group of its open task.
        """
        now = time.monotonic()
        with self.lock:
            return [
                Member(
                    name,
                    bool(seat.session),
                    seat.text,
                    groups.get(name, ""),
                    seat.facts,
                    now - (seat.guest.seen if seat.guest else seat.seen),
                    seat.bytes_up,
                    seat.bytes_down,
                )
                for name, seat in sorted(self._seats.items())
            ]

    def _transferred(self, seat: _Seat, kind: str, context: grpc.ServicerContext) -> None:
        with self.lock:
            if seat.transfers.get(kind) is context:
                del seat.transfers[kind]
            if seat.guest:
                seat.guest.seen = time.monotonic()

    def _seat_of(self, guest: Guest) -> _Seat | None:
        seat = self._seats.get(guest.hello.name) if guest.hello else None
        return seat if seat and seat.guest is guest else None

    def _is_dead(self, guest: Guest) -> bool:
        """Whether nothing is heard of it; on a slow line its heartbeats queue behind what it transfers."""
        seat = self._seat_of(guest)
        return time.monotonic() - guest.seen > self._silence and not (seat and seat.transfers)


def identity(context: grpc.ServicerContext) -> tuple[str | None, bytes | None]:
    """A caller's name by its certificate ("" if that is no client's), and the certificate in PEM; None without TLS."""
    known = context.auth_context()
    certificate = next(iter(known.get("x509_pem_cert", ())), None)
    if certificate is None:
        return None, None
    found = peer_name(known)
    return (found[0] if found else ""), certificate
