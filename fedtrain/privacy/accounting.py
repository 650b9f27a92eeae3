"""What private training costs: from noise, sampling and steps to epsilon, and from a wanted epsilon back to the noise.

Relation: two data sets are neighbours if one has one unit (an example, or a client) more than the other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from fedtrain.errors import InputError, MissingExtraError, RunError

__all__ = [
    "Accountant",
    "Epsilon",
    "Guarantee",
    "Spend",
    "bound_within",
    "delta_warning",
    "epsilon",
    "noise_multiplier_for",
]

Accountant = Literal["prv", "rdp", "pld"]

_PRECISION = 1e-3  # how far, relatively, a calibrated noise multiplier may lie above the least one
_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e6
_SMALL_EPSILON = 3.0  # beyond, a factor on the odds tells readers little
_RDP_ORDERS = (*range(2, 64), 80, 96, 128, 192, 256, 384, 512, 768, 1024)
_PRV_ERROR = 0.01  # in epsilon; the bound that is reported lies above the estimate by as much
_PRV_POINTS = 1 << 23  # of all grids of one composition
_PRV_STEPS = 2_000_000  # beyond, the integration errors of single steps may add up to more than _PRV_ERROR
_PRV_DELTA = 1e-10  # below, float64 rounding is no longer small beside the error in delta


@dataclass(frozen=True)
class Spend:
    """Steps of one subsampled Gaussian mechanism: what a ledger adds up.

    Args:
        noise_multiplier: the noise's standard deviation over the clipping norm; 0 means that nothing is protected.
        sample_rate: the chance of each unit to be in a step, by a coin of its own (Poisson). Where batches are shuffled
            or fixed there is no amplification to count on: give 1, and as steps how often one unit can be used, such as
            the number of epochs. A unit is then left out by blanking it, since its absence would move the others.
        steps: how many; an empty batch counts.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise RunError("no valid noise multiplier", got=self.noise_multiplier, expected="a finite number from 0")
        if not 0 <= self.sample_rate <= 1:
            raise RunError("the sample rate is no probability", got=self.sample_rate, expected="a number from 0 to 1")
        if not self.steps >= 0 or self.steps % 1:
            raise RunError("no valid number of steps", got=self.steps, expected="a whole number from 0")


class Epsilon(NamedTuple):
    """An upper bound of epsilon, and who proved it: not the accountant that was asked where that one could not."""

    value: float
    accountant: Accountant


def epsilon(history: Iterable[Spend], delta: float, accountant: Accountant = "prv") -> Epsilon:
    """Compose all steps of a history into one epsilon.

    Args:
        history: in any order; equal mechanisms are merged.
        delta: greater than 0 and less than 1.
        accountant: "prv" is tight, to 0.01; "rdp" is fast and up to 30 % higher; "pld" is a second opinion, which needs
            the package dp-accounting. Where PRV's numerics cannot answer, or RDP's bound is lower, RDP's is returned.

    References:
        Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", 2019.
        Balle, Barthe, Gaboardi, Hsu, Sato, "Hypothesis Testing Interpretations and Renyi Differential Privacy",
        AISTATS 2020, theorem 21 (from RDP to epsilon).
        Gopi, Lee, Wutschitz, "Numerical Composition of Differential Privacy", NeurIPS 2021 (PRV).
    """
    if not 0 < delta < 1:
        raise RunError("no valid delta", got=delta, expected="a number between 0 and 1")
    steps: dict[tuple[float, float], int] = {}
    for spend in history:
        if spend.steps and spend.sample_rate:
            mechanism = (float(spend.noise_multiplier), float(spend.sample_rate))
            steps[mechanism] = steps.get(mechanism, 0) + int(spend.steps)
    if not steps:
        return Epsilon(0.0, accountant)
    if any(noise_multiplier == 0 for noise_multiplier, _ in steps):
        return Epsilon(math.inf, accountant)
    composed = tuple(Spend(*mechanism, count) for mechanism, count in sorted(steps.items()))
    if accountant == "pld":
        return Epsilon(_pld_epsilon(composed, delta), "pld")
    rdp = Epsilon(_rdp_epsilon(composed, delta), "rdp")
    if accountant == "rdp":
        return rdp
    prv = _prv_epsilon(composed, delta)
    return rdp if prv is None or rdp.value <= prv else Epsilon(prv, "prv")


def bound_within(limit: float) -> Callable[[Sequence[Spend], float], float]:
    """Make an accountant that only has to tell whether a limit is kept: the slow proof is asked where the fast fails.

    Args:
        limit: of epsilon.

    Returns:
        (history, delta) -> RDP's bound of epsilon if that is within the limit, else PRV's.
    """

    def bound(history: Sequence[Spend], delta: float) -> float:
        fast = epsilon(history, delta, "rdp").value
        return fast if fast <= limit else epsilon(history, delta).value

    return bound


