"""The training hooks: a task that says itself what a step minimises, or labels examples anew in each round."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedtrain.data.base import Examples
from fedtrain.errors import TaskError
from fedtrain.experiment.sections import Experiment
from fedtrain.tasks.base import Task

__all__ = ["BatchLoss", "Relabel", "batch_loss_of", "check_hook", "relabel_of", "relabelled"]

BatchLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, inputs, targets) -> (B,): what a step minimises for each example of its batch."""

_LABELLED = 1000  # examples per forward pass of a relabel; part of its outputs to the last bit


def batch_loss_of(task: Task) -> BatchLoss | None:
    """The task's training hook; None if a step minimises `loss(model(inputs), targets)`."""
    hook: BatchLoss | None = getattr(task, "batch_loss", None)
    return hook


Relabel = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, inputs, targets) -> targets of a round, like those given; without gradients, in the mode of evaluation."""


def relabel_of(task: Task) -> Relabel | None:
    """The task's way of giving examples other targets in each round; None if they keep their own."""
    relabel: Relabel | None = getattr(task, "relabel", None)
    return relabel


def relabelled(task: Task, model: nn.Module, examples: Examples) -> Examples:
    """Give examples the targets that the task wants in this round, where it has a `relabel`.

    Args:
        task: may label examples anew.
        model: that the training starts from; is left in the mode of evaluation, if there is a `relabel`.
        examples: of one client, where the model is; they are left as they are.

    Raises:
        TaskError: `relabel` does not give a target for each example, of the type of those before.
    """
    relabel = relabel_of(task)
    if relabel is None:
        return examples
    model.eval()
    found = []
    with torch.no_grad():
        for first in range(0, len(examples), _LABELLED):
            rows = slice(first, first + _LABELLED)
            targets = examples.targets[rows]
            given = relabel(model, examples.inputs[rows], targets.clone())
            if not isinstance(given, Tensor) or (given.shape, given.dtype) != (targets.shape, targets.dtype):
                is_tensor = isinstance(given, Tensor)
                raise TaskError(
                    "the task's relabel must give each example a target",
                    got=f"{given.dtype} of shape {tuple(given.shape)}" if is_tensor else type(given).__name__,
                    expected=f"{targets.dtype} of shape {tuple(targets.shape)}",
                )
            found.append(given)
    return Examples(examples.inputs, torch.cat(found))


def check_hook(task: Task, experiment: Experiment) -> None:
    """Refuse what does not go with a task's hooks.

    Raises:
        TaskError: the experiment asks for it.
    """
    training, privacy = experiment.training, experiment.privacy
    by_sample = privacy is not None and privacy.unit == "sample"
    relabelling = {
        'privacy.unit = "sample"': (by_sample, "is proved for targets that no other example has a part in"),
        "training.loss": (
            training.loss is not None,
            "does not know the targets that it gives: loss() is to be the task's",
        ),
        "training.curriculum": (training.curriculum is not None, "ranks examples by the targets of the data"),
    }
    own_step = {
        'privacy.unit = "sample"': (
            by_sample,
            "clips the gradient of each example by itself, which batch_loss may mix",
        ),
        "training.loss": (training.loss is not None, "would take the place of a loss that no step minimises"),
        "training.micro_batch_size": (
            training.micro_batch_size is not None,
            "splits a batch that batch_loss wants whole",
        ),
        'training.balance = "weight"': (
            training.balance == "weight",
            "weighs by classes, which batch_loss may not use",
        ),
        "training.augment": (
            any(section.mixes for section in training.augment),
            "mixes examples and their targets, which batch_loss may not use",
        ),
        "run.gpus": (experiment.run.gpus > 1, "splits a batch that batch_loss wants whole"),
        "training.compile": (training.compile, "compiles one forward pass, and batch_loss may take several"),
    }
    for hook, what, refused in (
        (relabel_of(task), "labels examples anew by its relabel", relabelling),
        (batch_loss_of(task), "trains by its batch_loss", own_step),
    ):
        for field, (given, why) in refused.items():
            if hook and given:
                raise TaskError(f"task {experiment.task.name!r} {what}, and {field} {why}")
