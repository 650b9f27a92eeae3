"""Fully connected models: logistic regression, the multi-layer perceptron and the regressor."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.tasks.checks import needs_classes, needs_numbers, widths
from fedtrain.tasks.dropout import chance, dropout_layer
from fedtrain.tasks.objectives import Classification, Regression, num_outputs

__all__ = ["Logistic", "Mlp", "Regressor"]


class Logistic(Classification):
    """Logistic regression; inputs of any shape are flattened.

    Args:
        spec: data with a class to predict.
    """

    def __init__(self, spec: DataSpec) -> None:
        needs_classes("logistic", spec)
        self.spec = spec

    def model(self) -> nn.Module:
        """One linear layer; `(B, classes)` logits, or `(B, 1)` for two classes."""
        return _perceptron(self.spec, (), num_outputs(self.spec))


class Mlp(Classification):
    """Multi-layer perceptron with ReLU; inputs of any shape are flattened.

    Args:
        spec: data with a class to predict.
        hidden: widths of the hidden layers; two of 200 are the "2NN".
        dropout: chance that training leaves out a hidden unit (Srivastava et al. 2014).

    References:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
    """

    def __init__(self, spec: DataSpec, hidden: int | Sequence[int] = (200, 200), dropout: float = 0.0) -> None:
        needs_classes("mlp", spec)
        self.spec = spec
        self.hidden = widths("hidden", hidden)
        self.dropout = chance(dropout)

    def model(self) -> nn.Module:
        """Linear layers with ReLU between them; `(B, classes)` logits, or `(B, 1)` for two classes."""
        return _perceptron(self.spec, self.hidden, num_outputs(self.spec), self.dropout)


class Regressor(Regression):
    """Multi-layer perceptron that predicts a number; inputs of any shape are flattened.

    It predicts in target units. Given the targets' mean and deviation, the network itself works in standard
    units and the loss is measured in them; the mean absolute and squared errors stay in target units.

    Args:
        spec: data with a number to predict.
        hidden: widths of the hidden layers; an empty list is linear regression.
        target_mean: typical mean of the targets, in their unit.
        target_std: typical deviation of the targets, in their unit; above 0.
    """

    def __init__(
        self,
        spec: DataSpec,
        hidden: int | Sequence[int] = (64, 64),
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> None:
        needs_numbers("regressor", spec)
        self.spec = spec
        self.hidden = widths("hidden", hidden)
        self.target_mean = _finite("target_mean", target_mean)
        self.target_std = _finite("target_std", target_std)
        if self.target_std <= 0:
            raise TaskError("the task option 'target_std' is wrong", got=target_std, expected="a number above 0")

    def model(self) -> nn.Module:
        """Linear layers with ReLU between them; `(B,)` predictions in target units."""
        network = _perceptron(self.spec, self.hidden, 1)
        network.add_module("units", _TargetUnits(self.target_mean, self.target_std))
        return network


class _TargetUnits(nn.Module):
    """Standard units `(B, 1)` to target units `(B,)`."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, standard: Tensor) -> Tensor:
        return standard[:, 0] * self.std + self.mean


def _perceptron(spec: DataSpec, hidden: Sequence[int], outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Stack linear layers fc1, fc2, ... of the given widths, with ReLU and dropout between them."""
    sizes = [math.prod(spec.input_shape), *hidden, outputs]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (width_in, width_out) in enumerate(pairwise(sizes), start=1):
        if number > 1:
            layers[f"relu{number - 1}"] = nn.ReLU()
            layers |= dropout_layer(f"dropout{number - 1}", dropout)
        layers[f"fc{number}"] = nn.Linear(width_in, width_out)
    return nn.Sequential(layers)


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TaskError(f"the task option {name!r} is wrong", got=value, expected="a finite number")
    return float(value)
