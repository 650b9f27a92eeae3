"""Where a batch lies: on which device, and images in which memory layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedtrain.data.base import Examples
from fedtrain.tasks.base import Task

__all__ = ["device_of", "for_model", "in_layout", "memory_format"]


def memory_format(task: Task) -> torch.memory_format:
    """The layout in which a task's model trains.

    oneDNN and cuDNN convolve fastest with channels last, but a model that calls `view` on such a tensor fails. So it is
    for tasks that say `channels_last = True`, as the built-in convolutional ones do.
    """
    return torch.channels_last if getattr(task, "channels_last", False) else torch.contiguous_format


def in_layout(inputs: Tensor, layout: torch.memory_format) -> Tensor:
    """Lay out a batch of images `(B, C, H, W)`; all else is left as it is."""
    return inputs.contiguous(memory_format=layout) if inputs.dim() == 4 else inputs


def device_of(model: nn.Module) -> torch.device:
    """The device that a model lies on; the CPU for one without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def for_model(batch: Examples, model: nn.Module, task: Task) -> Examples:
    """Bring a batch to a model's device, in the layout of its task."""
    device = device_of(model)
    return Examples(in_layout(batch.inputs.to(device), memory_format(task)), batch.targets.to(device))
