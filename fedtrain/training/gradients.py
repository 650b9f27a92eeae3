"""The gradient of a plain step: forward and backward pass of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fedtrain.errors import TaskError
from fedtrain.experiment.training import TrainingSection
from fedtrain.tasks.base import Task
from fedtrain.tasks.hook import batch_loss_of
from fedtrain.training.batches import Batch, mean_loss
from fedtrain.training.rules import Tensors

__all__ = ["BatchGradients", "LossScale", "Losses", "MeanGradients", "PlainGradients"]

MeanGradients = Callable[[Batch, Sequence[Tensor], float], tuple[Tensor, Tensors]]
"""(batch, trained parameters, factor) -> (mean loss, gradients of the mean loss times the factor)."""

_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Losses:
    """Adds up losses where they are computed, and reads their sum once at the end."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._seen = 0

    def add(self, mean: Tensor, examples: int) -> None:
        """Take in the mean loss of so many examples."""
        self._sum.add_(mean, alpha=examples)
        self._seen += examples

    def mean(self) -> float:
        """The mean over all examples; NaN for none."""
        return float(self._sum) / self._seen if self._seen else math.nan


class BatchGradients:
    """Computes the gradient of a batch's mean loss on one device.

    Args:
        model: as it stands at each call; it is not changed, and with `training.compile` a compiled copy of its code
            runs on the same parameters.
        task: gives the loss.
        training: precision, compilation and the size of a forward pass.
        device: of the model.
    """

    def __init__(self, model: nn.Module, task: Task, training: TrainingSection, device: torch.device) -> None:
        self.model, self.training, self.device = model, training, device
        self._task, self._hook = task, batch_loss_of(task)
        # One program for all sizes of a batch: with one per size, what is compiled for a size would depend on the
        # sizes before it, and so would the last bits.
        self._forward = torch.compile(model, dynamic=True) if training.compile else model
        self._mixed = _PRECISIONS.get(training.precision)  # an autocast that is off costs as well

    def __call__(self, batch: Batch, trained: Sequence[Tensor], factor: float = 1.0) -> tuple[Tensor, Tensors]:
        """Compute the mean loss, and the gradients of it times a factor with regard to `trained`."""
        whole, size = batch.inputs.shape[0], self.training.micro_batch_size
        if size is None or whole <= size:
            return self._pass(batch, trained, factor)
        mean = torch.zeros((), device=self.device)
        total: Tensors | None = None
        for first in range(0, whole, size):
            piece = batch.rows(slice(first, first + size))
            share = len(piece.inputs) / whole
            loss, gradients = self._pass(piece, trained, factor * share)
            mean += loss * share
            # Not in place: two parameters that are added up share one tensor of gradients.
            total = gradients if total is None else torch._foreach_add(total, gradients)
        assert total is not None, "a batch has examples"
        return mean, total

    def _pass(self, batch: Batch, trained: Sequence[Tensor], factor: float) -> tuple[Tensor, Tensors]:
        with torch.autocast(self.device.type, self._mixed) if self._mixed else nullcontext():
            if self._hook:
                loss = mean_loss(partial(self._hook, self.model), batch.inputs, batch)
            else:
                loss = mean_loss(self._task.loss, self._forward(batch.inputs), batch)
        # In float32, for float16 ends at 65504.
        goal = loss if factor == 1.0 else loss.float() * factor
        return loss.detach(), torch.autograd.grad(goal, trained, materialize_grads=True)


class LossScale:
    """The factor that keeps small gradients above float16's smallest number, by the rule of torch.amp.GradScaler.

    It is halved where a gradient overflows, and doubled after 2,000 gradients in a row that do not.

    Attributes:
        value: the factor now.

    References:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2.
    """

    def __init__(self, value: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.value = value
        self._interval, self._clean = growth_interval, 0

    def update(self, *, finite: bool) -> None:
        """Take in whether all gradients were finite."""
        self._clean = self._clean + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self._clean == self._interval:
            self.value *= 2
            self._clean = 0


class PlainGradients:
    """Computes the gradient of each step in a client's round: unscaled and clipped.

    Args:
        compute: computes the gradient of a batch, on one device or several.
        training: precision and clipping.
    """

    def __init__(self, compute: MeanGradients, training: TrainingSection) -> None:
        self._compute, self._training = compute, training
        self._scale = LossScale() if training.precision == "float16" else None

    def of(self, batch: Batch, trained: Sequence[Tensor], losses: Losses) -> Tensors:
        """Compute the gradient of a batch's mean loss with regard to `trained`; the loss goes to `losses`.

        Raises:
            TaskError: run.deterministic is set, and the model cannot follow.
        """
        try:
            if self._scale is None:
                loss, gradients = self._compute(batch, trained, 1.0)
            else:
                loss, gradients = self._scaled(self._scale, batch, trained)
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise TaskError(
                "run.deterministic = true, and the model uses an operation that has no deterministic algorithm",
                got=str(error).split(",")[0],
                hint="Use another layer, or leave out run.deterministic",
            ) from error
        losses.add(loss, batch.inputs.shape[0])
        return self._clipped(gradients)

    def _scaled(self, scale: LossScale, batch: Batch, trained: Sequence[Tensor]) -> tuple[Tensor, Tensors]:
        """Repeat a batch that overflows with a smaller factor, so that a client takes as many steps as it was asked."""
        while True:
            factor = scale.value
            loss, scaled = self._compute(batch, trained, factor)
            gradients = torch._foreach_mul(scaled, 1 / factor)
            finite = bool(torch.stack(torch._foreach_norm(gradients, math.inf)).isfinite().all())
            scale.update(finite=finite)
            if finite or factor <= 1:  # a loss that is not finite itself is for the server's gate to see
                return loss, gradients

    def _clipped(self, gradients: Tensors) -> Tensors:
        largest, norm = self._training.clip_value, self._training.clip_norm
        if largest is not None:
            gradients = torch._foreach_clamp_max(torch._foreach_clamp_min(gradients, -largest), largest)
        if norm is not None:
            # As torch.nn.utils.clip_grad_norm_, which wants them in the parameters.
            factor = (norm / (torch.nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0)
            gradients = torch._foreach_mul(gradients, factor)
        return gradients
