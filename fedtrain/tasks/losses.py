"""Losses by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.experiment.losses import (
    BalanceSection,
    CrossEntropyLoss,
    CurriculumSection,
    FocalLoss,
    HingeLoss,
    HuberLoss,
    LossSection,
    MaeLoss,
    OwnLoss,
    QuantileLoss,
)
from fedtrain.importing import load_object
from fedtrain.tasks.base import Task
from fedtrain.tasks.dense import Regressor

__all__ = ["Loss", "check_balance", "load_score", "make_loss"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> (B,): the loss of each example."""


def make_loss(section: LossSection | None, task: Task, spec: DataSpec, base: Path) -> Loss:
    """Build the loss that a task is trained with.

    Args:
        section: the experiment's; None for the task's own.
        task: may say by `target_std` in which unit numbers are measured.
        spec: what the data are like.
        base: the experiment file's folder, against which "file.py:function" is resolved.

    Raises:
        TaskError: the loss does not suit the data or the task, or cannot be loaded.
    """
    if section is None:
        return task.loss
    if isinstance(section, OwnLoss):
        return _load_function(section.path, base)
    if isinstance(section, CrossEntropyLoss | FocalLoss | HingeLoss):
        if spec.target == "number":
            raise _unsuited(section, spec)
        return _OfClasses(section.name, spec.num_classes, _of_logits(section, spec))
    if spec.target != "number":
        raise _unsuited(section, spec)
    quantiles = tuple(section.q) if isinstance(section, QuantileLoss) else ()
    if len(quantiles) > 1 and isinstance(task, Regressor):
        raise TaskError(
            "training.loss.q names several quantiles, and the task regressor has one output",
            got=list(quantiles),
            expected="one quantile, or a task of your own whose model gives (B, quantiles)",
        )
    return _OfNumbers(section.name, max(1, len(quantiles)), getattr(task, "target_std", 1.0), _of_pairs(section))


def load_score(section: CurriculumSection | None, base: Path) -> Loss | None:
    """Load the function of a user's own that says how difficult examples are; None where their loss says it.

    Raises:
        TaskError: there is no such function.
    """
    return None if section is None or section.score == "loss" else _load_function(section.score, base)


def check_balance(balance: BalanceSection, spec: DataSpec) -> None:
    """Refuse to balance classes where there are none.

    Raises:
        TaskError: it is so.
    """
    if balance != "none" and spec.target != "class":
        raise TaskError(
            f'training.balance = "{balance}" needs classes to predict',
            got=f"the target {spec.target!r}",
            hint='Set training.balance to "none"',
        )


@dataclass(frozen=True)
class _OfClasses:
    """Loss of logits: `(B, classes)`, `(B, 1)` for class 1 against class 0, or `(B, T, tokens)`."""

    name: str
    classes: int
    function: Callable[[Tensor, Tensor], Tensor]  # logits (N, classes), targets (N,) -> (N,)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        shapes = [(*targets.shape, self.classes)]
        if self.classes == 2:
            shapes.append((*targets.shape, 1))
        logits = _in_full(self.name, outputs, shapes).flatten(0, -2)
        if logits.shape[1] == 1:  # the logit of class 1, where that of class 0 is 0
            logits = F.pad(logits, (1, 0))
        losses = self.function(logits, targets.flatten()).view_as(targets)
        return losses if losses.dim() == 1 else losses.flatten(1).mean(1)


@dataclass(frozen=True)
class _OfNumbers:
    """Loss of predictions `(B,)`, or `(B, predictions)` of one target, in target units."""

    name: str
    predictions: int
    unit: float
    function: Callable[[Tensor, Tensor], Tensor]  # predictions, targets that broadcast to them -> as predictions

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        several = (self.predictions,) if self.predictions > 1 else ()
        outputs = _in_full(self.name, outputs, [(*targets.shape, *several)])
        if not several:
            return self.function(outputs / self.unit, targets / self.unit)
        return self.function(outputs / self.unit, targets[:, None] / self.unit).mean(1)


def _in_full(name: str, outputs: Any, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Refuse outputs of a shape that the loss is not for; give them at least 32 bits."""
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape not in shapes:
        raise TaskError(
            f'training.loss.name = "{name}" does not go with the model\'s outputs',
            got=shape,
            expected=f"a tensor of shape {' or '.join(map(str, shapes))}",
            hint="Leave out training.loss for the task's own",
        )
    full: Tensor = outputs.float() if outputs.element_size() < 4 else outputs
    return full


def _of_logits(section: CrossEntropyLoss | FocalLoss | HingeLoss, spec: DataSpec) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(section, HingeLoss):
        return _hinge
    if isinstance(section, FocalLoss):
        return partial(_focal, gamma=section.gamma, alpha=_per_class("alpha", section.alpha, spec))
    weights = _per_class("class_weights", section.class_weights, spec)
    return partial(_cross_entropy, weights=weights, smoothing=section.label_smoothing)


def _of_pairs(section: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(section, QuantileLoss):
        return partial(_pinball, quantiles=torch.tensor(section.q))
    if isinstance(section, HuberLoss):
        return partial(F.huber_loss, delta=section.delta, reduction="none")
    return partial(F.l1_loss if isinstance(section, MaeLoss) else F.mse_loss, reduction="none")


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    weights = None if weights is None else weights.to(logits)
    return F.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=smoothing)


def _focal(logits: Tensor, targets: Tensor, gamma: float, alpha: Tensor | None) -> Tensor:
    """Equation 5 of Lin et al. 2017, with an alpha for each class."""
    log_p = -F.cross_entropy(logits, targets, reduction="none")
    # Above 0, for the slope of x^gamma at 0 is infinite where gamma < 1.
    missing = (-torch.expm1(log_p)).clamp(min=torch.finfo(logits.dtype).tiny)
    losses = -(missing**gamma) * log_p
    return losses if alpha is None else alpha.to(logits)[targets] * losses


def _hinge(logits: Tensor, targets: Tensor) -> Tensor:
    """Crammer and Singer 2001; of two classes, the usual hinge loss of the difference of their logits."""
    place = targets[:, None]
    others = logits.scatter(1, place, -torch.inf).max(1).values
    return (1 + others - logits.gather(1, place)[:, 0]).clamp(min=0)


def _pinball(outputs: Tensor, targets: Tensor, quantiles: Tensor) -> Tensor:
    """Koenker and Bassett 1978: what lies above the prediction costs q, what lies below 1 - q."""
    above, q = targets - outputs, quantiles.to(outputs)
    return torch.maximum(q * above, (q - 1) * above)


def _per_class(field: str, values: Sequence[float], spec: DataSpec) -> Tensor | None:
    if not values:
        return None
    if len(values) != spec.num_classes:
        raise TaskError(
            f"training.loss.{field} needs one number for each class",
            got=f"{len(values)} numbers",
            expected=f"{spec.num_classes}",
        )
    return torch.tensor(values)


def _load_function(path: str, base: Path) -> Loss:
    function: Any = load_object(path, base, TaskError)
    if not callable(function):
        raise TaskError(f"{path} is not a function", got=type(function).__name__)
    loss: Loss = function
    return loss


def _unsuited(section: Any, spec: DataSpec) -> TaskError:
    suited = "mse, mae, huber, quantile, own" if spec.target == "number" else "cross-entropy, focal, hinge, own"
    return TaskError(
        f'training.loss.name = "{section.name}" does not go with the target of the data',
        got=f"the target {spec.target!r}",
        expected=f"one of {suited}",
    )
