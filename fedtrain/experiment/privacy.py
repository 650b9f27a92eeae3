"""Whose privacy is protected, and how: the section `[privacy]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedtrain.experiment.base import Section, tag_defaults_to

__all__ = ["AdaptiveClipping", "ClientPrivacy", "PrivacySection", "SamplePrivacy"]


class _Privacy(Section):
    unit: str  # declared here so that it is the first key of every kind
    epsilon: float | None = Field(default=None, gt=0, examples=[8.0])
    """The most that the whole run may spend; the noise is calibrated for it. Or give `noise_multiplier`."""
    noise_multiplier: float | None = Field(default=None, ge=0.01, examples=[1.1])
    """Standard deviation of the noise over the clipping norm; epsilon follows from it."""
    delta: float = Field(gt=0, lt=1, examples=[1e-5])
    """Chance that the promise of epsilon does not hold; well below one over the number of protected units."""
    accountant: Literal["prv", "rdp"] = "prv"
    """Who proves epsilon: prv is tight; rdp is faster and up to 30 % higher."""
    noise_seed: int | None = Field(default=None, ge=0, examples=[1])
    """Repeatable noise and coins, for experiments on public data alone: what is trained with it is NOT PRIVATE."""

    @model_validator(mode="after")
    def _noise_is_known(self) -> _Privacy:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either epsilon, the budget of the whole run, or noise_multiplier")
        return self


class SamplePrivacy(_Privacy):
    """Each example is protected against everybody, the server too: clients train by DP-SGD (Abadi et al. 2016)."""

    unit: Literal["sample"] = "sample"
    max_grad_norm: float = Field(default=1.0, gt=0)
    """L2 norm to which each example's gradient is clipped."""
    clipping: Literal["flat", "per-layer"] = "flat"
    """flat: one norm over all parameters; per-layer: each layer's own, max_grad_norm over the root of their number."""
    mode: Literal["auto", "fast", "hooks", "ghost", "functorch"] = "auto"
    """How clipped gradients are computed, with equal results. fast: book-keeping (Bu et al. 2023) where all layers are
    such as it covers; hooks, ghost, functorch: Opacus's; auto: fast, or hooks where fast cannot. ghost assumes an
    honest server: weights made for it can carry one example past max_grad_norm."""
    physical_batch_size: int = Field(default=64, ge=1)
    """Examples, all copies counted, whose gradients are in memory at a time; it bounds memory, and nothing else."""
    augmentations: int = Field(default=1, ge=1, examples=[8])
    """Copies of each example that training.augment changes, each in its own way; the gradient of an example is the mean
    over its copies, and is clipped then (De et al. 2022). Costs no privacy, and about as much more time."""
    max_participations: int | None = Field(default=None, ge=1, examples=[20])
    """Rounds for which a client's noise is calibrated; it takes part in no more. As many as the draw of clients can
    give it unless set."""

    @model_validator(mode="after")
    def _copies_can_be_told_apart(self) -> SamplePrivacy:
        if self.mode == "ghost" and self.augmentations > 1:
            raise ValueError(
                'mode = "ghost" knows the norms of single copies, and those of a mean do not follow from them: with '
                'augmentations, take "fast" or "hooks"'
            )
        return self


class AdaptiveClipping(Section):
    """The clipping norm follows a quantile of the clients' norms (Andrew et al. 2021)."""

    target_quantile: float = Field(default=0.5, gt=0, lt=1)
    """Fraction of clients whose update is to be left unclipped."""
    lr: float = Field(default=0.2, gt=0, le=10)
    """Learning rate of the norm's logarithm."""
    count_noise: float | None = Field(default=None, gt=0, examples=[2.0])
    """Standard deviation of the noise on the number of unclipped updates, in clients; a twentieth of the expected
    clients of a round unless given, but always enough to leave the updates' own noise finite."""


class ClientPrivacy(_Privacy):
    """Each client as a whole is protected against all but the server, which adds noise (McMahan et al. 2018)."""

    unit: Literal["client"]
    max_delta_norm: float = Field(default=1.0, gt=0)
    """L2 norm to which each client's update is clipped; the first one where clipping is adaptive."""
    adaptive_clipping: AdaptiveClipping | None = None
    """Let the clipping norm follow the updates."""


PrivacySection = Annotated[
    SamplePrivacy | ClientPrivacy, Field(discriminator="unit"), tag_defaults_to("unit", "sample")
]
