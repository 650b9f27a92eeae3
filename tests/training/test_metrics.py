from __future__ import annotations

import math
import re
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor

from fedtrain.data.base import DataSpec
from fedtrain.data.prepare import Moments as Scaling
from fedtrain.errors import InputError, TaskError
from fedtrain.experiment.evaluation import EvaluationSection, MetricName
from fedtrain.records import PERSONAL
from fedtrain.training.metrics import formulas, pooled
from fedtrain.training.metrics.pooled import Counts, PooledMetrics, make_metrics
from fedtrain.training.metrics.statistics import Batch

TABLE = DataSpec((2,), "class", 2, ("age", "sex=Male"))
THREE = DataSpec((2,), "class", 3)
NUMBER = DataSpec((2,), "number")
TOKENS = DataSpec((4,), "tokens", 5)
AVERAGES = ("macro", "micro", "weighted")


def metrics_of(spec: DataSpec, *names: str, **section: Any) -> PooledMetrics:
    return make_metrics(EvaluationSection(metrics=list(names), **section), spec)


def allowed(spec: DataSpec) -> list[str]:
    names = []
    for name in get_args(MetricName):
        try:
            metrics_of(spec, name)
        except InputError:
            continue
        names.append(name)
    return names


def over_clients(metrics: PooledMetrics, cuts: list[int], *rows: Tensor) -> dict[str, Tensor]:
    """The sums that a server has, of clients that hold what lies between the cuts, in batches of 7."""
    total = metrics.blank()
    for part in zip(*(torch.tensor_split(values, sorted(cuts)) for values in rows)):
        counts = Counts(metrics)
        for batch in zip(*(values.split(7) for values in part)):
            if len(batch[0]):
                counts.add(Batch(*batch))
        assert metrics.objection(counts.sums, len(part[0])) is None or not len(part[0])
        total = {name: values + counts.sums[name] for name, values in total.items()}
    return total


splits = st.lists(st.integers(0, 60), max_size=8)
seeds = st.integers(0, 2**32 - 1)


