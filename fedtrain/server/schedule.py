"""When clients train and whose update a round takes: in step with the slowest, by a deadline, or never waiting.

Durations here lie on a virtual clock, so nobody really waits; what is decided depends on (seed, round, client) alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedtrain.experiment.clients import ConstantDuration, DurationSection, LognormalDuration
from fedtrain.seeds import generator
from fedtrain.server.selection import Crowd
from fedtrain.strategies.base import Asynchrony

__all__ = ["Buffered", "InStep", "Schedule", "Turn", "duration"]


@dataclass(frozen=True)
class Turn:
    """What happens in one round. Clients are named by their position.

    Attributes:
        ask: who starts to train now, on the current model.
        use: (client, round in which it started) of the updates that the round takes, in the order of the sum.
        wanted: updates that the round is meant to have.
        work: share of the local steps, for those that have not time for all.
        late: who was asked, but is not waited for.
        seconds: the round's length on the virtual clock; 0 without one.
        enough: updates that pass the gate, after which nobody else is waited for; None waits for all.
        flowing: clients start and answer at any time, also from round to round.
    """

    ask: Sequence[int]
    use: Sequence[tuple[int, int]]
    wanted: int
    work: Mapping[int, float] = field(default_factory=dict)
    late: Sequence[int] = ()
    seconds: float = 0.0
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


def duration(section: DurationSection, seed: int, client: int, start: int) -> float:
    """Seconds that a client takes for the whole of its local work.

    Args:
        section: how they are drawn.
        seed: the experiment's seed.
        client: its position.
        start: the round in which it starts.
    """
    if isinstance(section, ConstantDuration):
        return section.seconds
    if isinstance(section, LognormalDuration):
        names = (client,) if section.drawn == "client" else (client, start)
        return float(section.seconds * math.exp(generator(seed, "duration", *names).normal(0.0, section.sigma)))
    rng = generator(seed, "duration", client, start)
    part = 1.0 - rng.random() if rng.random() < section.fraction else 1.0  # in (0, 1]
    return section.seconds / part


class InStep(Schedule):
    """A round ends with the last of its clients, with the first `per_round` of them, or at the deadline.

    Args:
        crowd: who can be asked.
    """

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd

    def turn(self, round_number: int) -> Turn:
        section, drawn = self._crowd.section, self._crowd.draw(round_number).tolist()
        wanted = len(drawn) if section.sampling == "poisson" else self._crowd.wanted()
        if section.duration is None:
            return Turn(drawn, [(client, round_number) for client in drawn], wanted)
        seconds = {c: duration(section.duration, self._crowd.seed, c, round_number) for c in drawn}
        deadline = math.inf if section.deadline is None else section.deadline
        limit = math.inf if section.late == "partial" else deadline
        first = sorted(drawn, key=lambda c: (seconds[c], c))[:wanted]
        used = sorted(client for client in first if seconds[client] <= limit)
        work = {c: deadline / seconds[c] for c in used if seconds[c] > deadline}
        last = max((min(seconds[c], deadline) for c in used), default=0.0)
        length = last if len(used) == len(first) else deadline  # the server cannot know that nobody else will come
        late = sorted(set(drawn) - set(used))
        return Turn(used, [(client, round_number) for client in used], wanted, work, late, length)

    def memory(self) -> dict[str, Any]:
        return {}


class Buffered(Schedule):
    """Clients train on whatever model is the newest when they start; a full buffer of updates makes a round.

    Args:
        crowd: who can be asked.
        asynchrony: size of the buffer, and how many train at any time.
        memory: of an earlier part of the run.

    References:
        Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, algorithm 1.
    """

    def __init__(self, crowd: Crowd, asynchrony: Asynchrony, memory: Mapping[str, Any]) -> None:
        self._crowd, self._asynchrony = crowd, asynchrony
        self._now: float = memory.get("now", 0.0)
        self._started: int = memory.get("started", 0)
        # client -> (when it will have finished, the round in which it started)
        self._training = {int(client): (end, start) for client, (end, start) in memory.get("training", {}).items()}

    def turn(self, round_number: int) -> Turn:
        began, ask, use = self._now, list[int](), list[tuple[int, int]]()
        while len(use) < self._asynchrony.buffer_size:
            self._fill(round_number, ask)
            if not self._training:
                break
            client = min(self._training, key=lambda c: (self._training[c][0], c))
            self._now, start = self._training.pop(client)
            use.append((client, start))
        return Turn(sorted(ask), use, self._asynchrony.buffer_size, seconds=self._now - began)

    def memory(self) -> dict[str, Any]:
        training = {str(client): [end, start] for client, (end, start) in self._training.items()}
        return {"now": self._now, "started": self._started, "training": training}

    def _fill(self, round_number: int, ask: list[int]) -> None:
        """Start clients until as many train as may; one client trains on one model at most once."""
        section = self._crowd.section.duration
        assert section is not None, "the experiment was checked for it"
        while len(self._training) < self._asynchrony.max_in_flight:
            client = self._crowd.draw_one(self._started, {*self._training, *ask})
            if client is None:
                return
            self._started += 1
            end = self._now + duration(section, self._crowd.seed, client, round_number)
            self._training[client] = (end, round_number)
            ask.append(client)
