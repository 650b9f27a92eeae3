"""The life of a client: dial out, take part, train, answer; through lost connections and from run to run."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from flwr.app import MessageType, Metadata, RecordDict

import fedtrain
from fedtrain import flower, wire
from fedtrain.deployment.site import Assembly, Owner, assemble
from fedtrain.errors import ConnectionLostError, FedtrainError, InputError, LinkError, RefusedError, RunError, shorten
from fedtrain.importing import blame
from fedtrain.link.channel import Link, Partial, Task, connect
from fedtrain.link.control import Hello, Offer
from fedtrain.link.frames import Packed, pack
from fedtrain.simulations.grid import answer

__all__ = ["Client", "Dial"]

_LOG = logging.getLogger("fedtrain.client")

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 30.0  # seconds between attempts to reach the server, doubled each time
_TELL = 1.0  # seconds between two reports of progress within a task


@dataclass(frozen=True)
class Dial:
    """Whom a client dials, and how.

    Attributes:
        server: "host:port".
        credentials: makes them anew for each connection, for certificates are renewed; None is plain text.
        once: end with the first run instead of waiting for the next.
    """

    server: str
    credentials: Callable[[], grpc.ChannelCredentials] | None = None
    once: bool = False


class Client:
    """Takes part in what a server runs.

    Args:
        owner: decides about data, devices, code and policy.
        dial: whom to reach.
        say: is told, in one line, what the client is doing, whenever that changes.
    """

    def __init__(self, owner: Owner, dial: Dial, say: Callable[[str], None]) -> None:
        self._owner, self._dial, self._say = owner, dial, say
        self._hello = Hello(version=fedtrain.__version__, name=owner.name, instance=secrets.token_hex(8))
        self._partial = Partial()
        self._assembled: tuple[Offer, Assembly] | None = None
        self._link: Link | None = None
        self._task: Task | None = None
        self._text, self._steps, self._told = "", 0, 0.0
        self._pause, self._stale = threading.Event(), threading.Event()
        flower.enter_run(1)

    def reconnect(self) -> None:
        """Dial anew, with new credentials, as soon as no task is being worked on; from any thread."""
        self._stale.set()
        if link := self._link:
            link.leave()

    def run(self) -> None:
        """Stay until the run is over (`once`), or for ever.

        Raises:
            InputError: the server refuses this client for good, or its credentials cannot be had.
            FedtrainError: the client cannot take part (`once`).
        """
        wait = _FIRST_WAIT
        while True:
            try:
                over = self._session()
                if over and self._dial.once:
                    return
                wait = _FIRST_WAIT
            except ConnectionLostError as error:
                if self._link is not None:
                    wait = _FIRST_WAIT
                if self._stale.is_set():
                    continue
                self._tell(f"waiting for {self._dial.server}: {error}")
            except RefusedError as error:
                if error.final:
                    raise InputError(f"the server refuses this client: {shorten(error.reason, 300)}") from error
                self._tell(f"waiting: the server says: {shorten(error.reason, 300)}")
            except LinkError as error:  # what it sent makes no sense; it may be mended there
                self._tell(f"waiting: {error}")
            except FedtrainError:
                raise
            except Exception as error:  # a fault of ours, or of what the server sends; a later run may be spared
                _LOG.error("this is a fault of fedtrain, which goes on: %s", blame(error))
            finally:
                self._link = None
            self._pause.wait(wait * random.uniform(0.5, 1.0))  # noqa: S311 - so that clients do not come all at once
            wait = min(2 * wait, _LONGEST_WAIT)

    def _session(self) -> bool:
        """One connection, from hello to farewell; True if the run is over."""
        self._stale.clear()
        credentials = self._dial.credentials() if self._dial.credentials else None
        with connect(self._dial.server, credentials, self._hello, self._partial) as link:
            self._tell("connected")
            try:
                assembly = self._assembly(link.offer)
            except LinkError:
                raise
            except FedtrainError as error:
                # What is wrong here may tell of the data, so the server learns no more than that.
                link.decline("its policy or its data do not allow this run")
                if self._dial.once:
                    raise
                self._tell(f"takes no part in this run: {error}")
                self._pause.wait(_LONGEST_WAIT)
                return False
            link.ready(assembly.facts)
            self._link = link
            if self._stale.is_set():  # since the credentials were made
                link.leave()
            self._tell(f"takes part in run {link.offer.run[:8]}, waits for a task")
            for task in link.tasks():
                self._work(task, assembly)
            farewell = link.farewell
            assert farewell, "tasks end with a farewell"
            self._tell(f"the server says: {shorten(farewell.reason, 300)}")
            if not farewell.back:
                assembly.outbox.clear()
            return not farewell.back

    def _assembly(self, offer: Offer) -> Assembly:
        """What the offered run needs; kept while the offer stays the same."""
        if self._assembled is None or self._assembled[0] != offer:
            self._assembled = None
            self._tell("loads data and model")
            self._assembled = offer, assemble(self._owner, offer, self._stepped)
        return self._assembled[1]

    def _work(self, task: Task, assembly: Assembly) -> None:
        """Answer one task: by the update that is on disk already, or by a new one that goes there first."""
        self._task = task
        what = "trains" if task.kind == MessageType.TRAIN else "measures"
        self._tell(f"round {shorten(task.group)}: {what}")
        try:
            packed = self._kept(task, assembly) or self._made(task, assembly)
            if not task.cancelled.is_set():
                self._tell(f"round {shorten(task.group)}: sends")
            ack = task.submit(packed)
        except LinkError as error:  # the task is gone, or makes no sense; the next may
            _LOG.warning("round %s: %s", shorten(task.group), error)
        else:
            if ack.verdict in ("late", "refused"):
                _LOG.warning("round %s: the update was not used: %s", shorten(task.group), shorten(ack.reason, 300))
        self._tell("waits for a task")

    def _kept(self, task: Task, assembly: Assembly) -> Packed | None:
        return assembly.outbox.find(task) if task.kind == MessageType.TRAIN and task.group.isdecimal() else None

    def _made(self, task: Task, assembly: Assembly) -> Packed:
        content = task.fetch(assembly.limit)
        if not isinstance(content, RecordDict) or not task.group.isdecimal():
            raise LinkError("the server asks for nothing that a client can do", got=task.kind)
        metadata = Metadata(1, task.id, 0, 1, "", task.group, time.time(), 3600.0, task.kind)  # noqa: TID251 - a date
        message = flower.message(content, metadata)
        with contextlib.suppress(FedtrainError, KeyError):
            assembly.outbox.drop(wire.instruction(message).kept_round)
        reply = answer(assembly.app, message, self._owner.name)
        packed = pack(reply.content if reply.has_content() else reply.error)
        if task.kind == MessageType.TRAIN and reply.has_content():
            try:
                assembly.outbox.keep(task, packed)
            except RunError as error:  # it can be sent all the same; if it is lost it is made, and paid for, anew
                _LOG.warning("round %s: %s", shorten(task.group), error)
        return packed

    def _stepped(self) -> None:
        """A step of training is done: let the server be patient, unless it has gone on without this client."""
        self._steps += 1
        if self._task and self._task.overtaken:
            raise RunError("the server has gone on to a later round")
        now = time.monotonic()
        if now - self._told >= _TELL and self._link:
            self._told = now
            self._link.status(self._text, self._steps)

    def _tell(self, text: str) -> None:
        if text != self._text:
            self._text = text
            self._say(text)
        if self._link:
            self._steps += 1
            self._link.status(text, self._steps)
