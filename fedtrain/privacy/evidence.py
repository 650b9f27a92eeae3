"""Statistics that would notice if privacy were broken: intervals around what was claimed, and a lower bound on epsilon.

Every test has a known chance of a false alarm, so what it refutes is refuted, and what it does not is only not refuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = [
    "FALSE_ALARM",
    "Check",
    "OneRun",
    "check_correlation",
    "check_deviation",
    "check_mean",
    "epsilon_lower_bound",
    "one_run",
    "p_value",
    "right_guesses",
]

FALSE_ALARM = 1e-6
"""Chance that a check fails although all is as claimed."""

_STANDARD_ERRORS = NormalDist().inv_cdf(1 - FALSE_ALARM / 2)  # 4.89
_SHARES = (0.05, 0.2, 0.5, 1.0)  # of the canaries, that are guessed at; for more separated scores the larger are better
_PRECISION = 1e-3  # of a lower bound, from below

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Check:
    """A claimed value and an interval that misses the true one with probability `FALSE_ALARM`."""

    name: str
    claimed: float
    measured: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the claim is within the interval."""
        return self.low <= self.claimed <= self.high


@dataclass(frozen=True)
class OneRun:
    """What one run with canaries tells about epsilon.

    Attributes:
        canaries: examples or clients that a coin put in or left out.
        guesses: how many were guessed at, the rest being left undecided.
        right: how many of the guesses were right.
        lower_bound: epsilon is at least this, at the given confidence.
        ceiling: the most that this number of canaries could have shown, had every guess been right.
        claimed: epsilon is at most this, says the accountant.
        delta: of both bounds.
        confidence: chance that the lower bound is below the true epsilon.
    """

    canaries: int
    guesses: int
    right: int
    lower_bound: float
    ceiling: float
    claimed: float
    delta: float
    confidence: float

    @property
    def holds(self) -> bool:
        """Whether the claim is not refuted."""
        return self.lower_bound <= self.claimed


def check_deviation(name: str, noise: Numbers, claimed: float) -> Check:
    """Check the standard deviation of normal numbers of mean 0 by a chi-square interval.

    Args:
        name: of the check.
        noise: independent numbers, 1000 or more.
        claimed: their standard deviation.

    References:
        Wilson, Hilferty, "The Distribution of Chi-Square", PNAS 1931: the quantile of n degrees of freedom is
        n (1 - 2/(9n) + z sqrt(2/(9n)))^3, which for n >= 1000 and these tails is within 0.01 % of it.
    """
    count = noise.size
    measured = math.sqrt(float(np.square(noise).mean()))
    center, spread = 1 - 2 / (9 * count), _STANDARD_ERRORS * math.sqrt(2 / (9 * count))
    low, high = (measured * (center + side * spread) ** -1.5 for side in (1, -1))
    return Check(name, claimed, measured, low, high)


def check_mean(name: str, values: Numbers, claimed: float, deviation: float) -> Check:
    """Check a mean by an interval of 4.9 standard errors to each side.

    Args:
        name: of the check.
        values: independent numbers, so many that their mean is as good as normal.
        claimed: their mean.
        deviation: their standard deviation, as claimed.
    """
    measured = float(values.mean())
    margin = _STANDARD_ERRORS * deviation / math.sqrt(values.size)
    return Check(name, claimed, measured, measured - margin, measured + margin)


def check_correlation(name: str, first: Numbers, second: Numbers) -> Check:
    """Check that two series of normal numbers of mean 0 are uncorrelated.

    Args:
        name: of the check.
        first: `(n,)` numbers, 1000 or more.
        second: `(n,)` numbers.
    """
    scale = math.sqrt(float(np.square(first).sum() * np.square(second).sum()))
    measured = float((first * second).sum()) / scale if scale else 0.0
    margin = _STANDARD_ERRORS / math.sqrt(first.size)
    return Check(name, 0.0, measured, measured - margin, measured + margin)


def right_guesses(scores: Numbers, included: npt.NDArray[np.bool_], guesses: int) -> int:
    """Guess the canaries with the highest scores as in, and as many with the lowest as out; count the right guesses.

    Args:
        scores: `(m,)`, the higher the likelier in.
        included: `(m,)`, by the coins.
        guesses: an even number up to m; the canaries between are left undecided.
    """
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(included[order[len(order) - half :]].sum() + (~included[order[:half]]).sum())


def p_value(epsilon: float, delta: float, canaries: int, guesses: int, right: int) -> float:
    """Bound the chance that an (epsilon, delta)-private run lets so many guesses, or more, be right.

    Args:
        epsilon: at least 0.
        delta: from 0 to below 1.
        canaries: m, each put in or left out by a fair coin of its own.
        guesses: r, at most m.
        right: v, at most r.

    References:
        Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem 5.2:
        P[right >= v] <= P[W >= v] + delta m max_{1 <= i <= m} 2/i P[v > W >= v - i], with W of the binomial
        distribution of r trials and success 1/(1 + e^-epsilon).
    """
    chances = _binomial(guesses, epsilon)
    beta = float(chances[right:].sum())
    below = np.cumsum(chances[:right][::-1])  # P[v > W >= v - i] for i = 1 to v, beyond which it does not grow
    alpha = float((2 * below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, beta + delta * canaries * alpha)


def epsilon_lower_bound(delta: float, canaries: int, guesses: int, right: int, confidence: float) -> float:
    """Find the epsilon that so many right guesses refute.

    Args:
        delta: as in `p_value`, with the next three.
        canaries: m.
        guesses: r.
        right: v.
        confidence: chance that the bound is below the true epsilon.

    Returns:
        At least 0. Whoever is private with a lower epsilon is so with this one too, so it is refuted as well.
    """
    low, high = 0.0, 1.0

    def refuted(epsilon: float) -> bool:
        return p_value(epsilon, delta, canaries, guesses, right) <= 1 - confidence

    while refuted(high):
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def one_run(
    scores: Numbers, included: npt.NDArray[np.bool_], claimed: float, delta: float, confidence: float = 0.95
) -> OneRun:
    """Turn the scores of canaries into a lower bound on epsilon.

    How many guesses are best depends on how far the scores lie apart. So four numbers of guesses are tried, each with a
    fourth of the chance to err.

    Args:
        scores: `(m,)`, such as dot products of canaries with what was released.
        included: `(m,)`, by fair coins.
        claimed: an upper bound of epsilon.
        delta: at which it is claimed.
        confidence: chance that the lower bound is below the true epsilon.
    """
    canaries, each = len(scores), 1 - (1 - confidence) / len(_SHARES)

    def bound(guesses: int, right: int) -> float:
        return epsilon_lower_bound(delta, canaries, guesses, right, each)

    tries: Sequence[tuple[int, int]] = [
        (guesses, right_guesses(scores, included, guesses))
        for guesses in (2 * round(share * canaries / 2) for share in _SHARES)
    ]
    lower, guesses, right = max((bound(guesses, right), guesses, right) for guesses, right in tries)
    ceiling = max(bound(guesses, guesses) for guesses, _ in tries)
    return OneRun(canaries, guesses, right, lower, ceiling, claimed, delta, confidence)


def _binomial(trials: int, epsilon: float) -> Numbers:
    """`(trials + 1,)`: the chances of 0, 1, ... successes, where one succeeds with 1/(1 + e^-epsilon)."""
    numbers = np.arange(trials + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(numbers[1:]))])
    log_ways = log_factorials[-1] - log_factorials - log_factorials[::-1]
    log_success, log_failure = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    chances: Numbers = np.exp(log_ways + numbers * log_success + (trials - numbers) * log_failure)
    return chances
