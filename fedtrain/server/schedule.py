"""When clients train and whose update a round takes: in step with the slowest, by a deadline, or never waiting.

Durations here lie on a virtual clock, so nobody really waits; what is decided depends on (seed, round, client) and on
that clock alone.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedtrain.errors import RunError
from fedtrain.server.devices import Devices, Participation
from fedtrain.server.selection import Crowd, Mask
from fedtrain.strategies.base import Asynchrony

__all__ = ["Buffered", "InStep", "Schedule", "Turn", "virtual_schedule"]


@dataclass(frozen=True)
class Turn:
    """What happens in one round. Clients are named by their position.

    Attributes:
        ask: who starts to train now, on the current model.
        use: (client, round in which it started) of the updates that the round takes, in the order of the sum.
        wanted: updates that the round is meant to have.
        work: share of the local steps, for those that have not time for all.
        late: who was asked, but is not waited for, or vanishes from its work.
        seconds: the round's length on the virtual clock, waiting for clients to be there included; 0 without one.
        client_seconds: that clients have worked in this round, on the virtual clock.
        wasted_seconds: those of them that no update comes from.
        enough: updates that pass the gate, after which nobody else is waited for; None waits for all.
        flowing: clients start and answer at any time, also from round to round.
    """

    ask: Sequence[int]
    use: Sequence[tuple[int, int]]
    wanted: int
    work: Mapping[int, float] = field(default_factory=dict)
    late: Sequence[int] = ()
    seconds: float = 0.0
    client_seconds: float = 0.0
    wasted_seconds: float = 0.0
    enough: int | None = None
    flowing: bool = False


class Schedule(Protocol):
    """Plans one round after another."""

    def turn(self, round_number: int) -> Turn:
        """Plan the next round."""

    def memory(self) -> dict[str, Any]:
        """What a resumed run needs to go on alike; numbers only."""

    def start(self, round_number: int) -> Sequence[int]:
        """Whom to ask now, where clients start at any time."""
        return ()

    def under_way(self) -> Mapping[int, int]:
        """Client -> the round in which it started, where clients start at any time."""
        return {}

    def answered(self, turn: Turn, client: int, seconds: float) -> None:
        """Learn that a client answered, so many seconds after the round began."""
        return

    def missed(self, turn: Turn, clients: Iterable[int]) -> None:
        """Learn who had sent nothing of use when the round ended."""
        return


def virtual_schedule(
    crowd: Crowd, devices: Devices | None, asynchrony: Asynchrony | None, memory: Mapping[str, Any]
) -> Schedule:
    """Build the schedule of a simulation, or of its forecast: they are the same.

    Args:
        crowd: who can be asked.
        devices: how long clients take; None where time does not count.
        asynchrony: of the strategy; None for rounds.
        memory: of an earlier part of the run; nothing for a new one.
    """
    if asynchrony is None:
        return InStep(crowd, devices, memory)
    assert devices is not None, "the experiment was checked for it"
    return Buffered(crowd, asynchrony, devices, memory)


class InStep(Schedule):
    """A round ends with the last of its clients, with the first `per_round` of them, or at the deadline.

    Who is still at work then stops. That a client has vanished is noticed at once.

    Args:
        crowd: who can be asked.
        devices: how long clients take; None where time does not count.
        memory: of an earlier part of the run; nothing for a new one.
    """

    def __init__(self, crowd: Crowd, devices: Devices | None, memory: Mapping[str, Any]) -> None:
        self._crowd, self._devices = crowd, devices
        self._now: float = memory.get("now", 0.0)

    def turn(self, round_number: int) -> Turn:
        """Plan the next round.

        Raises:
            RunError: no client will ever be there.
        """
        began, here = self._now, None
        if self._devices:
            self._now = _opening(self._devices, self._now, self._crowd)
            here = self._devices.here(self._now)
        drawn = self._crowd.draw(round_number, here).tolist()
        wanted = self._crowd.wanted()
        if self._crowd.section.sampling == "poisson" or (here is not None and len(drawn) < wanted):
            wanted = len(drawn)
        if self._devices is None:
            return Turn(drawn, [(client, round_number) for client in drawn], wanted)
        parts = {c: self._devices.participation(c, round_number, self._now) for c in drawn}
        turn = self._planned(round_number, parts, wanted)
        waited = self._now - began
        self._now += turn.seconds
        return replace(turn, seconds=waited + turn.seconds) if waited else turn

    def memory(self) -> dict[str, Any]:
        return {"now": self._now}

    def _planned(self, round_number: int, parts: Mapping[int, Participation], wanted: int) -> Turn:
        section = self._crowd.section
        deadline = math.inf if section.deadline is None else section.deadline
        arrival, work = dict[int, float](), dict[int, float]()
        for client, part in parts.items():
            if part.finished and part.seconds <= deadline:
                arrival[client] = part.seconds
            elif section.late == "partial" and part.vanishes > deadline and (share := part.share_by(deadline)):
                arrival[client], work[client] = deadline, share
        used = sorted(sorted(arrival, key=lambda c: (parts[c].seconds, c))[:wanted])
        if len(used) == wanted:
            length = max((arrival[client] for client in used), default=0.0)
        else:  # the server cannot know that nobody else will come before all are done, or gone
            length = min(deadline, max((part.worked for part in parts.values()), default=0.0))
        late = sorted(parts.keys() - set(used))
        wasted = sum(min(parts[client].worked, length) for client in late)
        return Turn(
            used,
            [(client, round_number) for client in used],
            wanted,
            {client: work[client] for client in used if client in work},
            late,
            length,
            sum(arrival[client] for client in used) + wasted,
            wasted,
        )


class _Flight(NamedTuple):
    """A participation that is under way; they are ordered by their ends."""

    end: float  # on the virtual clock: its update arrives, or the client vanishes
    client: int
    start: int  # the round in which it started
    finished: int  # 1 if its update arrives, 0 if the client vanishes


class Buffered(Schedule):
    """Clients train on whatever model is the newest when they start; a full buffer of updates makes a round.

    That a client has vanished is noticed at once, and another takes its place.

    Args:
        crowd: who can be asked.
        asynchrony: size of the buffer, and how many train at any time.
        devices: how long clients take.
        memory: of an earlier part of the run; nothing for a new one.

    References:
        Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, algorithm 1.
    """

    def __init__(self, crowd: Crowd, asynchrony: Asynchrony, devices: Devices, memory: Mapping[str, Any]) -> None:
        self._crowd, self._asynchrony, self._devices = crowd, asynchrony, devices
        self._now: float = memory.get("now", 0.0)
        self._started: int = memory.get("started", 0)
        # A heap: the next to end comes first.
        self._flights = sorted(
            _Flight(end, int(client), start, finished)
            for client, (end, start, finished) in memory.get("training", {}).items()
        )

    def turn(self, round_number: int) -> Turn:
        """Plan the next round.

        Raises:
            RunError: no client will ever be there.
        """
        began, worked, wasted = self._now, 0.0, 0.0
        ask, late, use = list[int](), list[int](), list[tuple[int, int]]()
        free = np.ones(len(self._crowd.sizes), dtype=bool)  # who may start: nobody twice on one model
        free[[flight.client for flight in self._flights]] = False
        doomed = sum(not flight.finished for flight in self._flights)
        while len(use) < self._asynchrony.buffer_size:
            for flight in self._fill(round_number, free):
                (ask if flight.finished else late).append(flight.client)
                doomed += not flight.finished
            end = self._flights[0].end if self._flights else math.inf
            opening = self._next_opening(free)
            if end == opening == math.inf:
                break
            passed = min(end, opening) - self._now
            worked += passed * len(self._flights)
            wasted += passed * doomed
            self._now = min(end, opening)
            if end <= opening:
                flight = heapq.heappop(self._flights)
                free[flight.client] = flight.start != round_number
                doomed -= not flight.finished
                if flight.finished:
                    use.append((flight.client, flight.start))
        if not (use or ask or late):
            _opening(self._devices, self._now, self._crowd)
        return Turn(
            sorted(ask),
            use,
            self._asynchrony.buffer_size,
            late=sorted(late),
            seconds=self._now - began,
            client_seconds=worked,
            wasted_seconds=wasted,
        )

    def memory(self) -> dict[str, Any]:
        training = {str(flight.client): [flight.end, flight.start, flight.finished] for flight in self._flights}
        return {"now": self._now, "started": self._started, "training": training}

    def _fill(self, round_number: int, free: Mask) -> Iterator[_Flight]:
        """Start clients until as many train as may."""
        if len(self._flights) >= self._asynchrony.max_in_flight:
            return
        here = self._devices.here(self._now)
        while len(self._flights) < self._asynchrony.max_in_flight:
            client = self._crowd.draw_one(self._started, here=free if here is None else free & here)
            if client is None:
                return
            self._started += 1
            part = self._devices.participation(client, round_number, self._now)
            flight = _Flight(self._now + part.worked, client, round_number, int(part.finished))
            heapq.heappush(self._flights, flight)
            free[client] = False
            yield flight

    def _next_opening(self, free: Mask) -> float:
        """When somebody comes for a place that nobody fills; infinite if none is free, or nobody comes."""
        if len(self._flights) >= self._asynchrony.max_in_flight or self._devices.here(self._now) is None:
            return math.inf
        return self._devices.opening(self._now, self._crowd.present(here=free))


def _opening(devices: Devices, now: float, crowd: Crowd) -> float:
    """The first moment from now on at which somebody is there."""
    present = crowd.present()
    at = devices.opening(now, present)
    if at == math.inf and len(present):
        raise RunError(
            "no client is there any more, by clients.duration.availability",
            got=f"second {now:g} of the virtual clock",
            hint="Give its windows a period, after which they repeat",
        )
    return now if at == math.inf else at
