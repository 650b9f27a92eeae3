"""The server end: clients hold a session, fetch what they are asked, and submit their answers. Nothing polls."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import grpc
from flwr.app import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedtrain.errors import FedtrainError, InputError, LinkError, RunError, shorten
from fedtrain.link.board import Batch, Board, OpenTask
from fedtrain.link.control import (
    PROTOCOL,
    Cancel,
    ClientMessage,
    Decline,
    Farewell,
    Hello,
    Offer,
    Ready,
    Refused,
    Status,
    TaskNotice,
    encode,
    read_client,
)
from fedtrain.link.identity import split_address
from fedtrain.link.register import Passing
from fedtrain.link.roster import Guest, Member, Roster
from fedtrain.link.transfers import Transfers
from fedtrain.link.transport import HEARTBEAT, SERVICE, SILENCE, is_loopback, server_options

__all__ = ["Door", "Doorman", "Hub"]

_LOG = logging.getLogger("fedtrain.link")

_WATCH = 0.5  # seconds between two looks at certificates and signs of life


class Doorman(Protocol):
    """Decides who takes part. It is called from threads of the hub."""

    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        """A client is ready: say what is against it, `Passing` or for good, or None."""

    def left(self, name: str) -> None:
        """A client that took part has gone; it may come back."""


@dataclass(frozen=True)
class Door:
    """How clients get in.

    Attributes:
        credentials: of the server, with clients' certificates required; None is plain text.
        verify: a client's certificate in PEM -> what is against it, or None; asked at every call, and twice a second.
        insecure: plain text beyond this machine was asked for by a person.
        max_clients: at once.
        heartbeat: seconds between two signs of life.
    """

    credentials: grpc.ServerCredentials | None = None
    verify: Callable[[bytes], str | None] | None = None
    insecure: bool = False
    max_clients: int = 64
    heartbeat: float = HEARTBEAT


class Hub:
    """Serves clients.

    Args:
        listen: "host:port"; port 0 takes a free one.
        offer: the run that clients are offered.
        doorman: decides who takes part.
        spool: folder for the payloads of answers; they have no names there.
        door: how clients get in.

    Raises:
        InputError: the address cannot be listened at.
    """

    def __init__(self, listen: str, offer: Offer, doorman: Doorman, spool: Path, door: Door | None = None) -> None:
        self._door = door or Door()
        self._offer, self._doorman = offer, doorman
        self._board = Board()
        self._roster = Roster(self._door.max_clients, SILENCE * self._door.heartbeat)
        self._closing = threading.Event()
        threads = 3 * self._door.max_clients + 16  # a session, a fetch and a submit each
        self.server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="fedtrain-link"),
            options=server_options(self._door.heartbeat),
            maximum_concurrent_rpcs=threads,
        )
        """Other services can be added before `start`."""
        transfers = Transfers(self._board, self._roster, spool, self._objection)
        handlers = {
            "Session": grpc.stream_stream_rpc_method_handler(self._session),
            "Fetch": grpc.unary_stream_rpc_method_handler(transfers.fetch),
            "Submit": grpc.stream_unary_rpc_method_handler(transfers.submit),
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self.address = self._bind(listen)

    def start(self) -> None:
        """Begin to serve."""
        self.server.start()
        self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        threading.Thread(target=self._watch, name="fedtrain-watch", daemon=True).start()

    def close(self, reason: str = "the run is over", *, back: bool = False, grace: float = 5.0) -> None:
        """Say farewell and stop.

        Args:
            reason: for the clients.
            back: whether the server will be there again.
            grace: seconds for what is under way.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._board.fail(RunError(f"the server closed: {shorten(reason)}"))
        self._health.enter_graceful_shutdown()
        for guest in self._roster.guests():
            guest.send(Farewell(reason=shorten(reason, 1000), back=back))
        self.server.stop(grace).wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close("the server stops" if error else "the run is over", back=error is not None)

    def exchange(
        self,
        tasks: Sequence[tuple[str, Message]],
        limit: int,
        patience: float | None = None,
        deadline: float | None = None,
    ) -> Iterator[Message]:
        """Ask clients and yield their replies as they come; what is not iterated is not asked.

        Args:
            tasks: client's name and message. A client that is away is asked when it comes back.
            limit: most bytes of a reply's payload.
            patience: ends when no client that has not answered has made progress for so many seconds.
            deadline: ends after so many seconds.

        Raises:
            RunError: the server is closed, or cannot store replies.
        """
        if self._closing.is_set():
            raise RunError("the server is closed")
        batch = Batch()
        for task in self._board.open(tasks, limit, batch):
            self._announce(task)
        try:
            yield from batch.collect(patience, deadline, lambda: self.withdraw(batch.tasks))
        finally:
            self.withdraw(batch.tasks)

    def flow(
        self, tasks: Sequence[tuple[str, Message]], limit: int, patience: float | None, batch: Batch
    ) -> Iterator[Message]:
        """Ask clients and yield replies as they come, also to what was asked before with the same batch.

        Who stops reading leaves the others at work: their replies come with a later call.

        Args:
            tasks: client's name and message, as for `exchange`.
            limit: most bytes of a reply's payload.
            patience: seconds without progress of a client, after which its reply is an error: `flower.CLIENT_AWAY`.
            batch: holds what is under way.

        Raises:
            RunError: the server is closed, or cannot store replies.
        """
        if self._closing.is_set():
            raise RunError("the server is closed")
        for task in self._board.open(tasks, limit, batch):
            self._announce(task)
        yield from batch.flow(patience, lambda overdue: self._miss(overdue, patience))

    def withdraw(self, tasks: Sequence[OpenTask]) -> None:
        """Want no answers any more to what is still open."""
        self._cancel(self._board.withdraw(tasks))

    def members(self) -> list[Member]:
        """All clients that were ever here."""
        return self._roster.members({task.name: task.message.metadata.group_id for task in self._board.all()})

    # Sessions

    def _session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        guest = Guest(context)
        self._roster.enter(guest)
        threading.Thread(target=self._listen, args=(requests, guest), daemon=True).start()
        try:
            while (message := guest.next(self._door.heartbeat)) is not None:
                yield encode(message)
        finally:
            self._roster.forget(guest)
            self._left(guest)

    def _listen(self, requests: Iterator[bytes], guest: Guest) -> None:
        """Read what a client says until it goes."""
        try:
            for data in requests:
                guest.seen = time.monotonic()
                self._hear(guest, read_client(data))
                if guest.done:
                    break
        except grpc.RpcError:
            pass  # gone
        except FedtrainError as error:
            self._refuse(guest, str(error))
        except Exception:
            _LOG.exception("a session failed")
            self._refuse(guest, Passing("the server failed"))
        finally:
            guest.end()

    def _hear(self, guest: Guest, message: ClientMessage) -> None:
        match message:
            case Hello() if guest.hello is None:
                self._greet(guest, message)
            case Ready() if guest.hello and not guest.ready:
                guest.ready = True
                self._admit(guest, guest.hello.name, message)
            case Decline() if guest.hello:
                _LOG.info("%s takes no part: %s", guest.hello.name, shorten(message.reason, 300))
            case Status() if guest.hello:
                if self._roster.hear(guest, shorten(message.text, 200), message.progress):
                    for task in self._board.of(guest.hello.name):
                        task.moved = time.monotonic()
            case _:
                raise LinkError("a message came out of turn", got=message.type)

    def _greet(self, guest: Guest, hello: Hello) -> None:
        """Offer the run, or say why not."""
        if hello.protocol != PROTOCOL:
            versions = f"the client speaks protocol {hello.protocol}, the server {PROTOCOL}"
            self._refuse(guest, f"{versions}: install the same version of fedtrain on both")
        elif guest.certified not in (None, hello.name):
            self._refuse(guest, f"its certificate is not of {hello.name}")
        elif why := self._objection(guest.certificate):
            self._refuse(guest, why)
        else:
            if older := self._roster.outdated(hello):
                self._left(older)
                older.cut()
            if why := self._roster.sit(guest, hello):
                self._refuse(guest, Passing(why))
            else:
                guest.send(self._offer)

    def _admit(self, guest: Guest, name: str, ready: Ready) -> None:
        """Let a client take part, and tell it what it is asked."""
        if ready.run != self._offer.run:
            self._refuse(guest, Passing("this is another run"))
        elif why := self._doorman.ready(name, ready.facts):
            self._refuse(guest, why)
        elif self._roster.admit(guest, ready.facts):
            for task in self._board.of(name):
                self._announce(task)
        else:
            self._doorman.left(name)

    def _refuse(self, guest: Guest, reason: str) -> None:
        name = guest.hello.name if guest.hello else guest.certified or "a client"
        _LOG.warning("%s at %s is refused: %s", name, guest.peer, shorten(reason, 300))
        guest.send(Refused(reason=shorten(reason, 1000), final=not isinstance(reason, Passing)))

    def _left(self, guest: Guest) -> None:
        if self._roster.leave(guest):
            assert guest.hello, "who took part has said who it is"
            self._doorman.left(guest.hello.name)

    def _announce(self, task: OpenTask) -> None:
        """Tell a client of a task, once per session."""
        with self._roster.lock:
            guest = self._roster.present(task.name)
            if guest is None or task.told is guest or not task.open:
                return
            task.told = guest
            metadata, packed = task.message.metadata, task.packed
            notice = TaskNotice(
                id=task.id,
                kind=metadata.message_type,
                group=metadata.group_id,
                header=packed.header,
                nbytes=packed.nbytes,
                checksum=packed.checksum,
            )
            guest.send(notice)

    def _miss(self, tasks: Sequence[OpenTask], patience: float | None) -> None:
        self._cancel(self._board.miss(tasks, f"no progress for {patience:g} seconds"))

    def _cancel(self, tasks: Sequence[OpenTask]) -> None:
        for task in tasks:
            with self._roster.lock:
                guest = self._roster.present(task.name)
                if guest and task.told is guest:
                    guest.send(Cancel(id=task.id))

    def _watch(self) -> None:
        """Let revocation act at once, and end sessions of which nothing is heard."""
        while not self._closing.wait(_WATCH):
            try:
                for guest in self._roster.guests():
                    if not guest.done and (why := self._objection(guest.certificate)):
                        self._throw_out(guest, why)
                for guest in self._roster.silent():
                    guest.cut()
            except Exception:  # of the doorman's; the watch goes on
                _LOG.exception("the watch over sessions failed")

    def _throw_out(self, guest: Guest, reason: str) -> None:
        """End a session for good, and do not wait for its client."""
        self._refuse(guest, reason)
        if guest.hello and self._roster.leave(guest):
            self._board.give_up(guest.hello.name, reason)
            self._doorman.left(guest.hello.name)

    def _objection(self, certificate: bytes | None) -> str | None:
        """What is against a certificate; what cannot be verified is refused."""
        if certificate is None or self._door.verify is None:
            return None
        try:
            return self._door.verify(certificate)
        except Exception as error:  # a damaged list of revocations, for one
            _LOG.error("a certificate cannot be verified: %s", shorten(error, 300))
            return Passing("its certificate cannot be verified now")

    def _bind(self, listen: str) -> str:
        """Listen, and give the address with its real port."""
        host, _ = split_address(listen)
        door = self._door
        if door.credentials is None and not door.insecure and not is_loopback(host):
            raise InputError(
                "only this machine may be served in plain text",
                got=listen,
                expected="a loopback address such as 127.0.0.1:9090, or certificates",
                hint="Make certificates with `fedtrain ca init`",
            )
        try:
            if door.credentials:
                bound = self.server.add_secure_port(listen, door.credentials)
            else:
                bound = self.server.add_insecure_port(listen)
        except RuntimeError as error:
            raise InputError(
                "the server cannot listen there",
                got=listen,
                expected="an address of this machine, HOST:PORT, that no other process uses",
            ) from error
        return f"{listen.rpartition(':')[0]}:{bound}"
