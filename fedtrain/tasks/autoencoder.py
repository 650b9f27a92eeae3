"""Tasks that learn what inputs look like: an autoencoder that finds anomalies, and a variational one that generates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.tasks.base import Metric
from fedtrain.tasks.checks import positive_int, widths
from fedtrain.tasks.networks import finite_number, needs_float_inputs

__all__ = ["Autoencoder", "Vae"]

_TINY = 1e-12  # keeps the logarithm of a perfect reconstruction finite


class Autoencoder:
    """Autoencoder of dense layers; what it reconstructs badly is an anomaly. Targets are not used in training.

    The model gives `(B, 1)`: the logarithm of the reconstruction error over `threshold`. So it is a logit of class 1,
    "anomalous", for data with the two classes normal and anomalous, and every measure of a binary classifier applies.

    Args:
        spec: features or images.
        hidden: widths of the encoder's layers; the decoder mirrors them.
        code: width of the code between them.
        threshold: mean squared error, in the inputs' own unit, above which a row counts as anomalous. 1 is the error
            of a model that knows the mean alone, where inputs are scaled to deviation 1.

    References:
        Hinton, Salakhutdinov, Reducing the Dimensionality of Data with Neural Networks, Science 2006.
    """

    def __init__(
        self, spec: DataSpec, hidden: int | Sequence[int] = (64,), code: int = 8, threshold: float = 1.0
    ) -> None:
        needs_float_inputs("autoencoder", spec)
        self.spec = spec
        self.hidden, self.code = widths("hidden", hidden), positive_int("code", code)
        self.threshold = finite_number("threshold", threshold, least=_TINY)
        two = spec.target == "class" and spec.num_classes == 2
        self.output_names = () if two else ("log(error / threshold)",)

    def model(self) -> nn.Module:
        """Encoder and decoder; `(B, 1)` logarithm of the error over the threshold."""
        sizes = [math.prod(self.spec.input_shape), *self.hidden, self.code]
        return _Reconstruction(_dense(sizes), _dense(sizes[::-1]), self.threshold)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of each example's reconstruction: `(B,)`."""
        return outputs[:, 0].exp() * self.threshold

    def metrics(self) -> Mapping[str, Metric]:
        """`flagged`: fraction of examples whose error is above the threshold."""
        return {"flagged": _flagged}


class Vae:
    """Variational autoencoder of dense layers with a Gaussian likelihood. Targets are not used.

    A training step samples one code per example, from torch's global generator; a measurement takes the code's mean.
    `model.decoder` makes an input of a code: of `torch.randn(count, code)` a new one.

    Args:
        spec: features or images.
        hidden: widths of the encoder's layers; the decoder mirrors them.
        code: width of the code between them.
        variance: of the likelihood, in the inputs' unit squared: the smaller, the more the reconstruction counts.

    References:
        Kingma, Welling, Auto-Encoding Variational Bayes, ICLR 2014.
    """

    output_names = ("reconstruction", "kl")

    def __init__(
        self, spec: DataSpec, hidden: int | Sequence[int] = (128,), code: int = 8, variance: float = 1.0
    ) -> None:
        needs_float_inputs("vae", spec)
        self.spec = spec
        self.hidden, self.code = widths("hidden", hidden), positive_int("code", code)
        self.variance = finite_number("variance", variance, least=_TINY)

    def model(self) -> nn.Module:
        """Encoder and decoder; `(B, 2)`: the two parts of the loss."""
        sizes = [math.prod(self.spec.input_shape), *self.hidden]
        return _Variational(_dense([*sizes, 2 * self.code]), _dense([self.code, *sizes[::-1]]), self.variance)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative evidence lower bound of each example in nats, without the likelihood's constant: `(B,)`."""
        return outputs.sum(1)

    def metrics(self) -> Mapping[str, Metric]:
        """`reconstruction` and `kl`, whose sum is the loss."""
        return {"reconstruction": _first, "kl": _second}


class _Reconstruction(nn.Module):
    def __init__(self, encoder: nn.Module, decoder: nn.Module, threshold: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.threshold = encoder, decoder, threshold

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        error = (flat - self.decoder(self.encoder(flat))).square().mean(1, keepdim=True)
        score: Tensor = (error / self.threshold + _TINY).log()
        return score


class _Variational(nn.Module):
    def __init__(self, encoder: nn.Module, decoder: nn.Module, variance: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.variance = encoder, decoder, variance

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        mean, log_variance = self.encoder(flat).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        error = (flat - self.decoder(code)).square().sum(1) / (2 * self.variance)
        # appendix B: the divergence of a Gaussian from the standard one
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        return torch.stack([error, divergence], 1)


def _dense(sizes: Sequence[int]) -> nn.Sequential:
    """Stack linear layers fc1, fc2, ... of the given widths, with ReLU between them."""
    layers = nn.Sequential()
    for number, (width_in, width_out) in enumerate(pairwise(sizes), start=1):
        if number > 1:
            layers.add_module(f"relu{number - 1}", nn.ReLU())
        layers.add_module(f"fc{number}", nn.Linear(width_in, width_out))
    return layers


def _flagged(outputs: Tensor, _: Tensor) -> Tensor:
    return (outputs[:, 0] > 0).float()


def _first(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs[:, 0]


def _second(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs[:, 1]
