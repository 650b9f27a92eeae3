"""Semi-supervised learning: most examples have no label, and the model's own sure guesses stand in for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError, nearest
from fedtrain.tasks.checks import needs_classes
from fedtrain.tasks.networks import build_network, finite_number
from fedtrain.tasks.objectives import Classification

__all__ = ["PseudoLabel"]


class PseudoLabel(Classification):
    """Classifier that also learns from examples without a label, which are those of the class `unlabelled`.

    At the start of a client's round the server's model guesses at them (before personal training and fine-tuning: the
    client's own), and in that round its sure guesses are their labels. The server's model has seen the labels of all
    clients, and errs less than one that a client trains on its own few. Examples of which it is not sure add nothing.

    Args:
        spec: data with a class to predict, one class of which means that there is no label.
        unlabelled: name of that class.
        network: the classifier, by the name of its task.
        network_options: its options, such as { hidden = [64] }.
        threshold: least probability at which a guess counts as a label; 0 to 1.
        weight: of an example with a guessed label, against 1 for a given one.

    References:
        Lee, Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method, ICML workshop 2013.
        Diao, Ding, Tarokh, SemiFL: Semi-Supervised Federated Learning for Unlabeled Clients with Alternate Training,
        NeurIPS 2022 (the server's model guesses).
    """

    def __init__(
        self,
        spec: DataSpec,
        unlabelled: str = "unlabelled",
        network: str = "mlp",
        network_options: Mapping[str, Any] | None = None,
        threshold: float = 0.95,
        weight: float = 1.0,
    ) -> None:
        needs_classes("pseudo-label", spec)
        if unlabelled not in spec.class_names:
            raise TaskError(
                "no class of the data means that there is no label",
                got=unlabelled,
                expected=f"one of the classes {', '.join(spec.class_names)}",
                hint=nearest(unlabelled, spec.class_names, otherwise="Name it in the task option 'unlabelled'"),
            )
        if spec.num_classes < 3:
            raise TaskError("task 'pseudo-label' needs two classes beside that of no label", got=spec.num_classes)
        self._network = build_network(network, spec, spec.num_classes, network_options)
        self.channels_last: bool = getattr(self._network, "channels_last", False)
        self.unlabelled = spec.class_names.index(unlabelled)
        self._classes = spec.num_classes
        self.threshold = finite_number("threshold", threshold, least=0, most=1)
        self.weight = finite_number("weight", weight, least=0)

    def model(self) -> nn.Module:
        """The network; `(B, classes)` logits, the class of no label included, which it learns never to predict."""
        return self._network.model()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each example in nats, times `weight` for a guessed label and 0 for none: `(B,)`."""
        guessed = targets >= self._classes
        weights = torch.where(guessed, self.weight, (targets != self.unlabelled).to(outputs.dtype))
        return super().loss(outputs, targets - self._classes * guessed) * weights

    def relabel(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Give the class guessed, plus the number of classes, to each unlabelled example of which the model is sure.

        Args:
            model: that the training starts from.
            inputs: `(B, *input_shape)`.
            targets: `(B,)` classes.

        Returns:
            Targets for `loss`: `(B,)`.
        """
        no_label = torch.tensor(self.unlabelled, device=inputs.device)
        logits = model(inputs).index_fill(1, no_label, -torch.inf)
        probability, guess = logits.softmax(1).max(1)
        sure = (targets == self.unlabelled) & (probability >= self.threshold)
        return torch.where(sure, guess + self._classes, targets)
