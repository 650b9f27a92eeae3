from __future__ import annotations

import pytest
import torch
from torch import nn

from fedtrain.experiment.losses import PenaltySection
from fedtrain.training.penalty import penalized


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("l1", [0.0, 0.3])
@pytest.mark.parametrize("l2", [0.0, 0.7])
def test_the_gradient_is_that_of_the_penalty_written_out(l1, l2):
    model = network()
    params = dict(model.named_parameters())
    inputs = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        return model(inputs).square().mean()

    gradients = torch.autograd.grad(loss(), list(params.values()))
    weights = [params["0.weight"], params["3.weight"]]  # neither biases nor the normalisation
    whole = loss() + sum(l1 * w.abs().sum() + l2 / 2 * w.square().sum() for w in weights)
    expected = torch.autograd.grad(whole, list(params.values()))
    before = [g.clone() for g in gradients]
    found = penalized(PenaltySection(l1=l1, l2=l2), params, gradients)
    torch.testing.assert_close(list(found), list(expected))
    assert all(torch.equal(g, b) for g, b in zip(gradients, before, strict=True))


def test_no_penalty_leaves_the_gradients_themselves():
    model = network()
    gradients = [torch.ones_like(p) for p in model.parameters()]
    assert penalized(PenaltySection(), dict(model.named_parameters()), gradients) is gradients


def test_biases_alone_are_left_as_they_are():
    gradients = [torch.ones(3)]
    assert penalized(PenaltySection(l1=1.0), {"bias": torch.full((3,), 2.0)}, gradients) is gradients
