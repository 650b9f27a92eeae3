from __future__ import annotations

import torch
from torch import nn

from fedtrain.training.inspection import activations, histogram, weights_and_changes


def test_a_histogram_counts_every_finite_number() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 30.0, torch.nan, torch.inf])
    counted = histogram(values)
    assert counted is not None
    assert (counted.edges[0], counted.edges[-1], len(counted.edges)) == (0.0, 30.0, len(counted.counts) + 1)
    assert counted.counts[:3] == [1, 1, 1]
    assert (sum(counted.counts), counted.total, counted.squares) == (4, 33.0, 905.0)
    assert histogram(torch.tensor([torch.nan])) is None


def test_weights_and_their_changes_are_told_by_name() -> None:
    found = weights_and_changes({"fc.weight": torch.tensor([1.0, 3.0])}, {"fc.weight": torch.tensor([1.0, 1.0])})
    assert found["weights/fc.weight"].total == 4.0
    assert found["changes/fc.weight"].total == 2.0


def test_activations_are_of_each_layer_and_leave_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Sequential(nn.ReLU()))
    found = activations(model.train(), torch.ones(4, 2))
    assert list(found) == ["activations/0", "activations/1", "activations/2.0"]
    assert found["activations/0"] == found["activations/1"]  # dropout rests
    assert model.training
    assert not model[0]._forward_hooks
