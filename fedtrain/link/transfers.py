"""The calls that move payloads: a client fetches what it is asked, and submits its answer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import grpc

from fedtrain.errors import LinkError, RunError, shorten
from fedtrain.link.board import Board, OpenTask
from fedtrain.link.control import Ack, SubmitHead, encode, read_submit, read_wanted
from fedtrain.link.frames import unpack
from fedtrain.link.roster import Roster, identity

__all__ = ["Transfers"]

_LOG = logging.getLogger("fedtrain.link")

_MOMENT = 0.5  # seconds
_MOST_SILENT = 4  # calls of one client


class Transfers:
    """Handles fetches and submits.

    Args:
        board: the open tasks.
        roster: who takes part.
        spool: folder for the payloads of answers.
        objection: a certificate in PEM -> what is against it.
    """

    def __init__(
        self, board: Board, roster: Roster, spool: Path, objection: Callable[[bytes | None], str | None]
    ) -> None:
        self._board, self._roster, self._spool, self._objection = board, roster, spool, objection
        self._lock = threading.Lock()
        self._silent: Counter[str] = Counter()  # calls of which the first message has not come

    def fetch(self, data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Send a task's payload from an offset on."""
        try:
            wanted = read_wanted(data)
        except LinkError as error:
            _end(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        name = self._caller(wanted.session, context)
        task = self._board.find(wanted.task, name)
        if isinstance(task, Ack):
            _end(context, grpc.StatusCode.NOT_FOUND, task.reason or task.verdict)
        self._roster.transfer(name, "fetch", context)
        for chunk in task.packed.payload.chunks(wanted.offset):
            yield chunk
            task.moved = time.monotonic()
            self._roster.count(name, down=len(chunk))
            if not task.open:
                _end(context, grpc.StatusCode.ABORTED, "the task is closed")

    def submit(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Take an answer."""
        try:
            with self._opening(context):
                head = read_submit(next(requests, b""))
        except LinkError as error:
            _end(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        name = self._caller(head.session, context)
        found = self._board.find(head.task, name)
        if isinstance(found, OpenTask):
            self._roster.transfer(name, "submit", context)
            try:
                found = self._take(found, head, requests, context)
            except OSError as error:
                hint = f"Make room in {self._spool}; the same command resumes"
                self._board.fail(RunError("the server cannot keep what clients send", got=error, hint=hint))
                _end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "the server cannot keep the answer now")
        if found.verdict != "accepted":  # late is no fault, where more are asked than waited for
            level = logging.INFO if found.verdict == "late" else logging.WARNING
            _LOG.log(level, "an answer of %s is not used: %s: %s", name, found.verdict, shorten(found.reason, 300))
        return encode(found)

    def _take(self, task: OpenTask, head: SubmitHead, requests: Iterator[bytes], context: grpc.ServicerContext) -> Ack:
        """Receive an answer; if the task is closed meanwhile, say so at once."""
        receiver = None
        try:
            receiver = unpack(head, task.limit, self._spool)
            for chunk in requests:
                receiver.write(chunk)
                task.moved = time.monotonic()
                self._roster.count(task.name, up=len(chunk))
                if not task.open:
                    found = self._board.find(task.id, task.name)
                    assert isinstance(found, Ack), "a closed task does not open again"
                    return found
            return self._board.answer(task, receiver.finish())
        except LinkError as error:
            if _gone(context):  # a line that broke is no offence
                return Ack(verdict="refused", reason="the connection broke")
            return self._board.refuse(task, shorten(str(error), 1000))
        finally:
            if receiver:
                receiver.close()

    @contextlib.contextmanager
    def _opening(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Hold back calls that say nothing, each of which takes a thread; ends the call of who has many of them."""
        certified, certificate = identity(context)
        if why := self._objection(certificate):
            _end(context, grpc.StatusCode.PERMISSION_DENIED, why)
        who = certified or context.peer()
        with self._lock:
            self._silent[who] += 1
            many = self._silent[who] > _MOST_SILENT
        try:
            if many:
                _end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once")
            yield
        finally:
            with self._lock:
                self._silent[who] -= 1
                if not self._silent[who]:
                    del self._silent[who]

    def _caller(self, session: str, context: grpc.ServicerContext) -> str:
        """The client behind a call; ends the call if that is nobody who takes part."""
        certified, certificate = identity(context)
        name, why = self._roster.owner(session), self._objection(certificate)
        if name is None or certified not in (None, name) or why:
            why = why or "its session does not take part"
            _LOG.warning("a call of %s at %s is refused: %s", certified or "a client", context.peer(), why)
            _end(context, grpc.StatusCode.PERMISSION_DENIED, why)
        return name


def _gone(context: grpc.ServicerContext) -> bool:
    """Whether a call is over; of a line that broke gRPC learns a moment after the last bytes."""
    over = threading.Event()
    return not context.add_callback(over.set) or over.wait(_MOMENT)


def _end(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str) -> NoReturn:
    context.abort(code, shorten(reason, 300))
    raise AssertionError("abort raises")
