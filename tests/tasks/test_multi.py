from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.tasks.multi import MultiLabel, MultiTask

PAIRS = DataSpec((4,), "class", 3, class_names=("a/x", "a/y", "b/x"))
SETS = DataSpec((4,), "class", 3, class_names=("rain+wind", "none", "wind"))


class Fixed(nn.Module):
    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor([logits])

    def forward(self, inputs):
        return self.logits


def outputs(task: MultiTask, *logits: float) -> torch.Tensor:
    model = task.model()
    model.network = Fixed(*logits)
    return model(None)


def test_the_loss_is_the_weighted_sum_of_the_tasks_cross_entropies():
    # P(a) = 3/4 and P(x) = 1/5
    task = MultiTask(PAIRS, weights=[1.0, 0.5])
    found = outputs(task, math.log(3), 0.0, 0.0, math.log(4))
    expected = [-math.log(3 / 4) - 0.5 * math.log(p) for p in (1 / 5, 4 / 5)] + [
        -math.log(1 / 4) - 0.5 * math.log(1 / 5)
    ]
    losses = task.loss(found.expand(3, -1), torch.arange(3))
    assert losses.tolist() == pytest.approx(expected)
    metrics = {name: metric(found, torch.tensor([0])).item() for name, metric in task.metrics().items()}
    assert metrics == {"accuracy": 0.0, "accuracy_task1": 1.0, "accuracy_task2": 0.0}  # the likeliest is a/y


def test_uncertainty_is_learned_beside_the_weights():
    task = MultiTask(PAIRS, names=["first", "second"], weights="uncertainty")
    model = task.model()
    model.network = Fixed(math.log(3), 0.0, 0.0, math.log(4))
    with torch.no_grad():
        model.log_variances.copy_(torch.tensor([math.log(2), 0.0]))
    loss = task.loss(model(None), torch.tensor([0]))
    assert loss.item() == pytest.approx(-math.log(3 / 4) / 2 + math.log(2) / 2 - math.log(1 / 5))
    (gradient,) = torch.autograd.grad(loss.sum(), [model.log_variances])
    assert gradient.tolist() == pytest.approx([math.log(3 / 4) / 2 + 0.5, math.log(1 / 5) + 0.5])


def test_labels_are_tasks_of_their_own():
    task = MultiLabel(SETS)
    assert task.labels == ("rain", "wind")
    found = outputs(task, 0.0, math.log(3), 0.0, math.log(4))  # rain 3/4, wind 4/5
    assert found.exp()[0].tolist() == pytest.approx([3 / 4 * 4 / 5, 1 / 4 * 1 / 5, 1 / 4 * 4 / 5])
    metrics = {name: metric(found, torch.tensor([2])).item() for name, metric in task.metrics().items()}
    assert metrics == {"accuracy": 0.0, "missed": 0.0, "wrong": 0.5}  # rain and wind, where there is wind alone
    assert task.metrics()["missed"](outputs(task, 1.0, 0.0, 1.0, 0.0), torch.tensor([0])).item() == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["one"]}, "'names' is wrong"),
        ({"weights": [1.0]}, "'weights' is wrong"),
        ({"weights": [1.0, -1.0]}, "'weights' is wrong"),
        ({"weights": "uncertain"}, '"uncertainty"'),
        ({"separator": "+"}, "classes of two or more parts"),
        ({"network": "mpl"}, "Did you mean mlp"),
        ({"network_options": {"hiden": 3}}, "'network_options' is wrong"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(TaskError, match=message):
        MultiTask(PAIRS, **options)


def test_one_label_is_not_several():
    with pytest.raises(TaskError, match="needs two or more labels"):
        MultiLabel(DataSpec((4,), "class", 2, class_names=("none", "rain")))
