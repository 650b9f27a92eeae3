"""Self-supervised learning: an encoder is trained by comparing views, and a linear layer is put on it afterwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.tasks.base import Metric
from fedtrain.tasks.checks import needs_classes, positive_int
from fedtrain.tasks.networks import build_network, finite_number, needs_float_inputs
from fedtrain.tasks.objectives import Classification, num_outputs
from fedtrain.tasks.views import random_view

__all__ = ["Contrastive", "Probe"]


class Contrastive:
    """Contrastive pre-training: two views of an example are to be more alike than views of others in its batch.

    The model gives `(B, 2, projection)`: what it makes of two views of each example. They are random in training; for
    a measurement they come from a fixed seed, so that it gives the same number each time. Targets are not used.

    Args:
        spec: features in standard units, or images.
        network: the encoder, as one of the classifiers.
        network_options: the encoder's options, such as { hidden = [64] }.
        width: outputs of the encoder, which `probe` builds on; 3 or more.
        projection: width of the space in which views are compared.
        temperature: divides the cosines; the smaller, the more the nearest others count.

    References:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020.
    """

    def __init__(
        self,
        spec: DataSpec,
        network: str = "mlp",
        network_options: Mapping[str, Any] | None = None,
        width: int = 64,
        projection: int = 32,
        temperature: float = 0.5,
    ) -> None:
        needs_float_inputs("contrastive", spec)
        self.encoder = _Encoder("contrastive", spec, network, network_options, width)
        self.channels_last = self.encoder.channels_last
        self.projection = positive_int("projection", projection)
        self.output_names = tuple(f"z{number}" for number in range(1, self.projection + 1))
        self.temperature = finite_number("temperature", temperature, least=0.01)

    def model(self) -> nn.Module:
        """`encoder` and `projection`; `(B, 2, projection)`."""
        return _TwoViews(self.encoder.build(), nn.Linear(self.encoder.width, self.projection))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """NT-Xent of each example within its batch, in nats, mean over its two views: `(B,)`."""
        views = F.normalize(outputs.transpose(0, 1).flatten(0, 1), dim=1)
        others = (views @ views.T / self.temperature).fill_diagonal_(-torch.inf)
        partner = torch.arange(len(views), device=views.device).roll(len(outputs))
        return F.cross_entropy(others, partner, reduction="none").view(2, -1).mean(0)

    def batch_loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss; as a hook, because it mixes the examples of a batch."""
        return self.loss(model(inputs), targets)

    def metrics(self) -> Mapping[str, Metric]:
        """`matched`: fraction of examples whose other view is the nearest of all views in the batch."""
        return {"matched": _matched}


class Probe(Classification):
    """Linear classifier on the encoder of a `contrastive` run, which [model] start loads and freeze holds.

    Args:
        spec: the data of that run, with classes.
        network: as in that run.
        network_options: as in that run.
        width: as in that run.
    """

    def __init__(
        self,
        spec: DataSpec,
        network: str = "mlp",
        network_options: Mapping[str, Any] | None = None,
        width: int = 64,
    ) -> None:
        needs_classes("probe", spec)
        self.spec = spec
        self.encoder = _Encoder("probe", spec, network, network_options, width)
        self.channels_last = self.encoder.channels_last

    def model(self) -> nn.Module:
        """`encoder` and `head`; `(B, classes)` logits, or `(B, 1)` for two classes."""
        head = nn.Linear(self.encoder.width, num_outputs(self.spec))
        return nn.Sequential(OrderedDict(encoder=self.encoder.build(), relu=nn.ReLU(), head=head))


class _Encoder:
    """What both tasks build their models on."""

    def __init__(self, task: str, spec: DataSpec, name: str, options: Mapping[str, Any] | None, width: int) -> None:
        self.width = positive_int("width", width)
        if width < 3:
            raise TaskError(f"the task option 'width' of {task} is wrong", got=width, expected="3 or more")
        self._task = build_network(name, spec, width, options)
        self.channels_last: bool = getattr(self._task, "channels_last", False)

    def build(self) -> nn.Module:
        return self._task.model()


class _TwoViews(nn.Module):
    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, inputs: Tensor) -> Tensor:
        fixed = None if self.training else torch.Generator(inputs.device).manual_seed(0)
        views = torch.cat([random_view(inputs, fixed), random_view(inputs, fixed)])
        projected: Tensor = self.projection(F.relu(self.encoder(views)))
        return projected.view(2, len(inputs), -1).transpose(0, 1)


def _matched(outputs: Tensor, _: Tensor) -> Tensor:
    first, second = F.normalize(outputs, dim=2).unbind(1)
    return ((first @ second.T).argmax(1) == torch.arange(len(first), device=first.device)).float()
