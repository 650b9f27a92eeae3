"""A look into a model: histograms of weights, of their changes and of activations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedtrain.params import Params
from fedtrain.records import Histogram

__all__ = ["activations", "histogram", "weights_and_changes"]

_BINS = 30


def histogram(values: Tensor) -> Histogram | None:
    """Count finite numbers in bins of equal width; None if there are none."""
    flat = values.detach().double().cpu().flatten()
    flat = flat[flat.isfinite()]
    if not flat.numel():
        return None
    counts, edges = np.histogram(flat.numpy(), bins=_BINS)
    return Histogram(
        edges=edges.tolist(), counts=counts.tolist(), total=float(flat.sum()), squares=float(flat.square().sum())
    )


def weights_and_changes(after: Params, before: Params) -> dict[str, Histogram]:
    """Count the global model's entries, and by how much a round has changed them.

    Args:
        after: the parameters after a round.
        before: before it, of the same names and shapes.

    Returns:
        "weights/NAME" and "changes/NAME" -> histogram.
    """
    found: dict[str, Histogram | None] = {f"weights/{name}": histogram(t) for name, t in after.items()}
    found |= {f"changes/{name}": histogram(t.double() - before[name].double()) for name, t in after.items()}
    return {tag: counted for tag, counted in found.items() if counted}


@torch.no_grad()
def activations(model: nn.Module, inputs: Tensor) -> dict[str, Histogram]:
    """Count what the layers of a model put out.

    Args:
        model: is left in the mode that it is in.
        inputs: `(B, ...)`, on the model's device.

    Returns:
        "activations/LAYER" -> histogram, of layers without layers of their own.
    """
    found: dict[str, Histogram] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(_module: nn.Module, _inputs: object, output: object) -> None:
            counted = histogram(output) if isinstance(output, Tensor) else None
            if counted:
                found[f"activations/{name or 'model'}"] = counted

        return module.register_forward_hook(note)

    handles = [watch(name, module) for name, module in model.named_modules() if not list(module.children())]
    was_training = model.training
    try:
        model.eval()(inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return found
