"""Clipping: an update counts whole near a centre, and is shortened to a limit beyond it.

References:
    Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021, algorithm 2:
    v <- v + 1/n sum_i (m_i - v) min(1, tau / |m_i - v|), from the last round's v.
    Sun, Kairouz, Suresh, McMahan, "Can You Really Backdoor Federated Learning?", 2019, section 3, norm thresholding:
    w <- w + sum_k (n_k / N) delta_k / max(1, |delta_k| / M).
"""

from __future__ import annotations

from collections.abc import Iterable

from fedtrain.experiment.strategies import CenteredClippingStrategy, NormBoundingStrategy
from fedtrain.params import Params, RunningMean, add, l2_norm, scaled, zeros_like
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.wire import Update

__all__ = ["centered_clipping", "norm_bounding"]


def centered_clipping(section: CenteredClippingStrategy) -> FederatedStrategy:
    """Build centred clipping, with one step per round; the centre is 0 in the first.

    Each client counts once, whatever its number of examples: a weight is what a malicious client would lie about.
    With n updates of d numbers it takes O(n d) time and O(d) memory. Any number of updates will do; a bad one moves the
    result by radius / n at most.
    """

    def init(params: Params) -> State:
        return {"center": zeros_like(params)}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        center = state["center"]
        total = RunningMean(like=params)
        count = 0
        for update in updates:
            total.add(update.delta, _share(l2_norm(update.delta, center), section.radius))
            count += 1
        if not count:
            return params, state
        # v + (m_i - v) share_i is m_i share_i + v (1 - share_i): an update that counts whole comes back unrounded.
        total.add(center, count - total.weight)
        center = total.mean()
        return add(params, center), {"center": center}

    return FederatedStrategy(Algorithm(init, apply, takes_buffers=True))


def norm_bounding(section: NormBoundingStrategy) -> FederatedStrategy:
    """Build norm bounding.

    With n updates of d numbers it takes O(n d) time and O(d) memory. Any number of updates will do; a bad one moves the
    result by its share of the examples times max_norm at most.
    """

    def init(_params: Params) -> State:
        return {}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        total = RunningMean(like=params)
        num_examples = 0
        for update in updates:
            total.add(update.delta, update.num_examples * _share(l2_norm(update.delta), section.max_norm))
            num_examples += update.num_examples
        if not num_examples:
            return params, state
        return add(params, scaled(total.mean(), total.weight / num_examples)), state

    return FederatedStrategy(Algorithm(init, apply, takes_buffers=True))


def _share(norm: float, limit: float) -> float:
    """How much of a vector keeps it within a limit."""
    return limit / norm if norm > limit else 1.0
