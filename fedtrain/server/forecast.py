"""What a run's clock will show, played by the run's own schedule without any training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedtrain.errors import InputError
from fedtrain.experiment.sections import Experiment
from fedtrain.measures import gini
from fedtrain.server.devices import Devices, Pace
from fedtrain.server.schedule import virtual_schedule
from fedtrain.server.selection import Crowd
from fedtrain.server.traces import Floats, Positions
from fedtrain.strategies.base import Asynchrony

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """The virtual clock of a whole run.

    Attributes:
        seconds: `(rounds,)` length of each round.
        client_seconds: `(rounds,)` that clients work in each round.
        wasted_seconds: `(rounds,)` the part that no update comes from.
        updates: `(clients,)` updates used, of those that may be asked.
        slowest: positions among these of the slowest tenth; None where no client is slower than others for good.
    """

    seconds: Floats
    client_seconds: Floats
    wasted_seconds: Floats
    updates: Positions
    slowest: Positions | None

    @property
    def total_seconds(self) -> float:
        """Length of the run."""
        return self.seconds_until(len(self.seconds))

    @property
    def wasted_share(self) -> float:
        """Share of the clients' seconds that no update comes from; 0 where nobody works."""
        worked = float(self.client_seconds.sum())
        return float(self.wasted_seconds.sum()) / worked if worked else 0.0

    @property
    def gini(self) -> float:
        """How unevenly updates come from the clients: 0 is equally, towards 1 is all from one."""
        return gini(self.updates)

    @property
    def never_used(self) -> float:
        """Share of the clients of which no update is used."""
        return float((self.updates == 0).mean())

    @property
    def slowest_tenth(self) -> float | None:
        """Updates per client of the slowest tenth, over those of all: 1 is a fair share; None if nobody is slow."""
        mean = float(self.updates.mean())
        return float(self.updates[self.slowest].mean()) / mean if self.slowest is not None and mean else None

    def round_quantile(self, share: float) -> float:
        """Seconds that a round takes at most in this share of the rounds: 0.5 for the median."""
        return float(np.quantile(self.seconds, share))

    def seconds_until(self, round_number: int) -> float:
        """The virtual clock at the end of a round, from 1 on."""
        return math.fsum(self.seconds[:round_number])


def forecast(experiment: Experiment, sizes: Positions, pace: Pace, asynchrony: Asynchrony | None) -> Forecast:
    """Play the schedule of a whole run.

    It is the run's own as far as that depends on the seed alone, and not on losses (power-of-choice), on secret coins
    (privacy of clients), or on clients that the gate sets aside, or that end.

    Args:
        experiment: what would be run, on the clock of `clients.duration`.
        sizes: `(clients,)` training examples; 0 for those that are not to be asked.
        pace: what a participation consists of.
        asynchrony: of the strategy; None for rounds.

    Raises:
        InputError: the experiment has no clock.
        RunError: no client will be there any more.
    """
    section = experiment.clients.duration
    if section is None:
        raise InputError(
            "without clients.duration there is no time to forecast",
            hint='Say how long clients take, such as clients.duration={kind="devices"}',
        )
    crowd = Crowd(experiment.clients, experiment.seed, sizes)
    devices = Devices(section, experiment.seed, pace)
    schedule = virtual_schedule(crowd, devices, asynchrony, {})
    numbers = np.zeros((experiment.rounds, 3))
    updates = np.zeros(len(sizes), dtype=np.int64)
    for number in range(1, experiment.rounds + 1):
        turn = schedule.turn(number)
        numbers[number - 1] = turn.seconds, turn.client_seconds, turn.wasted_seconds
        for client, _ in turn.use:
            updates[client] += 1
    present = crowd.present()
    own, slowest = devices.own_seconds(present), None
    if own is not None:
        slowest = np.argsort(-own, kind="stable")[: math.ceil(len(present) / 10)]
    return Forecast(numbers[:, 0], numbers[:, 1], numbers[:, 2], updates[present], slowest)
