"""What a whole run costs, before its first step: noise for a budget, epsilon by round, and whether a signal is left.

How many examples each client has is taken as public: its sample rate follows from it, and so does its noise.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from fedtrain.errors import InputError, PrivacyError
from fedtrain.experiment.privacy import ClientPrivacy, SamplePrivacy
from fedtrain.experiment.training import TrainingSection
from fedtrain.privacy.accounting import Accountant, Epsilon, Guarantee, Spend, epsilon, noise_multiplier_for

__all__ = ["ClientPlan", "Group", "SamplePlan", "Signal", "client_plan", "sample_plan"]

_MOST_GROUPS = 16  # to calibrate one by PRV takes 0.3 to 8 s
_EFFORT = 3000  # PRV bounds of a whole run times the root of their steps, by which their time grows: 5 to 10 s
_WASTE = 0.015  # share of epsilon that a guessed noise multiplier may leave unused

# Signal to noise over the whole run, as measured for `Signal`. An update gathers many steps along few directions, so
# that of a client outlives more noise.
_HOPELESS = {"sample": 0.1, "client": 0.03}
_ENOUGH = {"sample": 3.0, "client": 1.0}
_LEARNED = {
    "sample": "13 to 21 % accuracy at a ratio of 0.1, 47 to 62 % at 1 and 67 to 81 % at 3",
    "client": "12 to 38 % accuracy at a ratio of 0.03, 27 to 64 % at 0.1 and 79 to 80 % at 1",
}
_ANY_EPSILON = 100.0  # beyond, it is no protection


@dataclass(frozen=True)
class Group:
    """Clients whose noise is calibrated together, at the worst that any of them can be.

    A smaller client has the higher sample rate, a larger one takes more steps, and epsilon grows with both: what holds
    for the rate of the smallest with the steps of the largest holds for all between. Up to the batch size all clients
    are alike: each example is in each step.
    """

    low: int  # examples of the smallest client, at least the batch size
    high: int  # examples of the largest
    charge: Spend  # a round: the rate of the smallest, the steps of the largest


@dataclass(frozen=True)
class Signal:
    """How the largest signal that clipping lets through compares to the noise: L2 norms, of a round's aggregate.

    It is the largest if all gradients, or updates, are clipped and point the same way. The ratio is a rule of thumb,
    held against MNIST: models of 7,850 to 199,210 parameters at the best of some learning rates, trained for 300 steps
    on batches of 128 (86 to 88 % accuracy at a ratio of 30), or for 20 rounds of 50 out of 1,000 clients (80 to 83 %).
    """

    unit: Literal["sample", "client"]
    per_round: float
    rounds: int
    enough_clients: int  # a round, all else equal, for a ratio at which much is learned
    enough_epsilon: float  # with the clients that there are

    @property
    def whole_run(self) -> float:
        """The ratio over all rounds: signals add up, and noise by the root of their number."""
        return self.per_round * math.sqrt(self.rounds)

    def rule_of_thumb(self) -> str:
        """Tell what was learned at which ratio."""
        return f"over a run, MNIST came to {_LEARNED[self.unit]}"

    def warning(self) -> str | None:
        """Say that a run is hopeless, and what would not be; None if it is not."""
        if self.whole_run >= _HOPELESS[self.unit]:
            return None
        enough = f"Enough would be about {self.enough_clients:,} clients a round, all else equal"
        if self.enough_epsilon < _ANY_EPSILON:
            enough += f", or epsilon {self.enough_epsilon:.2g}"
        else:
            enough += f"; no epsilon below {_ANY_EPSILON:g} would be"
        return (
            f"Hopeless: over the run the noise is {1 / self.whole_run:,.0f} times as large as all that clipping lets "
            f"through, even if all clients agree. {enough}"
        )


@dataclass(frozen=True)
class SamplePlan:
    """What rounds cost clients that train by DP-SGD; it can be pickled.

    Attributes:
        section: the experiment's [privacy].
        training: the experiment's [training].
        participations: rounds of one client for which the noise is calibrated.
        groups: by size, ascending.
    """

    section: SamplePrivacy
    training: TrainingSection
    participations: int
    groups: tuple[Group, ...]

    def charge(self, size: int) -> Spend:
        """Name the steps of one round of a client.

        Args:
            size: the client's training examples.

        Raises:
            PrivacyError: the plan covers no client of this size.
        """
        noise_multiplier = self._group(size).charge.noise_multiplier
        return Spend(noise_multiplier, min(1.0, self.training.batch_size / size), self.training.steps_for(size))

    def epsilon(self, taken: Mapping[int, int]) -> float:
        """Bound every client's epsilon: their data are disjoint, so it is the largest and not the sum.

        Args:
            taken: size of a client -> the most rounds that a client of this size has taken so far.
        """
        times: dict[Spend, int] = {}
        for size, count in taken.items():
            charge = self._group(size).charge
            times[charge] = max(count, times.get(charge, 0))
        return self._curve().largest(times).value

    def whole_run(self, accountant: Accountant | None = None) -> Epsilon:
        """Bound epsilon for who takes part as often as planned.

        Args:
            accountant: another than the section's, as a second opinion.
        """
        return self._curve().whole_run(accountant)

    def guarantee(self, epsilon: float, rounds: int) -> Guarantee:
        """State an epsilon of this plan with all that belongs to it."""
        return self._curve().guarantee(epsilon, rounds)

    def signal(self, size: int, clients: int, rounds: int, parameters: int) -> Signal:
        """Compare signal and noise in the average of a round's clients.

        Args:
            size: training examples of a typical client.
            clients: that train in a round.
            rounds: of the run.
            parameters: numbers that are trained.
        """
        charge = self.charge(size)
        batch = charge.sample_rate * size
        per_round = batch * math.sqrt(charge.steps * clients / parameters) / charge.noise_multiplier
        missing = _ENOUGH["sample"] / (per_round * math.sqrt(rounds))
        # The mean of m clients, each with noise of its own, has it divided by the root of m.
        return Signal(
            "sample", per_round, rounds, math.ceil(clients * missing**2), self._curve().with_less_noise(charge, missing)
        )

    def _curve(self) -> _Curve:
        return _Curve(self.section, self.participations, [group.charge for group in self.groups])

    def _group(self, size: int) -> Group:
        alike = max(size, self.training.batch_size)
        place = bisect_left(self.groups, alike, key=lambda group: group.high)
        if place == len(self.groups) or alike < self.groups[place].low:
            raise PrivacyError(
                "the privacy plan covers no client of this size",
                got=f"{size} examples",
                hint="Plan anew with the sizes that clients have: the noise depends on them",
            )
        return self.groups[place]


@dataclass(frozen=True)
class ClientPlan:
    """What rounds cost where the server adds the noise.

    Attributes:
        section: the experiment's [privacy].
        num_clients: of whom each takes part by a coin of its own.
        rounds: for which the noise is calibrated.
        charge: one round: a single step.
    """

    section: ClientPrivacy
    num_clients: int
    rounds: int
    charge: Spend

    def epsilon(self, rounds: int) -> float:
        """Bound epsilon after so many rounds; it is the same for all clients, asked or not."""
        return self._curve().largest({self.charge: rounds}).value

    def whole_run(self, accountant: Accountant | None = None) -> Epsilon:
        """Bound epsilon after all rounds.

        Args:
            accountant: another than the section's, as a second opinion.
        """
        return self._curve().whole_run(accountant)

    def guarantee(self, epsilon: float, rounds: int) -> Guarantee:
        """State an epsilon of this plan with all that belongs to it."""
        return self._curve().guarantee(epsilon, rounds)

    def signal(self, parameters: int) -> Signal:
        """Compare signal and noise in a round's sum of updates.

        Args:
            parameters: numbers that are trained.
        """
        updates = self.charge.sample_rate * self.num_clients
        per_round = updates / (self.charge.noise_multiplier * math.sqrt(parameters))
        missing = _ENOUGH["client"] / (per_round * math.sqrt(self.rounds))
        enough_epsilon = self._curve().with_less_noise(self.charge, missing)
        return Signal("client", per_round, self.rounds, math.ceil(updates * missing), enough_epsilon)

    def _curve(self) -> _Curve:
        return _Curve(self.section, self.rounds, [self.charge])


def sample_plan(
    section: SamplePrivacy, training: TrainingSection, sizes: Iterable[int], participations: int
) -> SamplePlan:
    """Calibrate the noise of each client once, for all steps that it can take in the whole run.

    Args:
        section: the experiment's [privacy].
        training: the experiment's [training].
        sizes: training examples of the clients; those without any take no part.
        participations: rounds of one client, at least 1.
    """
    assert participations >= 1, "every run has a round"
    loads = sorted({max(int(size), training.batch_size) for size in sizes if size > 0})
    if not loads:
        raise InputError("no client has training examples")
    ranges = _ranges(loads)
    worst = [Spend(0.0, training.batch_size / low, training.steps_for(high)) for low, high in ranges]
    noise = _noise(section, (replace(spend, steps=spend.steps * participations) for spend in worst))
    charges = (replace(spend, noise_multiplier=noise_multiplier) for spend, noise_multiplier in zip(worst, noise))
    groups = tuple(Group(low, high, charge) for (low, high), charge in zip(ranges, charges))
    return SamplePlan(section, training, participations, groups)


def client_plan(section: ClientPrivacy, num_clients: int, per_round: int, rounds: int) -> ClientPlan:
    """Calibrate the noise that the server adds, once, for all rounds.

    Args:
        section: the experiment's [privacy].
        num_clients: that may be asked.
        per_round: of these the expected number in a round, each by a coin of its own.
        rounds: of the whole run.
    """
    sample_rate = min(1.0, per_round / num_clients)
    (noise_multiplier,) = _noise(section, [Spend(0.0, sample_rate, rounds)])
    return ClientPlan(section, num_clients, rounds, Spend(noise_multiplier, sample_rate, 1))


@dataclass(frozen=True)
class _Curve:
    """Epsilon over rounds, from above: RDP's bound, or PRV's at the next point of a grid if that is lower.

    A later point bounds all before it, and PRV costs too much for each round of a long run. The grid is geometric and
    ends at the last round, where the bound is therefore PRV's own; in a short run each round is a point.
    """

    section: SamplePrivacy | ClientPrivacy
    rounds: int
    charges: Sequence[Spend]  # of one round; each distinct client's

    def largest(self, taken: Mapping[Spend, int]) -> Epsilon:
        """Bound the largest epsilon of some clients, by what a round costs each: the rounds it has taken."""
        accountant = self.section.accountant
        fast = [
            (epsilon([_repeated(charge, count)], self.section.delta, "rdp"), charge) for charge, count in taken.items()
        ]
        worst = Epsilon(0.0, accountant)
        for bound, charge in sorted(fast, key=lambda one: one[0], reverse=True):
            if bound <= worst:  # so are all that follow, and PRV could only lower them
                break
            worst = max(worst, bound if accountant == "rdp" else min(bound, self._slow(charge, taken[charge])))
        return worst

    def whole_run(self, accountant: Accountant | None) -> Epsilon:
        """Bound epsilon after the last round."""
        if accountant is None:
            return self.largest(dict.fromkeys(self.charges, self.rounds))
        return max(epsilon([_repeated(charge, self.rounds)], self.section.delta, accountant) for charge in self.charges)

    def guarantee(self, epsilon: float, rounds: int) -> Guarantee:
        """State an epsilon with all that belongs to it; who proved the whole run's stands for all rounds."""
        return Guarantee(
            epsilon=epsilon,
            delta=self.section.delta,
            unit=self.section.unit,
            accountant=self.whole_run(None).accountant,
            sampling="Poisson",
            rounds=rounds,
            seeded=self.section.noise_seed is not None,
        )

    def with_less_noise(self, charge: Spend, factor: float) -> float:
        """Bound the whole run's epsilon if its noise were divided by a factor."""
        noise_multiplier = charge.noise_multiplier / factor
        return epsilon(
            [_repeated(replace(charge, noise_multiplier=noise_multiplier), self.rounds)], self.section.delta, "rdp"
        ).value

    def _slow(self, charge: Spend, count: int) -> Epsilon:
        most_steps = self.rounds * max(charge.steps for charge in self.charges)
        points = max(2, int(_EFFORT / math.sqrt(most_steps) / len(self.charges)))
        if points < self.rounds:
            grid = (math.ceil(self.rounds ** (k / points)) for k in range(1, points + 1))
            count = next((point for point in grid if point >= count), count)
        return epsilon([_repeated(charge, count)], self.section.delta)


