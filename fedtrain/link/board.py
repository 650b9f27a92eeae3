"""Open tasks: what clients were asked and have not answered."""

from __future__ import annotations

import math
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from flwr.app import Error, Message

from fedtrain.errors import FedtrainError
from fedtrain.flower import CLIENT_AWAY, CLIENT_FAILED, set_message_id
from fedtrain.link.control import Ack
from fedtrain.link.frames import Packed, Payload, pack
from fedtrain.link.headers import Content

__all__ = ["Batch", "Board", "OpenTask"]

_LOOK = 1.0  # seconds between two looks at who makes progress
_REMEMBERED = 10_000  # closed tasks, so that what comes late is told from what never was
_LATE = Ack(verdict="late", reason="the answer is not wanted any more")
_STRIKES = 3  # refused answers after which a client has failed the task


@dataclass(eq=False)
class OpenTask:
    """One message to one client, until it is answered or withdrawn.

    Attributes:
        limit: most bytes of the answer.
        moved: when the client last made progress, on the monotonic clock.
    """

    id: str
    name: str
    message: Message
    packed: Packed
    limit: int
    replies: queue.SimpleQueue[Message | FedtrainError]
    moved: float = field(default_factory=time.monotonic)
    open: bool = True
    refused: int = 0
    told: object = None  # the session that has heard of it


class Board:
    """Holds the open tasks; safe to use from all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prefix = secrets.token_hex(8)
        self._count = 0
        self._open: dict[str, OpenTask] = {}
        self._closed: OrderedDict[str, tuple[str, Ack]] = OrderedDict()

    def open(self, tasks: Sequence[tuple[str, Message]], limit: int, batch: Batch) -> list[OpenTask]:
        """Open one task per message; messages that share their arrays share one payload."""
        known: dict[tuple[int, ...], Payload] = {}
        prepared = [(name, message, pack(message.content, known)) for name, message in tasks]
        for payload in known.values():
            _ = payload.checksum  # now, and not while other threads wait for the lock
        opened = []
        with self._lock:
            for name, message, packed in prepared:
                self._count += 1
                task = OpenTask(f"{self._prefix}-{self._count}", name, message, packed, limit, batch.replies)
                self._open[task.id] = task
                opened.append(task)
        batch.tasks += opened
        return opened

    def of(self, name: str) -> list[OpenTask]:
        """A client's open tasks."""
        with self._lock:
            return [task for task in self._open.values() if task.name == name]

    def all(self) -> list[OpenTask]:
        """Every open task."""
        with self._lock:
            return list(self._open.values())

    def find(self, task_id: str, name: str) -> OpenTask | Ack:
        """A client's open task, or why there is none."""
        with self._lock:
            task = self._open.get(task_id)
            if task and task.name == name:
                return task
            owner, ack = self._closed.get(task_id, ("", Ack(verdict="refused")))
            if owner == name:
                return ack
            asked = task.name if task else owner
        return Ack(verdict="refused", reason=f"this was asked of {asked}" if asked else "nobody asked for this")

    def answer(self, task: OpenTask, content: Content) -> Ack:
        """Take the first answer to a task."""
        return self._close(task, Ack(verdict="already"), _reply(task, content)) or Ack(verdict="accepted")

    def refuse(self, task: OpenTask, reason: str) -> Ack:
        """Note an answer that cannot be taken; a client that sends only such has failed the task."""
        task.refused += 1
        if task.refused >= _STRIKES:
            self.answer(task, Error(CLIENT_FAILED, f"its answers were refused: {reason}"))
        return Ack(verdict="refused", reason=reason)

    def give_up(self, name: str, reason: str) -> None:
        """Answer for a client that will not."""
        for task in self.of(name):
            self.answer(task, Error(CLIENT_FAILED, reason))

    def fail(self, error: FedtrainError) -> None:
        """End every exchange with an error."""
        for task in self.all():
            task.replies.put(error)

    def withdraw(self, tasks: Sequence[OpenTask]) -> list[OpenTask]:
        """Close those that are still open, and return them."""
        return [task for task in tasks if not self._close(task, _LATE)]

    def miss(self, tasks: Sequence[OpenTask], reason: str) -> list[OpenTask]:
        """Close those that are still open with an error for whoever asked, and return them."""
        return [task for task in tasks if not self._close(task, _LATE, _reply(task, Error(CLIENT_AWAY, reason)))]

    def _close(self, task: OpenTask, ack: Ack, reply: Message | None = None) -> Ack | None:
        """Close a task, with its reply if there is one, or tell how it was closed before."""
        with self._lock:
            if not task.open:
                return self._closed.get(task.id, ("", ack))[1]
            if reply:
                task.replies.put(reply)  # before it counts as closed: a batch ends when it has neither
            task.open = False
            del self._open[task.id]
            self._closed[task.id] = task.name, ack
            if len(self._closed) > _REMEMBERED:
                self._closed.popitem(last=False)
        return None