def classes(seed: int, count: int, rows: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    torch_rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(count, (rows,), generator=torch_rng)
    outputs = 3 * torch.randn(rows, 1 if count == 2 else count, generator=torch_rng)
    return torch.randn(rows, 2, generator=torch_rng), outputs, targets


@given(seeds, splits)
@settings(max_examples=40)
def test_pooled_classification_is_that_of_all_rows_together(seed: int, cuts: list[int]) -> None:
    inputs, outputs, targets = classes(seed, 3)
    metrics = metrics_of(THREE, *allowed(THREE))
    sums = over_clients(metrics, cuts, inputs, outputs, targets)
    y, said, p = targets.numpy(), outputs.argmax(1).numpy(), outputs.double().softmax(1).numpy()
    found = metrics.numbers(sums)
    for name, score in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        for average in AVERAGES:
            expected = score(y, said, average=average, zero_division=0)
            assert found[f"{name}-{average}"] == pytest.approx(expected, abs=1e-6)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, said), abs=1e-6)
    assert found["balanced-accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, said), abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(sk.log_loss(y, p, labels=[0, 1, 2])), rel=1e-6)
    assert metrics.confusion(sums) == sk.confusion_matrix(y, said, labels=[0, 1, 2]).tolist()
    area = sk.roc_auc_score(y, p, multi_class="ovr", labels=[0, 1, 2])
    assert abs(found["auroc"] - area) <= found["auroc-bound"] + 1e-9
    precision = np.mean([sk.average_precision_score(y == c, p[:, c]) for c in range(3)])
    assert abs(found["average-precision"] - precision) <= found["average-precision-bound"] + 1e-9


@given(seeds, splits)
@settings(max_examples=40)
def test_pooled_binary_scores_are_within_their_bound(seed: int, cuts: list[int]) -> None:
    inputs, outputs, targets = classes(seed, 2)
    metrics = metrics_of(TABLE, *allowed(TABLE), score_bins=50)
    found = metrics.numbers(over_clients(metrics, cuts, inputs, outputs, targets))
    y, said, z = targets.numpy(), (outputs[:, 0] > 0).long().numpy(), outputs[:, 0].numpy()
    assert found["precision"] == pytest.approx(sk.precision_score(y, said, zero_division=0), abs=1e-6)
    assert found["recall"] == pytest.approx(sk.recall_score(y, said), abs=1e-6)
    assert found["f1"] == pytest.approx(sk.f1_score(y, said), abs=1e-6)
    assert 0 < found["auroc-bound"] < 0.1
    assert abs(found["auroc"] - sk.roc_auc_score(y, z)) <= found["auroc-bound"] + 1e-9
    precision = sk.average_precision_score(y, z)
    assert abs(found["average-precision"] - precision) <= found["average-precision-bound"] + 1e-9


@given(seeds, splits, st.sampled_from([0.0, 100.0]))
@settings(max_examples=40)
def test_pooled_regression_is_that_of_all_rows_together(seed: int, cuts: list[int], mean: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    targets = mean + torch.randn(60, generator=rng)
    outputs = targets + torch.randn(60, generator=rng)
    metrics = metrics_of(NUMBER, *allowed(NUMBER))
    found = metrics.numbers(over_clients(metrics, cuts, torch.zeros(60, 2), outputs, targets))
    t, o = targets.double().numpy(), outputs.double().numpy()
    assert found == pytest.approx(
        {
            "rmse": sk.root_mean_squared_error(t, o),
            "mae": sk.mean_absolute_error(t, o),
            "r2": sk.r2_score(t, o),
            "mape": sk.mean_absolute_percentage_error(t, o),
        },
        abs=1e-6,
        rel=1e-6,
    )


def test_classes_that_are_nowhere_do_not_count() -> None:
    # Class 1 is only predicted, and class 3 neither that nor there: scikit-learn's macro mean is over classes 0 to 2.
    y, said = [0, 0, 2, 2, 2], [0, 1, 2, 2, 0]
    confusion = sk.confusion_matrix(y, said, labels=range(4)).astype(float)
    for average in AVERAGES:
        expected = sk.f1_score(y, said, average=average, zero_division=0)
        assert formulas.f1(confusion, f"-{average}") == pytest.approx(expected)  # type: ignore[arg-type]
        expected = sk.recall_score(y, said, average=average, zero_division=0)
        assert formulas.recall(confusion, f"-{average}") == pytest.approx(expected)  # type: ignore[arg-type]
    assert formulas.balanced_accuracy(confusion) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_scores_in_one_bin_are_counted_half_by_hand() -> None:
    # Bins, low to high: one negative; a positive and a negative; one positive. Of four pairs three are right, and the
    # pair in one bin is half right.
    scores = np.array([[[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]])
    assert formulas.auroc(scores) == (3.5 / 4, 0.5 / 4)
    # Precision 1 at the first, then 2/3 as if equal, 1 or 2/3 in the best or the worst order.
    value, bound = formulas.average_precision(scores)
    assert value == pytest.approx((1 + 2 / 3) / 2)
    assert bound == pytest.approx(1 - (1 + 2 / 3) / 2)


def test_immense_counts_cost_no_memory() -> None:
    scores = np.array([[[1e9, 1.0], [1.0, 1e9]]])
    assert formulas.average_precision(scores)[0] == pytest.approx(1.0)


def test_calibration_error_by_hand() -> None:
    # Confidence 0.6 and 0.7 lie in bins of their own; one of them is right.
    p = torch.tensor([0.6, 0.7], dtype=torch.float64)
    batch = Batch(torch.zeros(2, 2), torch.logit(p)[:, None], torch.tensor([1, 0]))
    counts = Counts(metrics_of(TABLE, "calibration-error"))
    counts.add(batch)
    assert counts.metrics.numbers(counts.sums) == pytest.approx({"calibration-error": (0.4 + 0.7) / 2})
    again = Batch(torch.zeros(1, 2), torch.logit(p[:1])[:, None], torch.tensor([0]))
    counts.add(again)  # the same bin: |1 - 1.2| of two and 0.7 of one
    assert counts.metrics.numbers(counts.sums) == pytest.approx({"calibration-error": (0.2 + 0.7) / 3})


def test_groups_by_hand() -> None:
    inputs = torch.tensor([[0.0, 0.0], [0, 0], [0, 0], [0, 0], [0, 1], [0, 1]])
    targets = torch.tensor([0, 0, 1, 1, 0, 1])
    outputs = torch.tensor([-1.0, 1, 1, -1, -1, 1])[:, None]
    metrics = metrics_of(TABLE, group={"column": "sex=Male"})
    sums = over_clients(metrics, [1, 4], inputs, outputs, targets)
    assert metrics.numbers(sums) == {
        "accuracy-group-0": 0.5,
        "accuracy-group-1": 1.0,
        "parity-difference": 0.0,  # half of each group is said to be 1
        "odds-difference": 0.5,  # of the true 0 and of the true 1: 1/2 and 1/2 against 0 and 1
    }


def test_groups_of_three_classes_by_hand() -> None:
    groups = np.array([[[2.0, 0, 0], [0, 2, 0], [0, 0, 0]], [[2.0, 0, 0], [0, 1, 1], [0, 0, 4]]])
    found = formulas.disparities(groups)
    assert found["parity-difference"] == pytest.approx(5 / 8)  # class 2: never, and 5 of 8
    assert found["odds-difference"] == 0.5  # of class 1; class 2 is in one group only


def test_the_threshold_of_groups_is_in_the_unit_before_scaling() -> None:
    section = EvaluationSection.model_validate({"group": {"column": "sex=Male"}})
    scaling = Scaling(torch.tensor([40.0, 0.9]), torch.tensor([10.0, 0.3]))
    metrics = make_metrics(section, TABLE, scaling)
    raw = torch.tensor([[30.0, 0.0], [50, 1], [40, 1]])
    counts = Counts(metrics)
    counts.add(Batch((raw - scaling.mean) / scaling.std, torch.tensor([[1.0], [1], [1]]), torch.tensor([1, 1, 0])))
    assert counts.sums["groups"].sum(dim=(1, 2)).tolist() == [1, 2]
    one_for_all = Scaling(torch.tensor([0.9]), torch.tensor([0.3]))
    assert make_metrics(section, TABLE, one_for_all).statistics[0].above == pytest.approx(-4 / 3)  # type: ignore[attr-defined]


def test_each_token_is_a_row() -> None:
    metrics = metrics_of(TOKENS, "accuracy", "perplexity")
    counts = Counts(metrics)
    counts.add(Batch(torch.zeros(3, 4), torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.int64)))
    assert counts.metrics.numbers(counts.sums) == pytest.approx({"accuracy": 1.0, "perplexity": 5.0})
    assert metrics.objection(counts.sums, 3) is None


def test_what_is_not_defined_is_left_out() -> None:
    metrics = metrics_of(TABLE, "auroc", "average-precision", "accuracy", group={"column": "age"})
    counts = Counts(metrics)
    assert counts.metrics.numbers(counts.sums) == {}
    counts.add(Batch(torch.zeros(1, 2), torch.zeros(1, 1), torch.tensor([0])))
    assert counts.metrics.numbers(counts.sums) == {"accuracy": 1.0, "accuracy-group-0": 1.0}
    assert metrics.names[:4] == ["auroc", "auroc-bound", "average-precision", "average-precision-bound"]


def test_a_diverged_model_has_scores_that_say_nothing() -> None:
    counts = Counts(metrics_of(TABLE, "auroc"))
    counts.add(Batch(torch.zeros(2, 2), torch.full((2, 1), math.nan), torch.tensor([0, 1])))
    assert counts.metrics.numbers(counts.sums) == {"auroc": 0.5, "auroc-bound": 0.5}


@pytest.mark.parametrize(
    ("spec", "name", "message"),
    [
        (NUMBER, "auroc", "targets that are numbers: got auroc; expected some of rmse, mae, r2, mape"),
        (THREE, "rmse", "targets that are 3 classes: got rmse; expected some of accuracy"),
        (THREE, "f1", "targets that are 3 classes: got f1"),
        (TOKENS, "auroc", "targets that are tokens: got auroc"),
    ],
)
def test_a_metric_that_does_not_suit_the_data_is_refused(spec: DataSpec, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metrics_of(spec, name)


def test_groups_need_a_column_of_a_table_and_classes() -> None:
    with pytest.raises(InputError, match=r"no such feature: got evaluation.group.column = sex_male.*sex=Male"):
        metrics_of(TABLE, group={"column": "sex_male"})
    with pytest.raises(InputError, match=r"evaluation\.group compares groups of rows of a table"):
        metrics_of(NUMBER, group={"column": "age"})


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 3)])
def test_outputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    counts = Counts(metrics_of(THREE, "accuracy"))
    with pytest.raises(TaskError, match="cannot be computed from the model's outputs"):
        counts.add(Batch(torch.zeros(4, 2), torch.zeros(shape), torch.zeros(4, dtype=torch.int64)))