def _repeated(charge: Spend, rounds: int) -> Spend:
    return replace(charge, steps=charge.steps * rounds)


def _ranges(loads: list[int]) -> list[tuple[int, int]]:
    """Put distinct sizes, ascending, into ranges of equal ratio; each into its own if they are few."""
    if len(loads) <= _MOST_GROUPS:
        return [(size, size) for size in loads]
    width = math.log(loads[-1] / loads[0]) / _MOST_GROUPS
    groups = groupby(loads, key=lambda size: min(int(math.log(size / loads[0]) / width), _MOST_GROUPS - 1))
    return [(group[0], group[-1]) for group in (list(sizes) for _, sizes in groups)]


def _noise(section: SamplePrivacy | ClientPrivacy, wholes: Iterable[Spend]) -> Iterator[float]:
    """Find the noise multiplier for each of some whole runs, whose own are not looked at.

    PRV wants nearly the same share of RDP's noise for runs that resemble each other, and to check a guess is much
    faster than to search.
    """
    share = 1.0
    for whole in wholes:
        if section.epsilon is None:
            assert section.noise_multiplier is not None, "the section has one or the other"
            yield section.noise_multiplier
            continue
        wanted = (section.epsilon, section.delta, whole.sample_rate, whole.steps)
        fast = noise_multiplier_for(*wanted, "rdp")
        if section.accountant == "rdp":
            yield fast
            continue
        noise_multiplier = fast * share
        spent = epsilon([replace(whole, noise_multiplier=noise_multiplier)], section.delta).value
        if not (1 - _WASTE) * section.epsilon <= spent <= section.epsilon:
            noise_multiplier = noise_multiplier_for(*wanted)
            share = noise_multiplier * (1 + _WASTE / 5) / fast
        yield noise_multiplier