def noise_multiplier_for(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "prv"
) -> float:
    """Find the least noise multiplier whose epsilon does not exceed a target.

    Args:
        target_epsilon: for all steps together.
        delta: greater than 0 and less than 1.
        sample_rate: as in `Spend`.
        steps: exactly as many as the whole run can take, never those of one round.
        accountant: the one that will judge the run.

    Returns:
        At most 0.1 % above the least; `epsilon` of it was computed and is within the target.
    """
    if not 0 < target_epsilon < math.inf:
        raise RunError("no valid target for epsilon", got=target_epsilon, expected="a finite number above 0")
    target_epsilon *= 1 - 1e-12  # so that rounding in the logarithm cannot pass the target

    def excess(accountant: Accountant) -> Callable[[float], float]:
        """The logarithm of epsilon over its target, as a function of the noise."""

        def at(noise: float) -> float:
            value = epsilon([Spend(noise, sample_rate, steps)], delta, accountant).value
            return math.log(value / target_epsilon) if value > 0 else -math.inf

        return at

    rough = _least(excess("rdp"), start=1.0, factor=2.0)
    return rough if accountant == "rdp" else _least(excess(accountant), start=rough, factor=1.1)


def delta_warning(delta: float, n: int) -> str | None:
    """Say why delta is too large for n units; None if it is not."""
    if delta < 1 / max(n, 1):
        return None
    return (
        f"delta {delta:g} is not below 1/{n}: a mechanism that publishes one of the {n} at random would satisfy it. "
        f"Choose a delta well below {1 / max(n, 1):.1g}"
    )


@dataclass(frozen=True)
class Guarantee:
    """An epsilon with everything that it means nothing without."""

    epsilon: float
    delta: float
    unit: Literal["sample", "client"]
    accountant: Accountant
    sampling: Literal["Poisson", "none"]  # none: counted without amplification
    rounds: int  # how many it covers
    seeded: bool = False  # whether noise or coins follow from a seed

    @property
    def relation(self) -> str:
        """Which data sets are neighbours."""
        return "add/remove one" if self.sampling == "Poisson" else "blank one"

    @property
    def trust(self) -> str:
        """Whom the protected must trust."""
        return "the client's own machine" if self.unit == "sample" else "the server"

    def sentences(self) -> tuple[str, str]:
        """Say who is protected against whom, and what the figure promises them."""
        return self._protection(), self._meaning()

    def _protection(self) -> str:
        if self.seeded:
            return "NOT PRIVATE: the noise follows from a seed, and whoever knows the seed can take it off again."
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} rounds"
        if math.isinf(self.epsilon):
            return f"NOT PRIVATE: what is sent in {rounds} may tell everything."
        if self.unit == "sample":
            return (
                f"Over {rounds}, each example is protected against everybody who sees what its client sends, including "
                f"the server; only {self.trust} must be trusted."
            )
        return (
            f"Over {rounds}, each client with all its examples is protected against everybody who sees the models, but "
            f"not against {self.trust}: it must be trusted to clip, to add the noise, and to tell nobody the updates."
        )

    def _meaning(self) -> str:
        one = "example" if self.unit == "sample" else "client"
        amplified = "Poisson sampling" if self.sampling == "Poisson" else "no amplification by sampling"
        terms = f"(delta {self.delta:g}, {self.relation} {one}, {self.accountant.upper()} accountant, {amplified})"
        if math.isinf(self.epsilon):
            return f"Epsilon is infinite: a test for whether a given {one} was used may be right every time {terms}."
        odds = ""
        if self.epsilon <= _SMALL_EPSILON:
            odds = (
                f", and but for delta nobody's odds on it change by more than a factor of {math.exp(self.epsilon):.2f}"
            )
        return (
            f"{'With secret noise, epsilon' if self.seeded else 'Epsilon'} {self.epsilon:.3g} means: a test for "
            f"whether a given {one} was used, if it wrongly names 1 in 100 that were not, finds at most "
            f"{self._found_in_100():g} in 100 that were{odds} {terms}."
        )

    def _found_in_100(self) -> float:
        """The true positives that epsilon and delta allow at 1 % of false ones, rounded up.

        References:
            Kairouz, Oh, Viswanath, "The Composition Theorem for Differential Privacy", ICML 2015, theorem 2.1.
        """
        false = 0.01
        bound = min(
            math.exp(min(self.epsilon, 700)) * false + self.delta,
            1 - math.exp(-self.epsilon) * (1 - self.delta - false),
        )
        return math.ceil(1000 * bound) / 10


