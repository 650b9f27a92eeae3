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
from fedtrain.errors import ClientsJoinedError, DataError, InputError, RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.link.hub import Door, Hub
from fedtrain.link.register import Passing
from fedtrain.rundir import RunFolder
from fedtrain.server.observer import Observer
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
    if listening.own_data and experiment.data.held_out:
        raise InputError(
            "data.held_out is for clients whose names are known beforehand",
            got=", ".join(experiment.data.held_out),
            hint="Leave it out, or leave --own-data out",
        )
    folder = RunFolder(places.out)
    with contextlib.ExitStack() as stack:
        hub: Hub | None = None
        attendance: _Attendance

        def load() -> PartitionedData:
            nonlocal hub, attendance
            if hub is None:
                data = None
                if not listening.own_data:
                    data = build(experiment.data, places.data_root, places.base, experiment.seed)
                stack.enter_context(folder.locked())  # before anybody is let in, and for as long as the hub is open
                folder.spool.mkdir(exist_ok=True)
                attendance = _Attendance(Roster.read(folder.roster), data, fixed=experiment.privacy is not None)
                offer = offer_for(experiment, attendance.roster.run, own_data=listening.own_data, base=places.base)
                hub = Hub(listening.address, offer, attendance, folder.spool, listening.door)
                stack.enter_context(listening.opened(Opened(hub, data.client_ids() if data else (), observer)))
                stack.enter_context(hub)
                where = json.dumps({"address": hub.address}).encode()
                atomic_write(folder.server, lambda file: file.write(where))
                stack.callback(folder.server.unlink, missing_ok=True)
                attendance.wait_for(listening, observer, folder.stop_wanted)
            attendance.enlist()
            attendance.roster.write(folder.roster)
            return attendance.data or RemoteData(experiment, attendance.roster)

        @contextlib.contextmanager
        def engine(setup: Setup) -> Iterator[Remote]:
            assert hub, "data are loaded first"
            limit = max(2 * setup.capacity, _LEAST_LIMIT)
            waits = Waits(listening.patience, experiment.clients.deadline, setup.flowing)
            with contextlib.closing(Remote(hub, setup.data.client_ids(), limit, waits)) as remote:
                yield remote

        backend = Backend(engine, load, live=True, joined=lambda: bool(attendance.newcomers()), locked=True)
        while True:
            try:
                return simulate(experiment, places, observer, backend)
            except ClientsJoinedError as joined:
                observer.notice(str(joined))


class _Attendance:
    """The hub's doorman: lets in whom the experiment knows, with data of the same kind.

    Where clients bring their own data, it lets in everybody with data of that kind, unless the clients are fixed.

    Args:
        roster: of the run; written to where clients bring their own data.
        data: of all clients; None where they bring their own.
        fixed: nobody new may come once the run has begun.
    """

    def __init__(self, roster: Roster, data: PartitionedData | None, *, fixed: bool) -> None:
        self.roster, self.data = roster, data
        self._fixed = fixed or data is not None
        self._kind = describe(data) if data else roster.kind
        self._names: Sequence[str] = data.client_ids() if data else tuple(roster.sizes)
        self._sizes: dict[str, int] = {}  # of clients that are there
        self._changed = threading.Condition()

    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        with self._changed:
            if self._fixed and self._names and name not in self._names:
                return Passing(f"this run has no client {name}")
            try:
                size = 0 if self.data else num_examples(facts)
                kind = self._kind or checked_kind(facts.get("data"))
            except DataError as error:
                return str(error)
            if why := differences(facts.get("data"), kind):
                hint = (
                    ""
                    if self.data
                    else ": the columns must be the same everywhere, in one order, and the classes (data.classes)"
                )
                return Passing(why + hint)
            if self.roster.sizes.get(name, size) != size:
                return Passing(f"it has {size} examples, and had {self.roster.sizes[name]} when it joined the run")
            self._kind = kind
            self._sizes[name] = size
            self._changed.notify_all()
        return None

    def left(self, name: str) -> None:
        with self._changed:
            self._sizes.pop(name, None)
            if not self._names and not self._sizes:  # the first to come again says what the data are
                self._kind = {}

    def newcomers(self) -> list[str]:
        """Who is there with data of its own, and takes no part yet."""
        with self._changed:
            return [] if self.data else sorted(self._sizes.keys() - self.roster.sizes.keys())

    def enlist(self) -> None:
        """Give those who are there a place in the run, after all who have one."""
        with self._changed:
            for name in self.newcomers():
                self.roster.sizes[name] = self._sizes[name]
            self.roster.kind = self._kind if self.data is None else {}
            self._names = self._names or tuple(self.roster.sizes)

    def wait_for(self, listening: Listening, observer: Observer, stop_wanted: Callable[[], bool]) -> None:
        """Block until enough clients are there.

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
