"""Measure a model on a set of examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedtrain.data.base import Examples
from fedtrain.tasks.base import Task
from fedtrain.training.layout import device_of, for_model
from fedtrain.training.metrics.pooled import Counts
from fedtrain.training.metrics.statistics import Batch

__all__ = ["add_up", "evaluate", "means", "weighted_mean"]


def evaluate(
    model: nn.Module, task: Task, examples: Examples, batch_size: int, counts: Counts | None = None
) -> dict[str, float]:
    """Mean loss and metrics over examples.

    Args:
        model: on any device; examples are moved there batch by batch.
        task: gives loss and metrics.
        examples: may be empty.
        batch_size: examples per forward pass; part of the result to the last bit.
        counts: begins anew, and takes in all batches; None where only means are asked for.

    Returns:
        "loss" and each metric of the task; empty for no examples.
    """
    if counts:
        counts.clear()
    if not len(examples):
        return {}
    sums = torch.zeros(1 + len(task.metrics()), dtype=torch.float64, device=device_of(model))
    for first in range(0, len(examples), batch_size):
        rows = slice(first, first + batch_size)
        sums += add_up(model, task, Examples(examples.inputs[rows], examples.targets[rows]), counts)
    return means(task, sums, len(examples))


@torch.inference_mode()
def add_up(model: nn.Module, task: Task, batch: Examples, counts: Counts | None = None) -> Tensor:
    """Add up loss and metrics over a batch.

    Args:
        model: on any device; the examples are moved there.
        task: gives loss and metrics.
        batch: at least one example.
        counts: takes the batch in; None where only these sums are asked for.

    Returns:
        The loss's sum and each metric's, float64 on the model's device: `(1 + metrics,)`.
    """
    model.eval()
    batch = for_model(batch, model, task)
    outputs = model(batch.inputs)
    values = [f(outputs, batch.targets) for f in (task.loss, *task.metrics().values())]
    if counts:
        counts.add(Batch(batch.inputs, outputs, batch.targets))
    return torch.stack([value.double().sum() for value in values])


def means(task: Task, sums: Tensor, count: int) -> dict[str, float]:
    """Take the means of what `add_up` has found over so many examples."""
    return dict(zip(["loss", *task.metrics()], (sums / count).tolist(), strict=True))


def weighted_mean(values: Iterable[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Mean of named numbers over clients, weighted by examples; a name counts where it occurs."""
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    for named, weight in values:
        for name, value in named.items():
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0) + weight
    return {name: total / weights[name] for name, total in sums.items() if weights[name]}