def _reply(task: OpenTask, content: Content) -> Message:
    reply = Message(content, reply_to=task.message)
    set_message_id(reply, f"reply-{task.message.metadata.message_id}")
    return reply


class Batch:
    """Tasks whose replies are read together: those of one exchange, or of many that overlap."""

    def __init__(self) -> None:
        self.tasks: list[OpenTask] = []
        self.replies: queue.SimpleQueue[Message | FedtrainError] = queue.SimpleQueue()

    def collect(
        self, patience: float | None, deadline: float | None, withdraw: Callable[[], object]
    ) -> Iterator[Message]:
        """Yield replies as they come, until all have answered or none is worth waiting for.

        Args:
            patience: seconds without progress of any client that has not answered; None waits on.
            deadline: seconds in all; None waits on.
            withdraw: closes what is left, so that nothing can come any more.

        Raises:
            FedtrainError: what ended the exchange: see `Board.fail`.
        """
        started = time.monotonic()
        left, waiting = len(self.tasks), True
        while left:
            wait = self._seconds_left(started, patience, deadline) if waiting else 0.0
            try:
                reply = self.replies.get(timeout=wait)
            except queue.Empty:
                if not waiting:
                    return
                if self._seconds_left(started, patience, deadline) == 0:
                    withdraw()
                    waiting = False  # but for what was accepted a moment ago
                continue
            if isinstance(reply, FedtrainError):
                raise reply
            left -= 1
            yield reply

    def flow(self, patience: float | None, miss: Callable[[Sequence[OpenTask]], object]) -> Iterator[Message]:
        """Yield replies as they come, while any task is open; further ones may be opened meanwhile.

        Args:
            patience: seconds without progress of a client, after which it is given up; None waits on.
            miss: closes tasks, with an error as their reply.

        Raises:
            FedtrainError: what ended the exchange: see `Board.fail`.
        """
        while True:
            self.tasks = [task for task in self.tasks if task.open]
            if not self.tasks and self.replies.empty():
                return
            longest = math.inf if patience is None else patience
            first = min((task.moved for task in self.tasks), default=0.0)
            try:
                reply = self.replies.get(timeout=min(_LOOK, max(0.0, first + longest - time.monotonic())))
            except queue.Empty:
                now = time.monotonic()
                if overdue := [task for task in self.tasks if task.moved + longest <= now]:
                    miss(overdue)
                continue
            if isinstance(reply, FedtrainError):
                raise reply
            yield reply

    def _seconds_left(self, started: float, patience: float | None, deadline: float | None) -> float | None:
        ends = []
        if deadline is not None:
            ends.append(started + deadline)
        if patience is not None:
            ends.append(max((task.moved for task in self.tasks if task.open), default=started) + patience)
        return max(0.0, min(ends) - time.monotonic()) if ends else None
