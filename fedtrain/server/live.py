"""Rounds over clients that really take their time: who answers first is used, and the clock is that of the wall.

What is decided depends on when answers come, so two runs of one experiment differ where it matters who is first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedtrain.server.schedule import Schedule, Turn
from fedtrain.server.selection import Crowd
from fedtrain.strategies.base import Asynchrony

__all__ = ["Live", "LiveBuffer"]

_FILL = 0.9  # of the deadline: a client that is asked for partial work may take a little longer than the last time
_LATE = 2.0  # times the deadline, that a client is taken to need when it has missed it


class Live(Schedule):
    """A round ends with the first `per_round` of its clients to answer, or at the deadline.

    Where slow clients send partial work, they are asked for as much as fits by the time that they took before.

    Args:
        crowd: who can be asked.
        memory: of an earlier part of the run.
    """

    def __init__(self, crowd: Crowd, memory: Mapping[str, Any]) -> None:
        self._crowd = crowd
        # client -> seconds that it would take for all of its work
        self._seconds: dict[int, float] = {int(c): seconds for c, seconds in memory.get("seconds", {}).items()}
        self._answered: set[int] = set()  # in this round

    def turn(self, round_number: int) -> Turn:
        self._answered.clear()
        section, drawn = self._crowd.section, self._crowd.draw(round_number).tolist()
        wanted = len(drawn) if section.sampling == "poisson" else min(len(drawn), self._crowd.wanted())
        work = {}
        if section.late == "partial" and section.deadline is not None:
            shares = {c: _FILL * section.deadline / self._seconds[c] for c in drawn if c in self._seconds}
            work = {client: share for client, share in shares.items() if share < 1}
        return Turn(
            drawn,
            [(client, round_number) for client in drawn],
            wanted,
            work,
            enough=wanted if wanted < len(drawn) else None,
        )

    def answered(self, turn: Turn, client: int, seconds: float) -> None:
        self._answered.add(client)
        self._seconds[client] = seconds / turn.work.get(client, 1.0)

    def missed(self, turn: Turn, clients: Iterable[int]) -> None:
        deadline = self._crowd.section.deadline
        if deadline is not None:
            for client in set(clients) - self._answered:
                self._seconds[client] = _LATE * deadline / turn.work.get(client, 1.0)

    def memory(self) -> dict[str, Any]:
        return {"seconds": {str(client): seconds for client, seconds in self._seconds.items()}}


class LiveBuffer(Schedule):
    """Clients train on whatever model is the newest when they start; a full buffer of updates makes a round.

    Args:
        crowd: who can be asked.
        asynchrony: size of the buffer, and how many train at any time.
        memory: of an earlier part of the run; what was on its way then is asked anew.

    References:
        Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, algorithm 1.
    """

    def __init__(self, crowd: Crowd, asynchrony: Asynchrony, memory: Mapping[str, Any]) -> None:
        self._crowd, self._asynchrony = crowd, asynchrony
        self._drawn: int = memory.get("drawn", 0)
        self._again: list[int] = list(memory.get("training", ()))
        self._asked: set[int] = set()  # in this round
        self._training: dict[int, int] = {}  # client -> the round in which it started

    def turn(self, round_number: int) -> Turn:
        self._asked.clear()
        return Turn((), (), self._asynchrony.buffer_size, enough=self._asynchrony.buffer_size, flowing=True)

    def start(self, round_number: int) -> Sequence[int]:
        started = []
        while len(self._training) < self._asynchrony.max_in_flight:
            client = self._next()
            if client is None:
                break
            self._asked.add(client)
            self._training[client] = round_number
            started.append(client)
        return started

    def under_way(self) -> Mapping[int, int]:
        return self._training

    def answered(self, turn: Turn, client: int, seconds: float) -> None:
        self._training.pop(client, None)

    def memory(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "training": sorted({*self._training, *self._again})}

    def _next(self) -> int | None:
        """Who starts next; one client trains on one model at most once."""
        busy = {*self._training, *self._asked}
        while self._again:
            again = self._again.pop(0)
            if again not in busy | self._crowd.absent:
                return again
        client = self._crowd.draw_one(self._drawn, busy)
        self._drawn += client is not None
        return client
