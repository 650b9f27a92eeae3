from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.tasks.semi import PseudoLabel

SPEC = DataSpec((2,), "class", 3, class_names=("no", "unlabelled", "yes"))


class Fixed(nn.Module):
    """The same logits for every example: 1/10 no, 1/2 unlabelled, 4/10 yes."""

    def forward(self, inputs):
        return torch.tensor([0.1, 0.5, 0.4]).log().expand(len(inputs), 3)


def test_sure_guesses_stand_in_for_labels():
    inputs, targets = torch.zeros(4, 2), torch.tensor([0, 1, 1, 2])
    task = PseudoLabel(SPEC, threshold=0.8, weight=2.0)
    given = task.relabel(Fixed(), inputs, targets)
    # Of the labels, yes has 8/10: a guess at the class 2, after the three classes.
    assert given.tolist() == [0, 5, 5, 2]
    losses = task.loss(Fixed()(inputs), given)
    guess = -2.0 * math.log(0.4)
    assert losses.tolist() == pytest.approx([-math.log(0.1), guess, guess, -math.log(0.4)])


def test_what_the_model_is_not_sure_of_adds_nothing():
    task, targets = PseudoLabel(SPEC, threshold=0.81), torch.tensor([0, 1, 2])
    given = task.relabel(Fixed(), torch.zeros(3, 2), targets)
    assert given.tolist() == [0, 1, 2]
    assert task.loss(Fixed()(torch.zeros(3, 2)), given)[1] == 0


def test_what_has_no_label_has_no_loss_where_it_is_measured():
    task = PseudoLabel(SPEC)
    assert task.loss(Fixed()(torch.zeros(2, 2)), torch.tensor([1, 2])).tolist() == pytest.approx([0, -math.log(0.4)])


def test_data_without_such_a_class_are_refused():
    with pytest.raises(TaskError, match="Did you mean unlabelled"):
        PseudoLabel(SPEC, unlabelled="unlabeled")
    with pytest.raises(TaskError, match="two classes beside that of no label"):
        PseudoLabel(DataSpec((2,), "class", 2, class_names=("no", "unlabelled")))
    with pytest.raises(TaskError, match=r"'threshold' is wrong: got 1\.5"):
        PseudoLabel(SPEC, threshold=1.5)
