"""How long one participation takes on a client's device, and whether the client is there to the end.

Nobody waits here: seconds lie on a virtual clock, and all of them follow from (seed, round, client) and the clock.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtrain.experiment.clients import (
    ConstantDuration,
    DeviceDuration,
    DeviceFileDuration,
    DevicesDuration,
    DurationSection,
    LognormalDuration,
    PeriodicAvailability,
    StragglersDuration,
)
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import DittoStrategy
from fedtrain.seeds import generator
from fedtrain.server.traces import Floats, Positions, Traces, periodic_windows

__all__ = ["Devices", "Pace", "Participation", "Traffic", "needs_a_measured_step", "pace_of"]

_FORWARD_AND_BACKWARD = 3  # times an inference: FedScale's augmentation_factor


class Traffic(NamedTuple):
    """Bytes of one client's messages of a round."""

    down: int  # from the server to the client
    up: int


class Pace(NamedTuple):
    """What a participation of each client consists of; `pace_of` makes one."""

    steps: Positions  # (clients,) local steps of a round
    batch: Positions  # (clients,) examples of a step
    traffic: Traffic
    step_seconds: float | None = None  # of one local step, as measured; None where nothing was measured
    traces: Traces = Traces()


class Participation(NamedTuple):
    """One client's part in a round, as it would go. Seconds count from its start.

    Attributes:
        seconds: until its update has arrived, if it stays.
        vanishes: until the client goes away; infinite if it does not.
        moving: of `seconds`, those that messages are on their way.
        step: of one local step, the least work of use; 0 where work is not made of steps.
    """

    seconds: float
    vanishes: float = math.inf
    moving: float = 0.0
    step: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether the client is there until all is done."""
        return self.seconds <= self.vanishes

    @property
    def worked(self) -> float:
        """Seconds that the client works, if nobody stops it."""
        return min(self.seconds, self.vanishes)

    def share_by(self, deadline: float) -> float:
        """The share of the local work that can be done and sent by a deadline; 0 if not even one step can."""
        if self.seconds <= deadline:
            return 1.0
        time = deadline - self.moving
        return time / (self.seconds - self.moving) if time > 0 and time >= self.step else 0.0


def pace_of(
    experiment: Experiment,
    sizes: Positions,
    traffic: Traffic,
    step_seconds: float | None = None,
    traces: Traces | None = None,
) -> Pace:
    """Count what a participation of each client consists of.

    Args:
        experiment: how clients train.
        sizes: `(clients,)` training examples; clients without any do nothing.
        traffic: bytes of one client's messages.
        step_seconds: seconds of one local step, where it was measured.
        traces: what the experiment's files say of the devices; None where it names none.
    """
    training = experiment.training
    times = 2 if isinstance(experiment.strategy, DittoStrategy) else 1  # it trains a personal model beside
    steps = [times * training.steps_for(size) if size else 0 for size in sizes.tolist()]
    batch = np.minimum(sizes, training.batch_size)
    return Pace(np.array(steps, dtype=np.int64), batch, traffic, step_seconds, traces or Traces())


def needs_a_measured_step(section: DurationSection | None) -> bool:
    """Whether one local step has to be timed before the clock can run."""
    return isinstance(section, DevicesDuration | DeviceFileDuration) and section.step_seconds == "measured"


class Devices:
    """The clients' devices, of whatever kind `clients.duration` says.

    Args:
        section: how long clients take.
        seed: the experiment's seed.
        pace: what a participation consists of; the kinds that are not made of steps and bytes need none.
    """

    def __init__(self, section: DurationSection, seed: int, pace: Pace | None = None) -> None:
        self._section, self._seed = section, seed
        self._own: dict[int, float] = {}  # client -> seconds, for durations that are drawn once
        self._dropout, self._windows = 0.0, None
        self._drawn: tuple[int, Floats] | None = None  # the round, and its dropouts
        if isinstance(section, DeviceDuration):
            assert pace is not None, "a run on devices knows its steps and bytes"
            self._count = len(pace.steps)
            self._dropout, self._windows = section.dropout, pace.traces.windows
            if isinstance(section.availability, PeriodicAvailability):
                self._windows = periodic_windows(section.availability, seed, self._count)
            step, down, up = self._drawn_devices(section, pace)
            moving = 2 * section.latency + pace.traffic.down / down + pace.traffic.up / up
            self._moving, self._step = moving.tolist(), step.tolist()
            self._seconds = (moving + pace.steps * step).tolist()

    def participation(self, client: int, start_round: int, now: float = 0.0) -> Participation:
        """Tell how a participation goes.

        Args:
            client: its position.
            start_round: the round in which it starts; a client starts once in a round.
            now: seconds on the virtual clock as it starts.
        """
        if not isinstance(self._section, DeviceDuration):
            return Participation(self._simple(client, start_round))
        seconds, vanishes = self._seconds[client], math.inf
        if self._dropout:
            lot, part = self._lots(start_round)[client]
            vanishes = float(part) * seconds if lot < self._dropout else math.inf
        if self._windows:
            vanishes = min(vanishes, self._windows.left(client, now))
        return Participation(seconds, vanishes, self._moving[client], self._step[client])

    def here(self, now: float) -> npt.NDArray[np.bool_] | None:
        """Tell who is there, `(clients,)`; None where everybody always is."""
        return self._windows.here(now) if self._windows else None

    def opening(self, now: float, among: Positions) -> float:
        """The first moment from now on at which one of these clients is there; infinite if there is none."""
        if self._windows:
            return self._windows.opening(now, among)
        return now if len(among) else math.inf

    def own_seconds(self, clients: Positions) -> Floats | None:
        """Seconds that each of these clients always takes; None where they are drawn anew, or equal for all."""
        section = self._section
        if isinstance(section, DeviceDuration):
            return np.array(self._seconds)[clients]
        if isinstance(section, LognormalDuration) and section.drawn == "client":
            return np.array([self._simple(client, 0) for client in clients.tolist()])
        return None

    def _drawn_devices(
        self, section: DevicesDuration | DeviceFileDuration, pace: Pace
    ) -> tuple[Floats, Floats, Floats]:
        """Of each client: seconds of a step, and bytes per second down and up."""
        given = section.step_seconds
        step = pace.step_seconds if given == "measured" else given
        if isinstance(section, DeviceFileDuration):
            found = pace.traces.capacities
            assert found is not None, "the file of devices was read"
            if step == "file":
                return _FORWARD_AND_BACKWARD * pace.batch * found.computation / 1000, found.down, found.up
            slowness, down, up = found.computation / found.median, found.down, found.up
        else:
            spread = generator(self._seed, "devices").standard_normal((self._count, 2))
            slowness = np.exp(section.slowness_sigma * spread[:, 0])
            link = np.exp(section.bandwidth_sigma * spread[:, 1])
            down, up = section.bandwidth_down * link, section.bandwidth_up * link
        assert isinstance(step, float), "a step was measured"
        return step * slowness, down, up

    def _simple(self, client: int, start: int) -> float:
        section = self._section
        if isinstance(section, ConstantDuration):
            return section.seconds
        if isinstance(section, LognormalDuration):
            if section.drawn == "client":
                if client not in self._own:
                    self._own[client] = self._lognormal(section, client)
                return self._own[client]
            return self._lognormal(section, client, start)
        assert isinstance(section, StragglersDuration), "the devices are dealt with above"
        rng = generator(self._seed, "duration", client, start)
        part = 1.0 - rng.random() if rng.random() < section.fraction else 1.0  # in (0, 1]
        return section.seconds / part

    def _lognormal(self, section: LognormalDuration, *names: int) -> float:
        spread = generator(self._seed, "duration", *names).normal(0.0, section.sigma)
        return float(section.seconds * math.exp(spread))

    def _lots(self, start_round: int) -> Floats:
        """`(clients, 2)` of a round: who vanishes, and after which part of its time."""
        if self._drawn is None or self._drawn[0] != start_round:
            self._drawn = start_round, generator(self._seed, "dropout", start_round).random((self._count, 2))
        return self._drawn[1]
