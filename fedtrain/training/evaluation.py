"""Measure a model on a set of examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fedtrain.data.base import Examples
from fedtrain.tasks.base import Task
from fedtrain.training.layout import in_layout, memory_format
from fedtrain.training.metrics.pooled import Counts
from fedtrain.training.metrics.statistics import Batch

__all__ = ["evaluate", "weighted_mean"]


@torch.inference_mode()
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
    model.eval()
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    metrics = task.metrics()
    sums = torch.zeros(1 + len(metrics), dtype=torch.float64, device=device)
    for first in range(0, len(examples), batch_size):
        inputs = in_layout(examples.inputs[first : first + batch_size].to(device), memory_format(task))
        targets = examples.targets[first : first + batch_size].to(device)
        outputs = model(inputs)
        values = [task.loss(outputs, targets), *(metric(outputs, targets) for metric in metrics.values())]
        sums += torch.stack([value.double().sum() for value in values])
        if counts:
            counts.add(Batch(inputs, outputs, targets))
    means = (sums / len(examples)).tolist()
    return dict(zip(["loss", *metrics], means, strict=True))


def weighted_mean(values: Iterable[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Mean of named numbers over clients, weighted by examples; a name counts where it occurs."""
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    for named, weight in values:
        for name, value in named.items():
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0) + weight
    return {name: total / weights[name] for name, total in sums.items() if weights[name]}
