from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedtrain.data.base import DataSpec, Examples
from fedtrain.errors import TaskError
from fedtrain.experiment.sections import TaskSection
from fedtrain.tasks import TASKS, check_task, make_task

TABLE = DataSpec((4,), "class", 2)
OWN_TASK = """
import torch
from torch import nn
from fedtrain.tasks import Classification

class Own(Classification):
    def __init__(self, spec, width, depth=1):
        self.spec, self.width = spec, width
        if width > 99:
            raise ValueError("too wide")
    def model(self):
        return nn.Linear(4, self.width)

class Halved(Own):
    def loss(self, outputs, targets):
        return super().loss(outputs, targets)[::2]

class Measured(Own):
    def metrics(self):
        return {"bias": lambda outputs, targets: 0.5}

class Renamed(Own):
    def metrics(self):
        return {"loss": lambda outputs, targets: outputs[:, 0]}

class Numbered(Own):
    def metrics(self):
        return {3: lambda outputs, targets: outputs[:, 0]}

class NoLoss:
    def __init__(self, spec): ...
    def model(self): ...
    def metrics(self): ...

class NoSpec: ...
"""


@pytest.fixture
def own(tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN_TASK)
    return lambda name, **options: make_task(TaskSection(name=f"own.py:{name}", options=options), TABLE, tmp_path)


def failure(section: TaskSection, spec: DataSpec = TABLE) -> str:
    with pytest.raises(TaskError) as caught:
        make_task(section, spec, Path())
    return str(caught.value)


def test_an_unknown_task_names_the_nearest():
    message = failure(TaskSection(name="simplecnn"))
    assert "got simplecnn; expected one of logistic, mlp, cnn" in message
    assert "Did you mean simple-cnn?" in message


def test_an_unknown_option_names_the_nearest():
    message = failure(TaskSection(name="mlp", options={"hiden": 64}))
    assert message == "task 'mlp' has no such option: got hiden; expected one of hidden, dropout. Did you mean hidden?"
    assert "expected no options" in failure(TaskSection(name="logistic", options={"hidden": 64}))


@pytest.mark.parametrize(
    "spec",
    [
        DataSpec((4,), "class", 3),
        DataSpec((3, 32, 32), "class", 3),
        DataSpec((4,), "number"),
        DataSpec((12,), "tokens", 90),
    ],
    ids=["features", "images", "number", "text"],
)
def test_a_refusal_names_exactly_the_tasks_that_suit(spec):
    suitable, hints = [], set()
    for name in TASKS:
        try:
            make_task(TaskSection(name=name), spec, Path())
            suitable.append(name)
        except TaskError as error:
            hints.add(error.hint)
    assert hints == {f"Tasks for this data: {', '.join(suitable)}"}


def test_a_refusal_says_what_was_needed_and_got():
    message = failure(TaskSection(name="cnn"))
    assert "task 'cnn' needs images (C, H, W): got inputs of shape (4,)" in message
    message = failure(TaskSection(name="simple-cnn"), DataSpec((1, 8, 8), "class", 10))
    assert "at least 16 x 16 pixels: got inputs of shape (1, 8, 8)" in message
    assert "at least two classes: got 1" in failure(TaskSection(name="mlp"), DataSpec((4,), "class", 1))


def test_an_own_task_is_built_with_its_options(own):
    task = own("Own", width=2)
    assert task.model().out_features == 2
    check_task(task, Examples(torch.zeros(3, 4), torch.tensor([0, 1, 0])))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Own", {}, "needs the option width"),
        ("Own", {"width": 2, "dept": 3}, "Did you mean depth?"),
        ("Own", {"width": 100}, "own.py, line 10: ValueError: too wide"),
        ("NoLoss", {}, "has no method loss"),
        ("NoSpec", {}, "does not take the data's spec"),
        ("__name__", {}, "is not a task's class: got str"),
    ],
)
def test_a_faulty_own_task_is_one_clear_error(own, name, options, message):
    with pytest.raises(TaskError) as caught:
        own(name, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("Own", -1, "own.py, line 12: RuntimeError"),
        ("Halved", 2, "the task's loss must give one number per example: got shape (2,) for 3 examples"),
        ("Renamed", 2, "a metric of the task has a wrong name: got 'loss'; expected a text other than"),
        ("Numbered", 2, "a metric of the task has a wrong name: got 3"),
        ("Measured", 2, "the task's metric 'bias' must give one number per example: got shape ()"),
    ],
)
def test_trying_a_task_finds_faults_of_its_methods(own, name, width, message):
    task = own(name, width=width)
    with pytest.raises(TaskError) as caught:
        check_task(task, Examples(torch.zeros(3, 4), torch.tensor([0, 1, 0])))
    assert message in str(caught.value)


def test_trying_a_task_leaves_the_random_stream_alone(own):
    task = own("Own", width=2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check_task(task, Examples(torch.zeros(3, 4), torch.tensor([0, 1, 0])))
    assert torch.equal(before, torch.random.get_rng_state())
