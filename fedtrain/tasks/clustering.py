"""Federated k-means."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.tasks.base import Metric
from fedtrain.tasks.checks import positive_int
from fedtrain.tasks.networks import finite_number, needs_float_inputs

__all__ = ["KMeans"]


class KMeans:
    """k-means whose centroids are the model; targets are not used.

    A step of gradient descent moves each centroid towards the mean of its rows. With all clients, whole batches and one
    step a round, the mean of the clients' steps is the step on all rows together. With softness 0 it rests where
    Lloyd's algorithm does, and at a rate of 1 a step takes the centroid of 1 / clusters of the rows to their mean.
    Centroids start close together, and each row pulls a little at those that are not its nearest: else a centroid that
    is nobody's nearest would never move.

    Args:
        spec: features in standard units, or images.
        clusters: how many; 2 or more.
        softness: of the assignment in training, as a share of the batch's mean squared distance to all centroids.
        centre: mean of the first centroids, in the inputs' unit.
        spread: their deviation, in the inputs' unit.

    References:
        Bottou, Bengio, Convergence Properties of the K-Means Algorithms, NIPS 1995.
        Rose, Deterministic Annealing for Clustering, Proceedings of the IEEE 1998 (soft assignment).
    """

    def __init__(
        self, spec: DataSpec, clusters: int = 8, softness: float = 0.1, centre: float = 0.0, spread: float = 0.2
    ) -> None:
        needs_float_inputs("kmeans", spec)
        self.features = math.prod(spec.input_shape)
        self.clusters = positive_int("clusters", clusters)
        self.softness = finite_number("softness", softness, least=0)
        self.centre, self.spread = finite_number("centre", centre), finite_number("spread", spread, least=0)
        self.output_names = tuple(f"distance{number}" for number in range(1, clusters + 1))

    def model(self) -> nn.Module:
        """`centroids`, `(clusters, features)`; `(B, clusters)` squared distances."""
        return _Distances(self.centre + self.spread * torch.randn(self.clusters, self.features))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared distance to the nearest centroid: `(B,)`; its mean is the inertia per row."""
        return outputs.amin(1)

    def batch_loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """`clusters / 2` times the distance to the nearest centroid, or to all by a soft minimum: `(B,)`."""
        distances = model(inputs)
        temperature = self.softness * distances.detach().mean()
        if temperature > 0:
            nearest: Tensor = -temperature * torch.logsumexp(-distances / temperature, 1)
        else:
            nearest = self.loss(distances, targets)
        return nearest * (self.clusters / 2)

    def metrics(self) -> Mapping[str, Metric]:
        """None: the loss says all."""
        return {}


class _Distances(nn.Module):
    def __init__(self, centroids: Tensor) -> None:
        super().__init__()
        self.centroids = nn.Parameter(centroids)

    def forward(self, inputs: Tensor) -> Tensor:
        distances: Tensor = (inputs.flatten(1)[:, None] - self.centroids).square().sum(2)
        return distances
