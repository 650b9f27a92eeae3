from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtrain.data.base import DataSpec
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.clustering import KMeans


def step(task: KMeans, model, inputs: torch.Tensor, rate: float) -> None:
    (gradient,) = torch.autograd.grad(task.batch_loss(model, inputs, None).mean(), [model.centroids])
    with torch.no_grad():
        model.centroids -= rate * gradient


def test_a_hard_step_is_one_of_lloyd():
    task = KMeans(DataSpec((1,), "number"), clusters=2, softness=0)
    model = task.model()
    with torch.no_grad():
        model.centroids.copy_(torch.tensor([[0.0], [10.0]]))
    inputs = torch.tensor([[1.0], [3.0], [7.0], [8.0]])
    assert task.loss(model(inputs), None).tolist() == [1.0, 9.0, 9.0, 4.0]
    step(task, model, inputs, 1.0)
    assert model.centroids.tolist() == [[2.0], [7.5]]


def test_every_centroid_is_pulled_by_a_soft_assignment():
    task = KMeans(DataSpec((1,), "number"), clusters=2)
    model = task.model()
    with torch.no_grad():
        model.centroids.copy_(torch.tensor([[0.0], [1.5]]))
    step(task, model, torch.tensor([[-1.0], [0.5]]), 0.5)
    assert model.centroids[1] < 1.5


@pytest.mark.parametrize("seed", range(3))
def test_blobs_are_found_as_sklearn_finds_them(seed):
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(1)
    centres = rng.uniform(-1, 1, (5, 6))
    labels = np.arange(500) % 5
    points = centres[labels] + 0.15 * rng.standard_normal((500, 6))
    inputs = torch.tensor((points - points.mean(0)) / points.std(0), dtype=torch.float32)
    expected = cluster.KMeans(5, n_init=10, random_state=0).fit(inputs.numpy()).inertia_ / 500
    with global_torch_seed(seed):
        task = KMeans(DataSpec((6,), "class", 5), clusters=5)
        model = task.model()
    for number in range(200):
        step(task, model, inputs[number % 5 * 100 :][:100], 0.2)
    distances = model(inputs).detach()
    assert task.loss(distances, None).mean() < 1.05 * expected
    found = distances.argmin(1).numpy()
    assert sum(np.bincount(labels[found == c]).max() for c in set(found)) / 500 > 0.97
