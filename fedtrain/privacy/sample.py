"""Sample-level differential privacy: the gradient of DP-SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fedtrain.errors import InputError, RunError
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.clipping import Clip, Engine, Subject, clipped_sum, layers_of
from fedtrain.privacy.fast import FastEngine, covers
from fedtrain.privacy.gradients import OpacusEngine
from fedtrain.privacy.rng import NoiseSource
from fedtrain.privacy.suitability import check_layers, try_engine

__all__ = ["PrivateGradients"]

_LEAST_NORM = 1e-6  # far below, float32's smallest numbers would count as zero in a norm, and yet be sent


class PrivateGradients:
    """Compute DP-SGD's gradient: a Poisson sample, each example's gradient clipped, their sum with noise, over q n.

    Args:
        model: on any device; its names, hooks and buffers stay as they are.
        loss: (outputs, targets) -> `(B,)`, each example's by itself.
        trained: leaf parameters of the model, in the order in which gradients are wanted.
        section: norm, clipping, mode and physical batch size.

    Attributes:
        mode: the mode in use. "auto" is resolved; "fast" falls back to "hooks" where a layer is not covered.

    Raises:
        TaskError: DP-SGD, or the mode, cannot take the model.

    Floating-point caveat: whatever weights the server sends, an example adds at most max_grad_norm to the sum, give or
    take a few millionths; mode ghost alone trusts them. But a model may round otherwise in a batch of another size, so
    what the other examples add, each within its bound, can change too where weights enlarge rounding. With
    physical_batch_size = 1 no example meets another in the model.

    References:
        Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1.
        De et al., "Unlocking High-Accuracy Differentially Private Image Classification through Scale", 2022, section
        3.2: an example's gradient is the mean over its augmented copies, and only then clipped.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        trained: Sequence[Tensor],
        section: SamplePrivacy,
    ) -> None:
        if section.max_grad_norm < _LEAST_NORM:
            raise InputError(
                "privacy.max_grad_norm is too small to be measured",
                got=section.max_grad_norm,
                expected=f"at least {_LEAST_NORM:g}",
            )
        check_layers(model, trained)
        self._subject = Subject(model, loss, list(trained), layers_of(model, trained))
        per_layer = section.clipping == "per-layer"
        if per_layer and section.mode == "ghost":
            raise InputError(
                'privacy.mode = "ghost" cannot clip per layer: it weights the whole loss of an example',
                hint='Use clipping = "flat", or mode = "fast" or "hooks"',
            )
        self._section, self._clip = section, Clip(section.max_grad_norm, per_layer)
        self._tried = False
        self._engine: Engine
        if section.mode in ("auto", "fast") and all(map(covers, self._subject.layers)):
            self.mode = "fast"
            self._engine = FastEngine(self._subject)
        else:
            self.mode = "hooks" if section.mode in ("auto", "fast") else section.mode
            self._engine = OpacusEngine(self._subject, self.mode)

    def steps(
        self,
        inputs: Tensor,
        targets: Tensor,
        charge: Spend,
        noise: NoiseSource,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[list[Tensor]]:
        """Yield `charge.steps` gradients, each for the model as it then stands.

        A step whose sample is empty is a noise-only step.

        Args:
            inputs: `(n, ...)`, all examples, on the model's device.
            targets: `(n, ...)`.
            charge: what has been reserved: noise multiplier, sample rate and steps.
            noise: where coins and noise come from.
            augment: changes each row of a batch at random, by itself; `augmentations` copies of an example get there.

        Yields:
            Tensors in the order of `trained`, for the caller to use up.
        """
        expected_batch = charge.sample_rate * len(inputs)
        if not expected_batch:
            raise RunError("DP-SGD has nothing to sample", got=f"sample rate {charge.sample_rate} of {len(inputs)}")
        self.try_once(inputs, targets)
        std = charge.noise_multiplier * self._section.max_grad_norm
        for _ in range(charge.steps):
            rows = noise.poisson_mask(len(inputs), charge.sample_rate).nonzero()[:, 0].to(inputs.device)
            sums = self._clipped_sum(inputs[rows], targets[rows], augment)
            noised = [noise.add_noise(total, std) for total in sums]
            torch._foreach_div_(noised, expected_batch)
            yield noised

    def try_once(self, inputs: Tensor, targets: Tensor) -> None:
        """Try the model on random examples of these shapes and dtypes, unless that was done before.

        Raises:
            TaskError: DP-SGD cannot take it.
        """
        if not self._tried:
            try_engine(self._engine, self._subject, inputs, targets)
            self._tried = True

    def _clipped_sum(self, inputs: Tensor, targets: Tensor, augment: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
        total: list[Tensor] | None = None
        copies = self._section.augmentations if augment else 1  # unchanged, they would all be the same
        size = max(1, self._section.physical_batch_size // copies)
        for first in range(0, len(inputs), size):
            x, y = inputs[first : first + size], targets[first : first + size]
            if augment:
                x, y = augment(torch.cat([x] * copies)), torch.cat([y] * copies)
            part = clipped_sum(self._engine, x, y, self._clip, copies)
            if total is None:
                total = part
            elif part is not None:
                torch._foreach_add_(total, part)
        return [torch.zeros_like(p) for p in self._subject.trained] if total is None else total
