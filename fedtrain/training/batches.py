"""Which examples a client trains on, step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedtrain.data.base import Examples
from fedtrain.errors import TaskError
from fedtrain.experiment.losses import BalanceSection, CurriculumSection
from fedtrain.tasks.base import Task

__all__ = ["Batch", "batches", "easiest", "mean_loss"]

_SCORED = 1000  # examples per forward pass where they are ranked; part of their losses to the last bit


class Batch(NamedTuple):
    """The examples of one step.

    Attributes:
        inputs: `(B, *input_shape)`.
        targets: `(B,)`, or `(B, T)` for tokens.
        weights: `(B,)` factor of each example's loss; None for 1.
        mixed: like `targets`: those of the examples that were mixed in; None for none.
        share: `(B,)` weight of the loss against `targets`; that against `mixed` has the rest.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None
    mixed: Tensor | None = None
    share: Tensor | None = None

    def rows(self, part: slice) -> Batch:
        """Some of the examples, such as those of one forward pass."""
        return Batch(*(None if t is None else t[part] for t in self))  # type: ignore[arg-type]


def mean_loss(task_loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, batch: Batch) -> Tensor:
    """Mean over a batch of each example's loss, mixed and weighted as the batch says.

    Args:
        task_loss: (outputs, targets) -> (B,).
        outputs: of the model, for the batch's inputs.
        batch: what the outputs are held against.
    """
    losses = task_loss(outputs, batch.targets)
    if batch.mixed is not None and batch.share is not None:
        losses = batch.share * losses + (1 - batch.share) * task_loss(outputs, batch.mixed)
    if batch.weights is not None:
        losses = batch.weights * losses
    return losses.mean()


def batches(
    examples: Examples, batch_size: int, steps: int, rng: np.random.Generator, balance: BalanceSection = "none"
) -> Iterator[Batch]:
    """Yield so many shuffled batches, in as many passes as that takes.

    Args:
        examples: of one client.
        batch_size: examples per batch; the last of a pass may be smaller.
        steps: batches to yield.
        rng: draws the rows.
        balance: oversample draws each class equally often, with replacement; weight weighs examples by the inverse
            frequency of their class on this client.
    """
    size, device = len(examples), examples.inputs.device
    batch = min(batch_size, size)
    weights = _class_weights(examples.targets) if balance == "weight" else None
    while steps > 0:
        # Rows are put in order once per pass; slices of the result cost nothing.
        rows = _oversampled(examples.targets, rng) if balance == "oversample" else rng.permutation(size)
        order = torch.from_numpy(rows).to(device)
        inputs, targets = (torch.split(_ordered(t, order), batch) for t in (examples.inputs, examples.targets))
        factors = [None] * len(inputs) if weights is None else torch.split(weights[order], batch)
        yield from itertools.islice(map(Batch, inputs, targets, factors), steps)
        steps -= len(inputs)


def easiest(
    section: CurriculumSection, round_number: int, examples: Examples, model: nn.Module, task: Task
) -> Examples:
    """Choose the examples that take part in a round of a curriculum; of equally difficult ones the first.

    Args:
        section: how many, and what is difficult.
        round_number: from 1 on.
        examples: of one client, where the model is.
        model: as the client received it; is left in the mode of evaluation.
        task: gives the loss, or `difficulty` where the score is the user's own.

    Raises:
        TaskError: the user's own score does not give one number per example.
    """
    count = math.ceil(section.share(round_number) * len(examples) - 1e-9)
    if count >= len(examples):
        return examples
    model.eval()
    with torch.no_grad():
        scores = torch.cat(list(_difficulty(section, examples, model, task)))
    rows = scores.argsort(stable=True)[:count].sort().values
    return Examples(examples.inputs[rows], examples.targets[rows])


def _difficulty(section: CurriculumSection, examples: Examples, model: nn.Module, task: Any) -> Iterator[Tensor]:
    """Yield how difficult examples are, some at a time."""
    for first in range(0, len(examples), _SCORED):
        inputs, targets = (t[first : first + _SCORED] for t in (examples.inputs, examples.targets))
        own = section.score != "loss"
        scores = task.difficulty(inputs, targets) if own else task.loss(model(inputs), targets)
        shape = tuple(getattr(scores, "shape", ()))
        if shape != (len(targets),):
            raise TaskError(
                "training.curriculum.score must give one number per example",
                got=f"shape {shape} for {len(targets)} examples",
                expected=f"shape ({len(targets)},)",
            )
        yield scores


def _ordered(values: Tensor, rows: Tensor) -> Tensor:
    """Gather rows. index_select is three times as fast as indexing, and forgets that channels come last."""
    return values.index_select(0, rows) if values.is_contiguous() else values[rows]


def _class_weights(targets: Tensor) -> Tensor:
    """`(N,)` N / (classes * examples of the class), for the classes that there are; their mean is 1."""
    counts = torch.bincount(targets)
    return len(targets) / (torch.count_nonzero(counts) * counts[targets])


def _oversampled(targets: Tensor, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw as many rows as there are, of each class equally many but for one."""
    labels = targets.cpu().numpy()
    classes, counts = np.unique(labels, return_counts=True)
    rows = np.argsort(labels, kind="stable")  # class by class
    # A class that comes first in one pass does not get what is left over in every pass.
    drawn = rng.permutation((np.arange(len(labels)) + rng.integers(len(classes))) % len(classes))
    chosen: npt.NDArray[np.int64] = rows[(np.cumsum(counts) - counts)[drawn] + rng.integers(counts[drawn])]
    return chosen
