from __future__ import annotations

import math

import pytest
import torch

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.contrastive import Contrastive, Probe
from fedtrain.tasks.views import random_view

SPEC = DataSpec((1, 8, 8), "class", 10)


def test_nt_xent_by_hand():
    task = Contrastive(SPEC, temperature=0.5)
    outputs = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, -3.0]]])
    # Cosines of the first example: 1 with its other view, 0 with both of the second; of that: -1, and 0 twice.
    expected = [-math.log(math.e**2 / (math.e**2 + 2)), -math.log(math.e**-2 / (math.e**-2 + 2))]
    assert task.loss(outputs, None).tolist() == pytest.approx(expected)
    assert task.metrics()["matched"](outputs, None).tolist() == [1.0, 0.0]


def test_views_are_random_in_training_and_fixed_where_they_are_measured():
    model, inputs = Contrastive(SPEC).model(), torch.rand(3, 1, 8, 8)
    assert not torch.equal(model.train()(inputs), model(inputs))
    assert torch.equal(model.eval()(inputs), model(inputs))
    assert model(inputs).shape == (3, 2, 32)


def test_views_of_an_example_become_alike():
    inputs = (torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    task = Contrastive(SPEC, network_options={"hidden": [64]})
    with global_torch_seed(2):
        model = task.model().train()
        before = task.loss(model(inputs), None).mean()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        for _ in range(150):
            optimizer.zero_grad()
            task.batch_loss(model, inputs, None).mean().backward()
            optimizer.step()
        assert task.loss(model(inputs), None).mean() < before - 0.5


def test_a_probe_has_the_encoder_of_the_pre_training():
    encoder, probe = (build(SPEC, network="cnn", width=16).model().state_dict() for build in (Contrastive, Probe))
    shared = {name: t.shape for name, t in encoder.items() if name.startswith("encoder.")}
    assert shared.items() <= {name: t.shape for name, t in probe.items()}.items()
    assert [name for name in probe if name not in shared] == ["head.weight", "head.bias"]


def test_an_image_moves_by_whole_pixels():
    image = 100 + torch.arange(64.0).view(1, 1, 8, 8)
    with global_torch_seed(3):
        views = random_view(image.expand(200, -1, -1, -1))[:, 0, 4]
    kept = views[(views[:, 4] > 50) & (views[:, 5] > 50)].round()  # the others are erased there
    assert {int(value) - 100 for value in kept[:, 4]} == {row * 8 + column for row in (3, 4, 5) for column in (3, 4, 5)}
    assert torch.equal(kept[:, 5] - kept[:, 4], torch.ones(len(kept)))


def test_a_view_hides_a_part():
    with global_torch_seed(3):
        features = random_view(torch.full((200, 10), 5.0))
        images = random_view(torch.full((20, 3, 10, 10), 5.0))
    assert (features == 0).float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert ((images.abs() < 1).flatten(1).sum(1) == 3 * 4 * 4).all()


def test_a_width_that_would_be_a_binary_classifier_is_refused():
    with pytest.raises(TaskError, match="'width' of probe is wrong: got 2; expected 3 or more"):
        Probe(SPEC, width=2)
