"""The Task protocol: what a user writes to bring an own problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["Metric", "Task"]

Metric = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> (B,) float: one value per example. Its mean over examples is what is reported, which is why it
can be added up exactly across batches and clients."""


@runtime_checkable
class Task(Protocol):
    """A model, its loss and its metrics.

    A task's class is called as `YourTask(spec, **options)`: `spec` is the `fedtrain.data.base.DataSpec` of the data,
    the options are `[task] options` of the experiment file.

    It may have three members more. `batch_loss(model, inputs, targets) -> (B,)` is the training hook: what a step
    minimises in place of `loss(model(inputs), targets)`, where that needs the model more than once, other inputs or an
    environment. It draws on torch's global generator, which the training loop has seeded; measurements go on with
    `loss` and `metrics`. `relabel(model, inputs, targets) -> targets` gives a client's examples the targets of a
    training, from the model that it starts from. `output_names`, a tuple of texts, says that the model's outputs do
    not predict the target.
    """

    def model(self) -> nn.Module:
        """Build the model with torch's random initialisation, which fedtrain seeds; the same names every time."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example: `(B,)`, unreduced."""

    def metrics(self) -> Mapping[str, Metric]:
        """Named metrics, each a mean over examples; `accuracy` and `r2` grow with a better model, others shrink."""
