from __future__ import annotations

import pickle
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from sklearn.metrics import hinge_loss, mean_pinball_loss

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.experiment.losses import CurriculumSection, LossSection
from fedtrain.experiment.sections import Experiment
from fedtrain.tasks import Classification, NextToken, Regression
from fedtrain.tasks.adapted import experiment_task
from fedtrain.tasks.dense import Regressor
from fedtrain.tasks.losses import Loss, check_balance, load_score, make_loss

TWO = DataSpec((3,), "class", 2)
FOUR = DataSpec((3,), "class", 4)
NUMBER = DataSpec((3,), "number")
TOKENS = DataSpec((5,), "tokens", 7)
TASKS = {"class": Classification(), "number": Regression(), "tokens": NextToken()}


def loss(spec: DataSpec, task: object = None, base: Path = Path(), **section: object) -> Loss:
    parsed = TypeAdapter(LossSection).validate_python(section)
    return make_loss(parsed, task or TASKS[spec.target], spec, base)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def labels(classes: int, *shape: int) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(4))


def test_no_section_leaves_the_tasks_own_loss():
    task = Classification()
    assert make_loss(None, task, FOUR, Path()) == task.loss


@pytest.mark.parametrize("name", ["cross-entropy", "focal"])
def test_without_options_it_is_the_tasks_cross_entropy(name):
    options = {"gamma": 0.0} if name == "focal" else {}
    for spec, outputs, targets in (
        (FOUR, draw(6, 4), labels(4, 6)),
        (TWO, draw(6, 1), labels(2, 6)),
        (TOKENS, draw(6, 5, 7), labels(7, 6, 5)),
    ):
        expected = TASKS[spec.target].loss(outputs, targets)
        torch.testing.assert_close(loss(spec, name=name, **options)(outputs, targets), expected)


def test_class_weights_and_smoothing_by_hand():
    outputs = torch.tensor([[log(1.0), log(3.0)], [log(1.0), log(3.0)]])  # probabilities 1/4, 3/4
    both = loss(TWO, name="cross-entropy", class_weights=[1.0, 5.0], label_smoothing=0.2)
    # 0.9 of the target and 0.1 of the other class, each times its own class's weight.
    first = 0.9 * 1 * log(4) + 0.1 * 5 * log(4 / 3)
    second = 0.9 * 5 * log(4 / 3) + 0.1 * 1 * log(4)
    assert both(outputs, torch.tensor([0, 1])).tolist() == pytest.approx([first, second])
    one_logit = torch.tensor([[log(3.0)], [log(3.0)]])
    assert both(one_logit, torch.tensor([0, 1])).tolist() == pytest.approx([first, second])


def test_focal_loss_by_hand():
    outputs = torch.tensor([[log(3.0)], [log(3.0)]])
    focal = loss(TWO, name="focal", gamma=2.0, alpha=[0.75, 0.25])
    expected = [0.75 * (3 / 4) ** 2 * log(4), 0.25 * (1 / 4) ** 2 * log(4 / 3)]
    assert focal(outputs, torch.tensor([0, 1])).tolist() == pytest.approx(expected)


def test_a_focal_loss_with_a_small_gamma_has_finite_slopes_where_all_is_certain():
    outputs = torch.tensor([[80.0, -80.0, 0.0, 0.0], [0.0, 90.0, 0.0, 0.0]], requires_grad=True)
    losses = loss(FOUR, name="focal", gamma=0.5)(outputs, torch.tensor([0, 0]))
    (slopes,) = torch.autograd.grad(losses.sum(), outputs)
    assert losses.tolist() == pytest.approx([0.0, 90.0])
    assert slopes.isfinite().all()


def test_hinge_losses_are_those_of_scikit_learn():
    several, classes = draw(50, 4), labels(4, 50)
    found = loss(FOUR, name="hinge")(several, classes).mean()
    assert found.item() == pytest.approx(hinge_loss(classes.numpy(), several.numpy(), labels=np.arange(4)), rel=1e-5)
    one, binary = draw(50, 1), labels(2, 50)
    found = loss(TWO, name="hinge")(one, binary).mean()
    assert found.item() == pytest.approx(hinge_loss(binary.numpy(), one[:, 0].numpy()), rel=1e-5)


def test_a_token_loss_is_the_mean_over_positions():
    outputs, targets = draw(6, 5, 7), labels(7, 6, 5)
    whole = loss(TOKENS, name="hinge")(outputs, targets)
    single = loss(DataSpec((3,), "class", 7), name="hinge")
    expected = [single(outputs[i], targets[i]).mean().item() for i in range(6)]
    assert whole.tolist() == pytest.approx(expected)


def test_losses_of_numbers_by_hand_in_units_of_the_tasks_deviation():
    task = Regression()
    task.target_std = 2.0
    outputs, targets = torch.tensor([1.0, 0.0, -3.0]), torch.tensor([0.0, 0.0, 3.0])  # errors 0.5, 0, 3 deviations
    hand = {
        "mse": [0.25, 0.0, 9.0],
        "mae": [0.5, 0.0, 3.0],
        "huber": [0.125, 0.0, 2.5],
        "quantile": [0.05, 0.0, 2.7],  # too much costs 0.1 of it, too little 0.9
    }
    for name, expected in hand.items():
        options = {"q": [0.9]} if name == "quantile" else {}
        assert loss(NUMBER, task, name=name, **options)(outputs, targets).tolist() == pytest.approx(expected), name
    assert torch.equal(loss(NUMBER, task, name="mse")(outputs, targets), task.loss(outputs, targets))


def test_the_point_where_huber_becomes_linear():
    errors = torch.tensor([0.2, 1.0])
    assert loss(NUMBER, name="huber", delta=0.5)(errors, torch.zeros(2)).tolist() == pytest.approx([0.02, 0.375])