def _least(excess: Callable[[float], float], start: float, factor: float) -> float:
    """The least noise multiplier without excess, from above and to _PRECISION."""
    high, above = start, excess(start)
    while above > 0:
        high *= factor
        above = excess(high)
        if high > _MOST_NOISE:
            raise InputError("no noise reaches this epsilon", hint="Raise epsilon or delta, or take fewer steps")
    low, below = high / factor, excess(high / factor)
    while below <= 0:
        high, above, low = low, below, low / factor
        below = excess(low)
        if low < _LEAST_NOISE:
            return high
    attempts = 0
    while high > low * (1 + _PRECISION):
        attempts += 1
        # Epsilon over noise is almost a line in logarithms, so aim just above where it meets the target; where it is
        # none, every third step halves.
        share = 0.5 if attempts % 3 == 0 or math.isinf(below - above) else below / (below - above)
        aim = low * (high / low) ** share * (1 + _PRECISION / 3)
        middle = min(max(aim, low * (1 + _PRECISION / 2)), high / (1 + _PRECISION * 0.9))
        value = excess(middle)
        if value > 0:
            low, below = middle, value
        else:
            high, above = middle, value
    return high


def _rdp_epsilon(history: tuple[Spend, ...], delta: float) -> float:
    """Convert the sum of Renyi divergences at the best order.

    The bound has one minimum over the orders. So tenths are tried beside the best whole order alone: far from q = 0
    their series converge slowly.
    """

    def bound(order: float) -> float:
        divergence = sum(spend.steps * _renyi(spend.noise_multiplier, spend.sample_rate, order) for spend in history)
        return divergence - (math.log(delta) + math.log(order)) / (order - 1) + math.log1p(-1 / order)

    best = min(_RDP_ORDERS, key=bound)
    tenths = [best + k / 10 for k in range(-9, 10) if k] if best <= 11 else []
    return max(0.0, min(map(bound, (best, *tenths))))


@lru_cache(maxsize=1 << 16)
def _renyi(noise_multiplier: float, sample_rate: float, order: float) -> float:
    try:
        from opacus.accountants.analysis.rdp import compute_rdp
    except ModuleNotFoundError as exc:
        raise MissingExtraError("opacus", "privacy", "Accounting for privacy") from exc
    return float(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=float(order)))


@lru_cache(maxsize=256)
def _prv_epsilon(history: tuple[Spend, ...], delta: float) -> float | None:
    """Compose privacy loss random variables; None where the numerics cannot be relied on.

    As Opacus's PRVAccountant does it, which offers no way to bound its memory: the grid is made coarser where it would
    have too many points, and the error that is added to the bound grows with its mesh.
    """
    import numpy as np
    from opacus.accountants.analysis import prv

    total = sum(spend.steps for spend in history)
    if total > _PRV_STEPS or delta < _PRV_DELTA:
        return None
    delta_error = delta / 1000
    # Gopi et al., remark 5.6: the mass beyond the grid's ends is bounded by RDP.
    single = (_rdp_epsilon((Spend(s.noise_multiplier, s.sample_rate, 1),), delta_error / (8 * total)) for s in history)
    end = 3 + max(_PRV_ERROR, _rdp_epsilon(history, delta_error / 4), *single)
    mesh_per_error = 1 / math.sqrt(total * math.log(12 / delta_error) / 2)
    error = max(_PRV_ERROR, 2 * end / mesh_per_error * max(4, len(history)) / _PRV_POINTS)
    if error > 0.5:
        return None
    try:
        # The logarithm of 1 - q is infinite at q = 1, as it should be; everything else that overflows is a failure.
        with np.errstate(divide="ignore", over="raise", invalid="raise"), warnings.catch_warnings():
            warnings.simplefilter("error")
            domain = prv.Domain.create_aligned(-end, end, error * mesh_per_error)
            variables = [
                prv.TruncatedPrivacyRandomVariable(
                    prv.PoissonSubsampledGaussianPRV(spend.sample_rate, spend.noise_multiplier),
                    domain.t_min,
                    domain.t_max,
                )
                for spend in history
            ]
            composed = prv.compose_heterogeneous(
                dprvs=[prv.discretize(variable, domain) for variable in variables],
                num_self_compositions=[spend.steps for spend in history],
            )
            bound = float(composed.compute_epsilon(delta, delta_error, error)[2])
    except (ArithmeticError, ValueError, RuntimeError, IndexError, Warning):
        return None
    return bound if math.isfinite(bound) else None


def _pld_epsilon(history: tuple[Spend, ...], delta: float) -> float:
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ModuleNotFoundError as exc:
        raise MissingExtraError("dp_accounting", "pld", "The PLD accountant") from exc
    accountant = PLDAccountant()
    for spend in history:
        event = PoissonSampledDpEvent(spend.sample_rate, GaussianDpEvent(spend.noise_multiplier))
        accountant.compose(event, spend.steps)
    return float(accountant.get_epsilon(delta))
