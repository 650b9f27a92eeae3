"""The client end: it dials out, holds one session, and is told what to do."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from fedtrain.errors import ConnectionLostError, FedtrainError, LinkError, RefusedError, shorten
from fedtrain.link.control import (
    Accepted,
    Ack,
    Beat,
    Cancel,
    ClientMessage,
    Decline,
    Farewell,
    Hello,
    Offer,
    Ready,
    Refused,
    ServerMessage,
    Status,
    SubmitHead,
    TaskNotice,
    Wanted,
    encode,
    read_ack,
    read_server,
)
from fedtrain.link.frames import Packed, Receiver, unpack
from fedtrain.link.headers import Content
from fedtrain.link.identity import split_address
from fedtrain.link.transport import HEARTBEAT, SERVICE, SILENCE, channel_options, details

__all__ = ["Link", "Partial", "Task", "connect"]

_PATIENCE = 4  # heartbeats that the server may take for its first word
_MOST_WAITING = 100  # tasks that a client is told of before it has looked at the first
_TASK_GONE = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED, grpc.StatusCode.INVALID_ARGUMENT)

_M = TypeVar("_M", bound=ServerMessage)


@dataclass
class Partial:
    """What was fetched of a payload before the connection broke: the next fetch of the same goes on from there."""

    key: object = None
    receiver: Receiver | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """What the server asks of this client.

    Attributes:
        notice: as it was announced.
        cancelled: set when the answer is not wanted any more.
    """

    notice: TaskNotice
    link: Link
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def overtaken(self) -> bool:
        """Whether the answer is not wanted any more, and another one is."""
        return self.cancelled.is_set() and self.link.wants_another(self)

    @property
    def id(self) -> str:
        """The server's name for it; the same if it is announced again."""
        return self.notice.id

    @property
    def kind(self) -> str:
        """The message type of flwr."""
        return self.notice.kind

    @property
    def group(self) -> str:
        """The round."""
        return self.notice.group

    @property
    def header(self) -> dict[str, Any]:
        """What is asked, but for the arrays' bytes."""
        return self.notice.header

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.notice.nbytes

    @property
    def checksum(self) -> str:
        """Of the arrays' bytes."""
        return self.notice.checksum

    def fetch(self, limit: int) -> Content:
        """Get what is asked, as tensors in memory.

        Args:
            limit: most bytes of the arrays.

        Raises:
            LinkError: it is too large, damaged, or not to be had any more.
            ConnectionLostError: the connection broke; what has come is kept in the link's `Partial`.
        """
        return self.link.fetch(self.notice, limit)

    def submit(self, packed: Packed) -> Ack:
        """Give the answer, and learn what became of it.

        Raises:
            ConnectionLostError: the connection broke; the answer may or may not have come through.
        """
        return self.link.submit(self.notice, packed)


