from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec, Examples
from fedtrain.experiment.evaluation import EvaluationSection
from fedtrain.tasks.base import Metric
from fedtrain.training.evaluation import evaluate, weighted_mean
from fedtrain.training.metrics.pooled import Counts, make_metrics

EXAMPLES = Examples(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0.0, 2.0, 2.0]))


class Squares:
    def model(self) -> nn.Module:
        return nn.Identity()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets) ** 2

    def metrics(self) -> Mapping[str, Metric]:
        return {
            "off": lambda outputs, targets: (outputs[:, 0] - targets).abs(),
            "hit": lambda outputs, targets: outputs[:, 0] == targets,
        }


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_means_over_examples_by_hand_whatever_the_batches(batch_size: int) -> None:
    # Errors 1, 0 and 2. Two batches of two and one have mean losses 0.5 and 4: their mean, 2.25, would be wrong.
    means = evaluate(nn.Identity(), Squares(), EXAMPLES, batch_size)
    assert means == pytest.approx({"loss": 5 / 3, "off": 1.0, "hit": 1 / 3})


def test_no_examples_have_no_means() -> None:
    nothing = Examples(EXAMPLES.inputs[:0], EXAMPLES.targets[:0])
    assert evaluate(nn.Identity(), Squares(), nothing, 10) == {}


def test_layers_that_differ_in_training_are_measured_as_in_use() -> None:
    model = nn.Dropout(1.0).train()
    assert evaluate(model, Squares(), EXAMPLES, 10)["loss"] == pytest.approx(5 / 3)


@pytest.mark.parametrize("batch_size", [1, 101])
def test_many_small_losses_are_not_lost_in_a_large_sum(batch_size: int) -> None:
    # In float32, 1e8 + 1 is 1e8.
    examples = Examples(torch.tensor([[1e4], *[[1.0]] * 100]), torch.zeros(101))
    assert evaluate(nn.Identity(), Squares(), examples, batch_size)["loss"] == (1e8 + 100) / 101


def test_weighted_mean_by_hand() -> None:
    assert weighted_mean([({"loss": 1.0}, 1), ({"loss": 5.0}, 3)]) == {"loss": 4.0}


def test_a_name_counts_where_it_occurs() -> None:
    assert weighted_mean([({"loss": 1.0, "r2": 0.5}, 1), ({"loss": 3.0}, 1)]) == {"loss": 2.0, "r2": 0.5}


def test_without_weight_there_is_no_mean() -> None:
    assert weighted_mean([({"loss": 1.0}, 0)]) == {}
    assert weighted_mean([]) == {}


def test_counts_take_in_all_batches_and_begin_anew() -> None:
    examples = Examples(EXAMPLES.inputs, EXAMPLES.targets)
    counts = Counts(make_metrics(EvaluationSection(metrics=["rmse", "mae"]), DataSpec((1,), "number")))
    for _ in range(2):
        means = evaluate(nn.Identity(), Squares(), examples, 2, counts)
        assert means.keys() == {"loss", "off", "hit"}
        assert counts.metrics.numbers(counts.sums) == pytest.approx({"rmse": (5 / 3) ** 0.5, "mae": 1.0})
        assert counts.sums["moments"][0] == 3
