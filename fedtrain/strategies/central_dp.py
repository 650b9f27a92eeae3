"""Client-level central differential privacy: a strategy sees nothing of a round but the noised mean of clipped updates.

References:
    McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018, algorithm 1
    with weights of 1, flat clipping and the fixed-denominator estimator f~_f:
        Delta = (sum_k delta_k min(1, C / |delta_k|) + N(0, z^2 C^2 I)) / (q N)
    Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021,
    algorithm 1: C <- C exp(-lr (b~ - gamma)), where b~ is the noised fraction of updates with |delta_k| <= C; and
    theorem 1: sums with the noise multipliers z_delta and z_b cost together what one with z does, if
    z^-2 = z_delta^-2 + z_b^-2.
    Casacuberta, Shoemate, Vadhan, Wagaman, "Widespread Underestimation of Sensitivity in Differentially Private
    Libraries and How to Fix It", CCS 2022 (why clipping leaves room for rounding).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch

from fedtrain.errors import InputError, PrivacyError
from fedtrain.experiment.privacy import AdaptiveClipping, ClientPrivacy
from fedtrain.params import Params, l2_norm
from fedtrain.privacy.rng import NoiseSource
from fedtrain.strategies.base import FederatedStrategy, State
from fedtrain.wire import Update

__all__ = ["NoiseSplit", "Release", "central_dp", "noise_split"]

_MOST_RISE = 1.5  # of the noise on the deltas, to pay for the count
# Each addition rounds the sum by 2^-53 of it at most: this keeps one client's influence within C among 30,000 updates.
_ROUNDING = 1e-7


class Release(Protocol):
    """What the server does for a round's release."""

    @property
    def noise(self) -> NoiseSource:
        """Where the noise comes from."""

    def charge(self) -> None:
        """Write the round's spend to the ledger, before its noise is drawn.

        Raises:
            BudgetError: the round would overspend; nothing was released.
        """


class NoiseSplit(NamedTuple):
    """The noise of one round, which costs one noise multiplier in all."""

    delta_multiplier: float  # standard deviation of the noise on the sum of deltas, over the clipping norm
    count_std: float  # likewise on the number of unclipped updates, in clients; 0: nobody counts them


def noise_split(section: ClientPrivacy, noise_multiplier: float, expected: float) -> NoiseSplit:
    """Split a round's noise between the deltas and the count that adaptive clipping follows.

    The count gets `count_noise`, or a twentieth of the expected clients, and more where the noise on the deltas would
    otherwise rise by more than half.

    Args:
        section: says whether clipping is adaptive, and of which quantile.
        noise_multiplier: z, what both cost together.
        expected: clients of a round, q N.
    """
    clipping = section.adaptive_clipping
    if clipping is None:
        return NoiseSplit(noise_multiplier, 0.0)
    sensitivity = _count_sensitivity(clipping)
    least = noise_multiplier * sensitivity / math.sqrt(1 - _MOST_RISE**-2)
    count_std = max(clipping.count_noise or expected / 20, least)
    return NoiseSplit((noise_multiplier**-2 - (sensitivity / count_std) ** 2) ** -0.5, count_std)


def central_dp(
    strategy: FederatedStrategy, section: ClientPrivacy, noise_multiplier: float, expected: float, release: Release
) -> FederatedStrategy:
    """Put clipping and noise before a strategy's server half, which then gets exactly one update a round.

    Every client counts once, whatever its number of examples. Without any update the round is noise alone: that nobody
    came is not for others to know. An update that is not finite counts as a zero that was clipped.

    Args:
        strategy: in rounds; its server half must make sense of a mean.
        section: the clipping norm, and whether it adapts.
        noise_multiplier: of a round, its count of unclipped updates included.
        expected: clients of a round, q N: the constant by which sums are divided, however many come.
        release: charges each round, and holds the noise.

    Raises:
        InputError: from `init`, if updates would bring more than their delta.
        PrivacyError: from `apply`, if an update does not fit the model.
    """
    if strategy.asynchrony:
        raise InputError("an asynchronous strategy takes one client twice into a sum, and its noise is for once")
    algorithm, clipping = strategy.algorithm, section.adaptive_clipping
    split = noise_split(section, noise_multiplier, expected)

    def init(params: Params) -> State:
        if extra := algorithm.extra(params):
            raise InputError(
                "the strategy's clients send more than their update, which no clipping would bound",
                got=", ".join(extra),
                expected="nothing beside the delta",
                hint="Choose one with plain updates, such as fedavg, fedavgm, fedadam or fedprox",
            )
        return {"inner": algorithm.init(params), "bound": section.max_delta_norm, "round_number": 1}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        bound, round_number = state["bound"], state["round_number"]
        total = _ClippedSum(params, bound)
        for update in updates:
            total.add(update.delta)
            del update  # else it would lie beside the next one
        release.charge()
        add_noise = release.noise.add_noise
        mean = {
            name: (add_noise(t, split.delta_multiplier * bound) / expected).to(params[name].dtype)
            for name, t in total.values.items()
        }
        if clipping:
            surplus = total.unclipped - clipping.target_quantile * total.count
            noised = add_noise(torch.tensor(surplus, dtype=torch.float64), split.count_std)
            bound *= math.exp(-clipping.lr * float(noised) / expected)
        update = Update("all clients", round_number, mean, num_examples=1)
        new, inner = algorithm.apply(state["inner"], params, [update])
        return new, {"inner": inner, "bound": bound, "round_number": round_number + 1}

    wrapped = algorithm._replace(
        init=init,
        apply=apply,
        share=lambda state: algorithm.share(state["inner"]),
        extra=lambda _params: {},
        takes_buffers=True,  # else they would be averaged beside the clip
    )
    return strategy._replace(algorithm=wrapped)


class _ClippedSum:
    """A sum of deltas, each shortened to an L2 norm over all its tensors; it holds one model in float64.

    Args:
        like: names, shapes and dtypes of every delta.
        bound: the largest norm; the influence of one delta on the sum stays within it in floating point too.
    """

    def __init__(self, like: Params, bound: float) -> None:
        self.values = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in like.items()}
        self.count = self.unclipped = 0
        self._schema = _schema(like)
        self._limit = bound * (1 - _ROUNDING)

    def add(self, delta: Params) -> None:
        """Take in a delta; nothing of it if it is not finite."""
        if _schema(delta) != self._schema:
            raise PrivacyError(
                "an update does not fit the model, so that its norm is not its influence",
                expected="tensors of the model's names, shapes and dtypes",
            )
        self.count += 1
        norm = l2_norm(delta)
        if not math.isfinite(norm):
            return
        self.unclipped += norm <= self._limit
        share = self._limit / norm if norm > self._limit else 1.0
        for name, total in self.values.items():
            total.add_(delta[name], alpha=share)


def _count_sensitivity(clipping: AdaptiveClipping) -> float:
    """How far one client moves the count.

    The sum is over those who came, of 1[unclipped] - gamma: a client who is missing adds nothing, and the norm moves
    until gamma of those who come are unclipped. The paper subtracts 1/2, and gamma after the division. That is the same
    for gamma = 1/2 or when q N come, and a little less sensitive; but a missing client then counts as half unclipped,
    and for gamma = 0.9 the norm would rise for ever once more than a fifth is missing.
    """
    return max(clipping.target_quantile, 1 - clipping.target_quantile)


def _schema(params: Params) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in params.items()}