def test_several_quantiles_are_averaged_over_outputs():
    outputs, targets = draw(40, 3), draw(40)
    found = loss(NUMBER, name="quantile", q=[0.1, 0.5, 0.9])(outputs, targets).mean()
    each = [mean_pinball_loss(targets, outputs[:, i], alpha=q) for i, q in enumerate((0.1, 0.5, 0.9))]
    assert found.item() == pytest.approx(np.mean(each), rel=1e-5)


def test_the_least_pinball_loss_is_at_the_quantile():
    targets = draw(1001)
    pinball = loss(NUMBER, name="quantile", q=[0.8])
    losses = [pinball(t.expand(1001), targets).mean().item() for t in targets]
    assert targets[np.argmin(losses)] == targets.sort().values[800]


@pytest.mark.parametrize(
    ("spec", "section", "field"),
    [
        (NUMBER, {"name": "focal"}, "training.loss.name"),
        (FOUR, {"name": "mse"}, "training.loss.name"),
        (TOKENS, {"name": "quantile"}, "training.loss.name"),
        (FOUR, {"name": "cross-entropy", "class_weights": [1.0, 2.0]}, "training.loss.class_weights"),
        (TWO, {"name": "focal", "alpha": [0.25]}, "training.loss.alpha"),
        (NUMBER, {"name": "own", "path": "no_such_file.py:loss"}, "no_such_file.py"),
    ],
)
def test_what_does_not_suit_the_data_is_refused_with_its_field(spec, section, field):
    with pytest.raises(TaskError, match=field):
        loss(spec, **section)


def test_the_built_in_regressor_has_one_output():
    with pytest.raises(TaskError, match=r"training\.loss\.q"):
        loss(NUMBER, Regressor(NUMBER), name="quantile", q=[0.1, 0.9])


@pytest.mark.parametrize(
    ("spec", "section", "outputs", "targets"),
    [
        (FOUR, {"name": "cross-entropy"}, draw(6, 5), labels(4, 6)),
        (FOUR, {"name": "hinge"}, draw(6, 1), labels(2, 6)),
        (FOUR, {"name": "focal"}, (draw(6, 4),), labels(4, 6)),
        (NUMBER, {"name": "mae"}, draw(6, 1), draw(6)),  # torch would compare each output with each target
        (NUMBER, {"name": "quantile", "q": [0.2, 0.8]}, draw(6), draw(6)),
    ],
)
def test_outputs_of_another_shape_are_refused(spec, section, outputs, targets):
    with pytest.raises(TaskError, match=r"training\.loss\.name.*outputs"):
        loss(spec, **section)(outputs, targets)


@pytest.mark.parametrize(
    "section", [{"name": "cross-entropy", "class_weights": [1.0, 2.0, 3.0, 4.0]}, {"name": "focal"}]
)
def test_outputs_of_16_bits_are_measured_in_32(section):
    outputs, targets = draw(6, 4).bfloat16(), labels(4, 6)
    found = loss(FOUR, **section)(outputs, targets)
    torch.testing.assert_close(found, loss(FOUR, **section)(outputs.float(), targets))


def test_a_loss_survives_the_way_to_a_worker():
    outputs, targets = draw(6, 4), labels(4, 6)
    there = loss(FOUR, name="focal", alpha=[1.0, 2.0, 3.0, 4.0])
    assert torch.equal(pickle.loads(pickle.dumps(there))(outputs, targets), there(outputs, targets))


def document(tmp_path: Path, **training: object) -> Experiment:
    (tmp_path / "own.py").write_text(
        "def cubed(outputs, targets):\n    return (outputs - targets).abs() ** 3\n\n"
        "def first(inputs, targets):\n    return inputs[:, 0]\n\nseven = 7\n"
    )
    return Experiment.model_validate(
        {"task": {"name": "regressor"}, "data": {"name": "parkinsons", "clients": 3}, "training": training}
    )


def test_the_experiments_task_has_the_loss_and_the_tasks_metrics(tmp_path):
    own = {"name": "own", "path": "own.py:cubed"}
    task = experiment_task(document(tmp_path, loss=own), NUMBER, tmp_path)
    outputs, targets = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    assert task.loss(outputs, targets).tolist() == [1.0, 8.0]
    assert task.metrics()["mae"](outputs, targets).tolist() == [1.0, 2.0]


def test_an_own_score_of_a_curriculum_is_loaded(tmp_path):
    curriculum = {"score": "own.py:first"}
    task = experiment_task(document(tmp_path, curriculum=curriculum), NUMBER, tmp_path)
    assert task.difficulty(torch.tensor([[5.0], [6.0]]), torch.zeros(2)).tolist() == [5.0, 6.0]
    assert load_score(CurriculumSection(), tmp_path) is None
    with pytest.raises(TaskError, match="not a function"):
        load_score(CurriculumSection(score="own.py:seven"), tmp_path)


def test_balance_needs_classes(tmp_path):
    check_balance("weight", FOUR)
    check_balance("none", NUMBER)
    with pytest.raises(TaskError, match=r"training\.balance"):
        experiment_task(document(tmp_path, balance="oversample"), NUMBER, tmp_path)


def test_cross_entropy_of_sure_and_wrong_logits_stays_finite():
    sure = torch.tensor([[200.0]])
    assert loss(TWO, name="cross-entropy")(sure, torch.tensor([0])).tolist() == [200.0]
    assert loss(TWO, name="cross-entropy")(-sure, torch.tensor([0])).item() == pytest.approx(exp(-200.0))
    expected = F.binary_cross_entropy_with_logits(sure[:, 0], torch.zeros(1), reduction="none")
    assert loss(TWO, name="cross-entropy")(sure, torch.tensor([0])).tolist() == expected.tolist()