class Link:
    """One session with a server; made by `connect`.

    Attributes:
        offer: the run that the server offers.
        farewell: the server's last word, once `tasks` has ended.
    """

    def __init__(self, channel: grpc.Channel, heartbeat: float, partial: Partial) -> None:
        self.farewell: Farewell | None = None
        self._channel, self._heartbeat, self._partial = channel, heartbeat, partial
        self._fetch = channel.unary_stream(f"/{SERVICE}/Fetch")
        self._submit = channel.stream_unary(f"/{SERVICE}/Submit")
        self._outbox: queue.SimpleQueue[ClientMessage | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[ServerMessage | FedtrainError] = queue.SimpleQueue()
        self._open: dict[str, Task] = {}
        self._session = ""
        self._status = Status(text="", progress=0)
        self._chunks = 0  # fetched: progress, too, of which the server sees only what it has sent
        self._closed = threading.Event()
        self._heard = time.monotonic()
        self._moving: set[object] = set()  # transfers: on a slow line, heartbeats queue behind them

    def open(self, hello: Hello) -> None:
        """Say hello and wait for the offer."""
        call = self._channel.stream_stream(f"/{SERVICE}/Session")(self._words())
        self._outbox.put(hello)
        threading.Thread(target=self._read, args=(call,), name="fedtrain-link", daemon=True).start()
        threading.Thread(target=self._beat, name="fedtrain-heartbeat", daemon=True).start()
        self.offer = self._expect(Offer, _PATIENCE * self._heartbeat)

    def close(self) -> None:
        """End the session."""
        self._closed.set()
        self._outbox.put(None)
        if not sys.is_finalizing():  # gRPC would wait for its threads, which stand still by then
            self._channel.close()

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Take part in the offered run.

        Raises:
            RefusedError: the server does not want it.
            ConnectionLostError: the connection broke.
        """
        self._outbox.put(Ready(run=self.offer.run, facts=dict(facts)))
        self._session = self._expect(Accepted, None).session

    def decline(self, reason: str) -> None:
        """Take no part in the offered run: ends the session."""
        self._outbox.put(Decline(reason=shorten(reason, 1000)))
        self._outbox.put(None)
        self._closed.wait(self._heartbeat)

    def status(self, text: str, progress: int = 0) -> None:
        """Say what this client is doing: a change of the text at once, the rest with the next heartbeat.

        Args:
            text: for the server's table.
            progress: larger than before when something was done, which keeps the server patient.
        """
        before, self._status = self._status, Status(text=shorten(text, 1000), progress=progress)
        if before.text != self._status.text:
            self._report()

    def tasks(self) -> Iterator[Task]:
        """Yield what the server asks, until it says farewell.

        Raises:
            RefusedError: the server does not want this client any more.
            ConnectionLostError: the connection broke.
        """
        while True:
            match self._next(None):
                case TaskNotice(id=number):
                    task = self._open.get(number)
                    if task and not task.cancelled.is_set():
                        yield task
                    self._open.pop(number, None)
                case Farewell() as farewell:
                    self.farewell = farewell
                    return
                case other:
                    raise LinkError("a message came out of turn", got=other.type)

    def leave(self) -> None:
        """End `tasks`, as if the connection broke, after what is being worked on; from any thread."""
        self._inbox.put(ConnectionLostError("this client leaves"))

    def wants_another(self, task: Task) -> bool:
        """Whether the server has asked something else, and waits for it."""
        return any(other is not task and not other.cancelled.is_set() for other in list(self._open.values()))

    def fetch(self, notice: TaskNotice, limit: int) -> Content:
        """See `Task.fetch`."""
        partial, key = self._partial, (notice.nbytes, notice.checksum, repr(notice.header))
        if partial.key != key or partial.receiver is None:
            partial.receiver = None  # two payloads may be more than there is memory for
            partial.key, partial.receiver = key, unpack(notice, limit)
        receiver = partial.receiver
        if receiver.received < notice.nbytes:
            wanted = Wanted(session=self._session, task=notice.id, offset=receiver.received)
            with self._fetching():
                call = self._fetch(encode(wanted))
                try:
                    for chunk in call:
                        receiver.write(chunk)
                        self._chunks += 1
                except LinkError:
                    partial.receiver = None
                    raise
                finally:
                    call.cancel()
        partial.receiver = None
        return receiver.finish()

    def submit(self, notice: TaskNotice, packed: Packed) -> Ack:
        """See `Task.submit`."""
        head = SubmitHead(
            session=self._session,
            task=notice.id,
            header=packed.header,
            nbytes=packed.nbytes,
            checksum=packed.checksum,
        )
        with self._calling():  # meanwhile heartbeats of the server come through
            return read_ack(self._submit(_parts(encode(head), packed)))

    def _report(self) -> None:
        progress = self._status.progress + self._chunks
        self._outbox.put(self._status.model_copy(update={"progress": progress}))

    def _words(self) -> Iterator[bytes]:
        while (message := self._outbox.get()) is not None:
            yield encode(message)

    def _read(self, call: Any) -> None:
        """Sort what the server says until it says no more."""
        try:
            for data in call:
                self._heard = time.monotonic()
                message = read_server(data)
                if self._inbox.qsize() >= _MOST_WAITING:
                    raise LinkError("the server asks for more than it waits for", got=f"{_MOST_WAITING} tasks at once")
                if isinstance(message, TaskNotice):
                    self._open[message.id] = Task(message, self)
                if isinstance(message, Cancel):
                    if task := self._open.get(message.id):
                        task.cancelled.set()
                elif not isinstance(message, Beat):
                    self._inbox.put(message)
            self._inbox.put(ConnectionLostError("the server ended the session"))
        except grpc.RpcError as error:
            self._inbox.put(_lost(error))
        except FedtrainError as error:
            self._inbox.put(error)
        finally:
            self._closed.set()

    def _beat(self) -> None:
        """Give signs of life, and miss those of the server."""
        while not self._closed.wait(self._heartbeat):
            self._report()
            if not self._moving and time.monotonic() - self._heard > SILENCE * self._heartbeat:
                self._inbox.put(ConnectionLostError("nothing is heard of the server"))
                self._channel.close()  # ends every call

    @contextlib.contextmanager
    def _fetching(self) -> Iterator[None]:
        """Mark that much data comes, behind which the server's signs of life wait."""
        mark = object()
        self._moving.add(mark)
        try:
            with self._calling():
                yield
        finally:
            self._heard = time.monotonic()
            self._moving.discard(mark)

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """What breaks a call is one of our errors."""
        try:
            yield
        except grpc.RpcError as error:
            raise _lost(error) from error
        except ValueError as error:  # so gRPC says that the channel is closed: `_beat` has given the server up
            raise ConnectionLostError("the connection to the server is closed") from error

    def _expect(self, kind: type[_M], timeout: float | None) -> _M:
        message = self._next(timeout)
        if isinstance(message, Farewell):
            raise ConnectionLostError("the server goes", got=shorten(message.reason, 300))
        if not isinstance(message, kind):
            raise LinkError("a message came out of turn", got=message.type)
        return message

    def _next(self, timeout: float | None) -> ServerMessage:
        """Wait for the server's next word."""
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            raise ConnectionLostError("the server does not answer", got=f"nothing in {timeout:g} seconds") from None
        if isinstance(message, FedtrainError):
            self._inbox.put(message)  # for whoever asks again
            raise message
        if isinstance(message, Refused):
            raise RefusedError(message.reason, message.final)
        return message


@contextlib.contextmanager
def connect(
    address: str,
    credentials: grpc.ChannelCredentials | None,
    hello: Hello,
    partial: Partial | None = None,
    heartbeat: float = HEARTBEAT,
) -> Iterator[Link]:
    """Open a session with a server.

    Args:
        address: "host:port".
        credentials: of this client; None is plain text.
        hello: who this client is.
        partial: kept over connections, so that a fetch goes on where it broke.
        heartbeat: seconds between two signs of life.

    Raises:
        InputError: the address is none.
        ConnectionLostError: the server cannot be reached.
        RefusedError: it does not want this client.
    """
    split_address(address)
    options = channel_options(heartbeat)
    if credentials:
        channel = grpc.secure_channel(address, credentials, options)
    else:
        channel = grpc.insecure_channel(address, options)
    link = Link(channel, heartbeat, partial or Partial())
    try:
        link.open(hello)
        yield link
    finally:
        link.close()


def _parts(head: bytes, packed: Packed) -> Iterator[bytes]:
    yield head
    yield from packed.payload.chunks()


def _lost(error: grpc.RpcError) -> FedtrainError:
    """What a broken call means for the client."""
    text = shorten(details(error), 300)
    if isinstance(error, grpc.Call) and error.code() in _TASK_GONE:
        return LinkError("the server has no such task any more", got=text)
    if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return ConnectionLostError("this is a port of something else: the clients' port of the server is wanted")
    if isinstance(error, grpc.Call) and "WRONG_VERSION_NUMBER" in (error.details() or ""):
        return ConnectionLostError("there is no TLS at this port")
    return ConnectionLostError(f"the connection to the server is lost ({text})")