def test_every_name_has_a_formula_and_comes_out_under_its_name() -> None:
    assert set(pooled._KINDS) == set(get_args(MetricName))
    for spec in (TABLE, THREE, NUMBER, TOKENS):
        for name in allowed(spec):
            assert metrics_of(spec, name).names[:1] in ([name], [])


FAIR = {"confusion": torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)}


@pytest.mark.parametrize(
    ("sums", "examples", "why"),
    [
        (FAIR, 2, None),
        (FAIR | {f"{PERSONAL}confusion": FAIR["confusion"]}, 2, None),
        ({}, 0, None),
        ({}, 2, "its sums are none; expected confusion"),
        (FAIR, 0, "its sums are confusion; expected none"),
        (FAIR | {"more": FAIR["confusion"]}, 2, "its sums are confusion, more"),
        (FAIR, 3, "do not count num_examples = 3"),
        ({"confusion": FAIR["confusion"].float()}, 2, "expected float64"),
        ({"confusion": FAIR["confusion"][0]}, 2, r"torch.float64 \(2,\); expected float64 \(2, 2\)"),
        ({"confusion": FAIR["confusion"] * math.nan}, 2, "not finite"),
        ({"confusion": torch.tensor([[2.0, -1], [0, 1]], dtype=torch.float64)}, 2, "hold a negative number"),
    ],
)
def test_sums_that_cannot_be_right(sums: dict[str, Tensor], examples: int, why: str | None) -> None:
    found = metrics_of(TABLE, "accuracy").objection(sums, examples)
    assert found is None if why is None else re.search(why, found or "")


def test_only_a_sum_of_targets_may_be_negative() -> None:
    metrics = metrics_of(NUMBER, "rmse")
    sums = torch.tensor([2.0, -3, 5, 1, 1, 1], dtype=torch.float64)
    assert metrics.objection({"moments": sums}, 2) is None
    sums[3] = -1
    assert metrics.objection({"moments": sums}, 2) == "sums moments hold a negative number; expected counts"
