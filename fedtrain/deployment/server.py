"""`fedtrain server`: an experiment over clients that dial in. All but how messages travel is as in a simulation."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import Message

from fedtrain.deployment.terms import describe, differences, offer_for, run_name
from fedtrain.disk import atomic_write
from fedtrain.errors import RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.link.hub import Door, Hub
from fedtrain.rundir import RunFolder
from fedtrain.server.rounds import Observer
from fedtrain.simulations.run import Places, Setup, simulate

__all__ = ["Listening", "Opened", "serve"]

_LOOK = 0.5  # seconds between two looks whether to stop, while clients are waited for
_LEAST_LIMIT = 1 << 20  # bytes of a reply whatever the model


class Opened(NamedTuple):
    """A hub that listens, for whom, and who watches."""

    hub: Hub
    names: Sequence[str]
    observer: Observer


@dataclass(frozen=True)
class Listening:
    """How a server waits for its clients.

    Attributes:
        address: "host:port"; port 0 takes a free one.
        door: certificates and caps.
        min_clients: that must be there before the first round; None for all that the data name.
        wait: seconds that they have for it; None waits on.
        patience: seconds that a round waits for clients that make no progress.
        opened: what lasts as long as the hub; entered before it answers.
    """

    address: str
    door: Door = field(default_factory=Door)
    min_clients: int | None = None
    wait: float | None = None
    patience: float = 60.0
    opened: Callable[[Opened], AbstractContextManager[object]] = contextlib.nullcontext


def serve(experiment: Experiment, places: Places, observer: Observer, listening: Listening) -> RunFolder:
    """Run an experiment over clients that dial in, or go on with it where it was stopped.

    Args:
        experiment: what to run.
        places: where to read and write.
        observer: is told what happens.
        listening: where and how to wait for clients.

    Returns:
        The folder of the complete run.

    Raises:
        InputError: the address, the data, the task or the folder does not fit.
        InterruptedRunError: stopped by a signal; resumable.
        RunError: the run cannot go on; resumable.
    """
    folder = RunFolder(places.out)

    @contextlib.contextmanager
    def engine(setup: Setup) -> Iterator[_Remote]:
        names = setup.data.client_ids()
        attendance = _Attendance(names, describe(setup.data.spec))
        offer = offer_for(experiment, run_name(experiment, folder.read_manifest().created_at, folder.path))
        spool = folder.path / "spool"
        spool.mkdir(exist_ok=True)
        hub = Hub(listening.address, offer, attendance, spool, listening.door)
        with listening.opened(Opened(hub, names, observer)), hub:
            where = json.dumps({"address": hub.address}).encode()
            atomic_write(folder.server, lambda file: file.write(where))
            try:
                attendance.wait_for(listening, observer, folder.stop_wanted)
                yield _Remote(hub, names, max(2 * setup.capacity, _LEAST_LIMIT), listening.patience)
            finally:
                folder.server.unlink(missing_ok=True)

    return simulate(experiment, places, observer, engine)


class _Attendance:
    """The hub's doorman: lets in whom the experiment knows, with data of the same kind."""

    def __init__(self, names: Sequence[str], spec: dict[str, Any]) -> None:
        self._names, self._spec = names, spec
        self._here: set[str] = set()
        self._changed = threading.Condition()

    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        if name not in self._names:
            return f"the experiment has no client {name}; its {len(self._names)} are {self._names[0]}, ..."
        if why := differences(facts.get("data"), self._spec):
            return why
        with self._changed:
            self._here.add(name)
            self._changed.notify_all()
        return None

    def left(self, name: str) -> None:
        with self._changed:
            self._here.discard(name)

    def wait_for(self, listening: Listening, observer: Observer, stop_wanted: Callable[[], bool]) -> None:
        """Block until enough clients are there.

        Raises:
            KeyboardInterrupt: somebody wants the server to stop.
            RunError: they did not come in time.
        """
        least = min(listening.min_clients or len(self._names), len(self._names))
        end = math.inf if listening.wait is None else time.monotonic() + listening.wait
        with self._changed:
            if len(self._here) < least:
                observer.notice(f"waiting for {least} clients")
            while not self._changed.wait_for(lambda: len(self._here) >= least, min(_LOOK, end - time.monotonic())):
                if stop_wanted():
                    raise KeyboardInterrupt
                if time.monotonic() < end:
                    continue
                raise RunError(
                    "too few clients came",
                    got=f"{len(self._here)} in {listening.wait:g} seconds",
                    expected=f"{least}",
                    hint="Start more clients, or set --min-clients and --wait",
                )


class _Remote:
    """The engine whose clients are elsewhere.

    A client that did not answer in a round, and is not there, is not waited for until it comes back.
    """

    def __init__(self, hub: Hub, names: Sequence[str], limit: int, patience: float) -> None:
        self._hub, self._names, self._limit, self._patience = hub, names, limit, patience
        self._gone: set[str] = set()

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        here = {member.name for member in self._hub.members() if member.connected}
        self._gone -= here
        asked = {message.metadata.message_id: self._names[message.metadata.dst_node_id - 1] for message in messages}
        tasks = [(asked[m.metadata.message_id], m) for m in messages if asked[m.metadata.message_id] not in self._gone]
        silent = {name for name, _ in tasks}
        for reply in self._hub.exchange(tasks, self._limit, self._patience):
            silent.discard(asked[reply.metadata.reply_to_message_id])
            yield reply
        self._gone |= silent
