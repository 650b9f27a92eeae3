from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtrain.data.base import DataSpec, Examples
from fedtrain.errors import TaskError
from fedtrain.experiment import load
from fedtrain.params import exchanged, snapshot
from fedtrain.tasks import Classification, check_task
from fedtrain.tasks.adapted import experiment_task
from fedtrain.tasks.hook import batch_loss_of, check_hook, relabelled
from fedtrain.tasks.registry import make_task
from fedtrain.training.loop import Assignment, Recipe, Trainer

SPEC = DataSpec((2,), "class", 3)
EXAMPLES = Examples(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))


class Hooked(Classification):
    """Its loss has no gradient, its hook's is known: of (w x)^2 with regard to w."""

    def model(self):
        layer = nn.Linear(2, 3, bias=False)
        nn.init.ones_(layer.weight)
        return layer

    def loss(self, outputs, targets):
        return super().loss(outputs.detach(), targets)

    def batch_loss(self, model, inputs, targets):
        return model(inputs)[:, 0].square()


@pytest.fixture
def experiment(tiny: Path) -> Callable:
    return lambda *overrides: load(tiny, ["task.options={}", *overrides])


def test_a_step_goes_down_the_hook(experiment):
    training = experiment("training.optimizer.lr=0.5", "training.batch_size=2").training
    trainer = Trainer(Hooked(), Recipe(training), 0, torch.device("cpu"))
    start = snapshot(exchanged(trainer.model))
    result = trainer.train(Assignment(1, "a", start), EXAMPLES)
    # Outputs are 1 and 2: mean of 2 * 1 * (1, 0) and 2 * 2 * (0, 2), times the rate.
    assert result.delta["weight"].tolist() == [[-0.5, -2.0], [0, 0], [0, 0]]
    assert result.loss == 2.5


def test_the_hook_is_tried_before_the_run():
    class Faulty(Hooked):
        def batch_loss(self, model, inputs, targets):
            return super().batch_loss(model, inputs, targets).mean()

    check_task(Hooked(), EXAMPLES)
    with pytest.raises(TaskError, match=r"batch_loss must give one number per example: got shape \(\)"):
        check_task(Faulty(), EXAMPLES)


def test_an_experiments_task_passes_the_hook_on(experiment):
    spec = DataSpec((1, 8, 8), "class", 10)
    assert batch_loss_of(experiment_task(experiment("task.name=kmeans"), spec, Path()))
    assert batch_loss_of(experiment_task(experiment("task.name=mlp"), spec, Path())) is None


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ('training.loss={name="cross-entropy"}', "training.loss"),
        ("training.micro_batch_size=8", "training.micro_batch_size"),
        ("training.compile=true", "training.compile"),
    ],
)
def test_what_takes_the_loss_of_outputs_and_targets_is_refused(experiment, override, field):
    with pytest.raises(TaskError, match=f"task 'mlp' trains by its batch_loss, and {field}"):
        check_hook(Hooked(), experiment(override))


def test_dp_sgd_is_refused(experiment):
    private = ["data.test=0", 'privacy={unit="sample", epsilon=8.0, delta=1e-4, max_grad_norm=1.0}']
    with pytest.raises(TaskError, match=r'privacy.unit = "sample" clips the gradient of each example'):
        check_hook(Hooked(), experiment(*private))
    check_hook(make_task(experiment().task, SPEC, Path()), experiment(*private))


class Relabelled(Classification):
    """What the model gives for the first example is every example's target."""

    passes = 0

    def model(self):
        layer = nn.Linear(2, 3, bias=False)
        nn.init.zeros_(layer.weight)
        return layer

    def relabel(self, model, inputs, targets):
        assert not model.training
        assert not torch.is_grad_enabled()
        self.passes += 1
        return model(inputs)[:1].argmax(1).expand(len(targets))


