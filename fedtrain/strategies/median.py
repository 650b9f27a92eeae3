"""Coordinate median and trimmed mean: each coordinate for itself, without its extremes.

Both count each client once, whatever its number of examples: a weight is what a malicious client would lie about.

References:
    Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    ICML 2018, definitions 1 and 2. med{x_1..x_n} is the usual one-dimensional median, for an even n the mean of the
    two in the middle; trmean_b{x_1..x_n} is the mean without the b n largest and the b n smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction

from torch import Tensor

from fedtrain.experiment.strategies import TrimmedMeanStrategy
from fedtrain.params import Params, add
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.strategies.robust import ascending, by_coordinate
from fedtrain.wire import Update

__all__ = ["median", "trimmed_mean"]


def median() -> FederatedStrategy:
    """Build the coordinate median.

    With n updates of d numbers it takes O(d n log n) time and holds all n updates. Any number of updates will do; the
    result is within the range of the good ones as long as they are the majority.
    """

    def middle(block: Tensor) -> Tensor:
        ordered, n = ascending(block), len(block)
        return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2

    return FederatedStrategy(_coordinatewise(middle))


def trimmed_mean(section: TrimmedMeanStrategy) -> FederatedStrategy:
    """Build the trimmed mean.

    With n updates of d numbers it takes O(d n log n) time and holds all n updates. Cut are floor(trim n) at either end;
    as trim is below a half, at least one is left of any number of updates. The result is within the range of the good
    ones as long as no more than floor(trim n) are bad.

    flwr's FedTrimmedAvg takes the product in binary and may cut one less: int(0.29 * 100) is 28.
    """
    trim = Fraction(str(section.trim))  # the decimal number of the experiment file

    def inner_mean(block: Tensor) -> Tensor:
        cut = int(trim * len(block))
        return ascending(block)[cut : len(block) - cut].mean(dim=0)

    return FederatedStrategy(_coordinatewise(inner_mean))


def _coordinatewise(rule: Callable[[Tensor], Tensor]) -> Algorithm:
    def init(_params: Params) -> State:
        return {}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        deltas = [update.delta for update in updates]
        if not deltas:
            return params, state
        return add(params, by_coordinate(deltas, params, rule)), state

    return Algorithm(init, apply, takes_buffers=True)
