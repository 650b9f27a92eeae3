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

from fedtrain.data.federated import PartitionedData, build
from fedtrain.deployment.remote import Remote, Waits
from fedtrain.deployment.roster import RemoteData, Roster, checked_kind, num_examples
from fedtrain.deployment.terms import describe, differences, offer_for
from fedtrain.disk import atomic_write
from fedtrain.errors import DataError, InputError, RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.link.hub import Door, Hub
from fedtrain.rundir import RunFolder
from fedtrain.server.rounds import Observer
from fedtrain.simulations.run import Backend, Places, Setup, simulate

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
        own_data: clients bring their own rows, and the server has none.
        patience: seconds that a round waits for clients that make no progress.
        opened: what lasts as long as the hub; entered before it answers.
    """

    address: str
    door: Door = field(default_factory=Door)
    min_clients: int | None = None
    wait: float | None = None
    own_data: bool = False
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
    with contextlib.ExitStack() as stack:
        hub: Hub

        def load() -> PartitionedData:
            nonlocal hub
            folder.refuse_if_held()
            folder.spool.mkdir(parents=True, exist_ok=True)
            roster = Roster.read(folder.roster)
            data = None
            if not listening.own_data:
                data = build(experiment.data, places.data_root, places.base, experiment.seed)
            attendance = _Attendance(roster, data)
            offer = offer_for(experiment, roster.run, own_data=listening.own_data)
            hub = Hub(listening.address, offer, attendance, folder.spool, listening.door)
            stack.enter_context(listening.opened(Opened(hub, data.client_ids() if data else (), observer)))
            stack.enter_context(hub)
            where = json.dumps({"address": hub.address}).encode()
            atomic_write(folder.server, lambda file: file.write(where))
            stack.callback(folder.server.unlink, missing_ok=True)
            attendance.wait_for(listening, observer, folder.stop_wanted)
            roster.write(folder.roster)
            return data or RemoteData(experiment, roster)

        @contextlib.contextmanager
        def engine(setup: Setup) -> Iterator[Remote]:
            limit = max(2 * setup.capacity, _LEAST_LIMIT)
            waits = Waits(listening.patience, experiment.clients.deadline, setup.flowing)
            yield Remote(hub, setup.data.client_ids(), limit, waits)

        return simulate(experiment, places, observer, Backend(engine, load, live=True))


class _Attendance:
    """The hub's doorman: lets in whom the experiment knows, with data of the same kind.

    Args:
        roster: of the run; written to where clients bring their own data, until the run begins.
        data: of all clients; None where they bring their own.
    """

    def __init__(self, roster: Roster, data: PartitionedData | None) -> None:
        self._roster, self._data = roster, data
        self._kind = describe(data) if data else roster.kind
        self._names: Sequence[str] = data.client_ids() if data else tuple(roster.sizes)
        self._sizes: dict[str, int] = {}  # of clients that are there
        self._changed = threading.Condition()

    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        with self._changed:
            if self._names and name not in self._names:
                return f"this run has no client {name}; its {len(self._names)} are {self._names[0]}, ..."
            try:
                size = 0 if self._data else num_examples(facts)
                kind = self._kind or checked_kind(facts.get("data"))
            except DataError as error:
                return str(error)
            if why := differences(facts.get("data"), kind):
                return why
            if self._roster.sizes.get(name, size) != size:
                return f"it has {size} examples, and had {self._roster.sizes[name]} when the run began"
            self._kind = kind
            self._sizes[name] = size
            self._changed.notify_all()
        return None

    def left(self, name: str) -> None:
        with self._changed:
            self._sizes.pop(name, None)

    def wait_for(self, listening: Listening, observer: Observer, stop_wanted: Callable[[], bool]) -> None:
        """Block until enough clients are there; those with data of their own are all that the run will have.

        Raises:
            InputError: how many is not known.
            KeyboardInterrupt: somebody wants the server to stop.
            RunError: they did not come in time.
        """
        least = listening.min_clients or len(self._names)
        if not least:
            raise InputError(
                "how many clients will come is not known",
                hint="Where clients bring their own data, say for how many to wait: --min-clients N",
            )
        least = min(least, len(self._names) or least)
        end = math.inf if listening.wait is None else time.monotonic() + listening.wait
        with self._changed:
            if len(self._sizes) < least:
                observer.notice(f"waiting for {least} clients")
            while not self._changed.wait_for(lambda: len(self._sizes) >= least, min(_LOOK, end - time.monotonic())):
                if stop_wanted():
                    raise KeyboardInterrupt
                if time.monotonic() < end:
                    continue
                raise RunError(
                    "too few clients came",
                    got=f"{len(self._sizes)} in {listening.wait:g} seconds",
                    expected=f"{least}",
                    hint="Start more clients, or set --min-clients and --wait",
                )
            if not self._names:
                self._roster.kind, self._roster.sizes = self._kind, dict(sorted(self._sizes.items()))
                self._names = tuple(self._roster.sizes)