def test_a_client_trains_on_what_relabel_makes_of_its_targets(experiment):
    training = experiment("training.optimizer.lr=0.5", "training.batch_size=2", "training.local_steps=2").training
    task = Relabelled()
    received = {"weight": torch.tensor([[0.0, 0], [0, 0], [1, 0]])}
    delta = Trainer(task, Recipe(training), 0, torch.device("cpu")).train(Assignment(1, "a", received), EXAMPLES).delta
    assert (delta["weight"][2] > 0).all()  # by the model received both are of class 2
    assert (delta["weight"][:2] < 0).all()
    assert task.passes == 1  # for both steps


class Noisy(Relabelled):
    """Draws targets, and writes into what it is given."""

    def relabel(self, model, inputs, targets):
        targets[:] = torch.randint(3, (len(targets),))
        return targets


def test_what_relabel_draws_is_seeded_and_the_data_keep_their_targets(experiment):
    trainer = Trainer(Noisy(), Recipe(experiment().training), 0, torch.device("cpu"))
    many = Examples(torch.ones(2500, 2), torch.zeros(2500, dtype=torch.int64))
    start = {"weight": torch.zeros(3, 2)}
    first, again, other = (trainer.train(Assignment(number, "a", start), many).delta["weight"] for number in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not many.targets.any()


def test_each_of_many_examples_gets_its_own_target():
    class Numbered(Relabelled):
        def relabel(self, model, inputs, targets):
            return inputs[:, 0].long()

    many = Examples(torch.arange(2500.0)[:, None], torch.zeros(2500, dtype=torch.int64))
    assert relabelled(Numbered(), nn.Identity(), many).targets.tolist() == list(range(2500))


@pytest.mark.parametrize("balance", ["none", "oversample", "weight"])
def test_guessed_labels_are_balanced_as_classes_of_their_own(experiment, balance):
    labels = DataSpec((2,), "class", 4, class_names=("a", "b", "c", "unlabelled"))
    task = experiment_task(
        experiment(
            'task.name="pseudo-label"',
            "task.options={network='logistic', threshold=0}",
            f"training.balance={balance!r}",
        ),
        labels,
        Path(),
    )
    trainer = Trainer(task, Recipe(experiment(f"training.balance={balance!r}").training), 0, torch.device("cpu"))
    some = Examples(torch.randn(40, 2), torch.tensor([0, 1, 2, 3] + 36 * [3]))
    result = trainer.train(Assignment(1, "a", snapshot(exchanged(trainer.model))), some)
    assert all(t.isfinite().all() and t.any() for t in result.delta.values())


def test_relabel_is_tried_before_the_run():
    class Faulty(Relabelled):
        def relabel(self, model, inputs, targets):
            return model(inputs)

    check_task(Relabelled(), EXAMPLES)
    with pytest.raises(TaskError, match=r"must give each example a target: got torch.float32 of shape \(2, 3\)"):
        check_task(Faulty(), EXAMPLES)


def test_what_relabel_does_not_go_with_is_refused(experiment):
    private = ["data.test=0", 'privacy={unit="sample", epsilon=8.0, delta=1e-4, max_grad_norm=1.0}']
    with pytest.raises(TaskError, match=r'by its relabel, and privacy\.unit = "sample" is proved for targets'):
        check_hook(Relabelled(), experiment(*private))
    with pytest.raises(TaskError, match=r"by its relabel, and training\.loss does not know"):
        check_hook(Relabelled(), experiment('training.loss={name="cross-entropy"}'))
    with pytest.raises(TaskError, match=r"by its relabel, and training\.curriculum ranks"):
        check_hook(Relabelled(), experiment("training.curriculum={rounds=2, start=0.3}"))
    check_hook(Relabelled(), experiment("training.micro_batch_size=8"))


def test_a_relabel_that_gives_nothing_is_told_so():
    class Silent(Relabelled):
        def relabel(self, model, inputs, targets):
            return None

    with pytest.raises(TaskError, match="must give each example a target: got NoneType"):
        check_task(Silent(), EXAMPLES)
