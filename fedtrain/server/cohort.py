"""The clients as the server sees them: whom to ask, whose update to use, and what is remembered of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtrain.experiment.privacy import ClientPrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params
from fedtrain.privacy.rng import NoiseSource
from fedtrain.server.devices import Devices, Pace
from fedtrain.server.gate import Gate
from fedtrain.server.live import Live, LiveBuffer
from fedtrain.server.schedule import Schedule, Turn, virtual_schedule
from fedtrain.server.selection import Crowd, fixed_sample
from fedtrain.strategies.adapter import RoundStrategy
from fedtrain.strategies.base import Asynchrony
from fedtrain.wire import Update

__all__ = ["Cohort"]


class Cohort:
    """Everything about clients that lasts longer than a round.

    Args:
        experiment: who takes part, when, and what the gate lets through.
        sizes: `(clients,)` training examples; 0 for those that are not to be asked.
        asynchrony: of the strategy; None for rounds.
        live: clients take their own time, and not that of `clients.duration`.
        pace: what a participation consists of, where `clients.duration` counts steps and bytes.
        held_out: positions of clients that never train, and are measured on.
    """

    def __init__(
        self,
        experiment: Experiment,
        sizes: npt.NDArray[np.int64],
        asynchrony: Asynchrony | None,
        *,
        live: bool = False,
        pace: Pace | None = None,
        held_out: Sequence[int] = (),
    ) -> None:
        self._experiment, self._asynchrony, self._live, self._pace = experiment, asynchrony, live, pace
        self._crowd = Crowd(experiment.clients, experiment.seed, sizes)
        privacy = experiment.privacy
        if isinstance(privacy, ClientPrivacy) and privacy.noise_seed is None:
            self._crowd.coins = NoiseSource()  # its epsilon counts on nobody knowing who took part
        # A measurement on a client's own examples would leave it without noise.
        most = experiment.evaluation.max_clients if experiment.data.tests_clients and not privacy else 0
        trains = experiment.data.test > 0 or experiment.data.fold is not None
        present = np.union1d(np.flatnonzero(sizes > 0) if trains else [], held_out).astype(np.int64)
        self._evaluators: Sequence[int] = present[fixed_sample(most, experiment.seed, len(present))].tolist()
        self._pending: dict[tuple[int, int], Update] = {}
        self.receipts: dict[str, str] = {}  # client -> the last that it sent of its privacy ledger

    def begin(self, strategy: RoundStrategy, params: Params, memory: Mapping[str, Any]) -> None:
        """Take up what an earlier part of the run remembered; nothing for a new one.

        Args:
            strategy: says what an update must bring.
            params: the global parameters.
            memory: what `memory` returned.
        """
        extra, also = strategy.extra(params), strategy.objection
        section, privacy = self._experiment.gate, self._experiment.privacy
        metrics = () if privacy else ("loss",)
        if privacy:
            section = section.model_copy(update={"max_examples": 1})
            if privacy.unit == "client":
                # Whether an update is used must depend on its own client alone, not on the norms of others.
                section = section.model_copy(update={"norm_factor": 0.0, "examples_factor": 0.0})
        self.gate = Gate(section, params, extra, memory.get("gate"), metrics=metrics, also=also)
        self._crowd.absent = set(memory.get("absent", ()))
        self._crowd.losses = {int(client): loss for client, loss in memory.get("losses", {}).items()}
        self._ended: int = memory.get("ended", 0)
        self.receipts = dict(memory.get("receipts", {}))
        updates = [Update(**update) for update in memory.get("pending", {}).values()]
        places = [tuple(map(int, place.split(":"))) for place in memory.get("pending", {})]
        self._pending = {(client, start): update for (client, start), update in zip(places, updates, strict=True)}
        self._schedule = self._plan(memory.get("schedule", {}))

    def _plan(self, memory: Mapping[str, Any]) -> Schedule:
        if self._live:
            if self._asynchrony:
                return LiveBuffer(self._crowd, self._asynchrony, memory)
            return Live(self._crowd, memory)
        section, devices = self._experiment.clients.duration, None
        if section is not None:
            devices = Devices(section, self._experiment.seed, self._pace)
        return virtual_schedule(self._crowd, devices, self._asynchrony, memory)

    def memory(self) -> dict[str, Any]:
        """What a resumed run needs to go on alike."""
        return {
            "gate": self.gate.memory(),
            "schedule": self._schedule.memory(),
            **({"step_seconds": self._pace.step_seconds} if self._pace and self._pace.step_seconds else {}),
            "absent": sorted(self._crowd.absent),
            "ended": self._ended,
            "receipts": dict(self.receipts),
            "losses": {str(client): loss for client, loss in self._crowd.losses.items()},
            "pending": {f"{client}:{start}": vars(update) for (client, start), update in self._pending.items()},
        }

    def turn(self, round_number: int) -> Turn:
        """Plan the next round."""
        return self._schedule.turn(round_number)

    def start(self, round_number: int) -> Sequence[int]:
        """Whom to ask next where clients start at any time."""
        return self._schedule.start(round_number)

    def under_way(self) -> Mapping[int, int]:
        """Client -> the round in which it started, where clients start at any time."""
        return self._schedule.under_way()

    def answered(self, turn: Turn, client: int, seconds: float) -> None:
        """Note that a client has answered, so many seconds after the round began."""
        self._schedule.answered(turn, client, seconds)

    def used(self, turn: Turn, arrived: Iterable[tuple[int, Update]]) -> Iterator[Update]:
        """Yield the updates that the round takes; hold those back that are still on their way by the virtual clock.

        Args:
            turn: the round's plan.
            arrived: (position of the client, its update) of those that were asked in this round.
        """
        if self._asynchrony and not self._live:
            self._pending |= {(client, update.round_number): update for client, update in arrived}
            arrived = ((place[0], self._pending.pop(place)) for place in turn.use if place in self._pending)
        for client, update in arrived:
            if self._crowd.section.sampling == "power-of-choice":
                self._crowd.losses[client] = update.metrics["loss"]
            yield update

    def close(self, turn: Turn, silent: Iterable[int]) -> None:
        """End a round: who has not answered is as likely to be chosen by loss as the middle of the others."""
        silent = list(silent)
        self._schedule.missed(turn, silent)
        if self._crowd.section.sampling == "power-of-choice":
            known = float(np.median([*self._crowd.losses.values()] or [0.0]))
            for client in (*turn.late, *silent):
                self._crowd.losses.setdefault(client, known)

    def evaluators(self) -> list[int]:
        """Who measures the model, always the same but for those set aside since."""
        return [client for client in self._evaluators if client not in self._crowd.absent]

    def too_few_are_left(self) -> str | None:
        """Say so if clients have ended, and the others are fewer than the quorum of a round."""
        left, wanted = self._crowd.left(), self._crowd.wanted()
        if not self._ended or left >= max(1, wanted * self._experiment.clients.quorum - 1e-9):
            return None
        return f"{self._ended} clients have ended, and {left} are left for a round of {wanted}"

    def end(self, client: int) -> None:
        """Ask a client no more, by its own wish."""
        self._crowd.absent.add(client)
        self._ended += 1

    def set_aside(self, client: int) -> None:
        """Ask a client no more in this run."""
        self._crowd.absent.add(client)
