from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrain import params as P
from fedtrain.data.base import Examples
from fedtrain.errors import TaskError
from fedtrain.experiment.losses import CurriculumSection
from fedtrain.experiment.training import TrainingSection
from fedtrain.seeds import generator
from fedtrain.tasks.base import Metric
from fedtrain.training.batches import Batch, batches, easiest, mean_loss
from fedtrain.training.loop import Assignment, Recipe, Trainer

CPU = torch.device("cpu")


def rows(*targets: int) -> Examples:
    """Each input is its own place."""
    return Examples(torch.arange(len(targets)).float()[:, None], torch.tensor(targets))


def collect(examples: Examples, batch_size: int, steps: int, **options: Any) -> list[Batch]:
    return list(batches(examples, batch_size, steps, np.random.default_rng(1), **options))


@dataclass
class Distance:
    """Squared distance to the target; remembers what it is measured on while the model trains."""

    trained_on: list[float] = field(default_factory=list)

    def model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.requires_grad:
            self.trained_on += targets.tolist()
        return (outputs[:, 0] - targets).square()

    def metrics(self) -> Mapping[str, Metric]:
        return {}


def test_without_balance_each_pass_has_every_row_once():
    found = collect(rows(0, 1, 2, 3, 4), 2, 7)
    assert [len(batch.targets) for batch in found] == [2, 2, 1, 2, 2, 1, 2]
    for of_pass in (found[:3], found[3:6]):
        assert sorted(torch.cat([batch.targets for batch in of_pass]).tolist()) == [0, 1, 2, 3, 4]
    assert all(torch.equal(batch.inputs[:, 0].long(), batch.targets) for batch in found)
    assert all(batch.weights is batch.mixed is batch.share is None for batch in found)


def test_the_rows_come_in_the_order_of_the_named_stream():
    order = np.random.default_rng(1).permutation(5)
    assert torch.cat([batch.targets for batch in collect(rows(0, 1, 2, 3, 4), 2, 3)]).tolist() == order.tolist()


def test_batches_of_images_keep_their_layout():
    inputs = torch.rand(5, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    for batch in collect(Examples(inputs, torch.arange(5)), 3, 2):
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.inputs, inputs[batch.targets])


def test_oversampling_draws_each_class_equally_often():
    examples = rows(*[7] * 40, 3, *[5] * 10)
    found = collect(examples, 51, 300, balance="oversample")
    for batch in found:
        assert sorted(Counter(batch.targets.tolist()).values()) == [17, 17, 17]
        assert torch.equal(examples.targets[batch.inputs[:, 0].long()], batch.targets)
    drawn = Counter(torch.cat([batch.inputs for batch in found])[:, 0].long().tolist())
    assert drawn[40] == 300 * 17  # the only one of its class
    assert {300 * 17 / 40 * 0.6 < drawn[i] < 300 * 17 / 40 * 1.5 for i in range(40)} == {True}
    assert {300 * 17 / 10 * 0.8 < drawn[i] < 300 * 17 / 10 * 1.2 for i in range(41, 51)} == {True}


def test_what_is_left_over_falls_to_each_class_in_turn():
    found = collect(rows(0, 0, 1), 3, 200, balance="oversample")
    counts = Counter(torch.cat([batch.targets for batch in found]).tolist())
    assert 260 < counts[0] < 340
    assert 260 < counts[1] < 340


def test_weights_are_the_inverse_frequencies_of_the_classes_there_are():
    found = collect(rows(7, 7, 7, 3), 2, 2, balance="weight")
    targets, weights = (torch.cat([getattr(batch, name) for batch in found]) for name in ("targets", "weights"))
    expected = {7: 4 / (2 * 3), 3: 4 / (2 * 1)}
    assert weights.tolist() == pytest.approx([expected[t] for t in targets.tolist()])
    assert weights.mean().item() == pytest.approx(1.0)


def test_the_mean_loss_of_a_batch_by_hand():
    outputs, targets = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square()

    assert mean_loss(squares, outputs, Batch(outputs, targets)).item() == 2.5
    weighted = Batch(outputs, targets, weights=torch.tensor([3.0, 0.5]))
    assert mean_loss(squares, outputs, weighted).item() == (3 * 1 + 0.5 * 4) / 2
    mixed = Batch(outputs, targets, None, torch.tensor([3.0, 1.0]), torch.tensor([0.25, 0.5]))
    assert mean_loss(squares, outputs, mixed).item() == ((0.25 * 1 + 0.75 * 4) + (0.5 * 4 + 0.5 * 1)) / 2
    both = mixed._replace(weights=torch.tensor([2.0, 0.0]))
    assert mean_loss(squares, outputs, both).item() == 2 * (0.25 * 1 + 0.75 * 4) / 2


def test_weighting_classes_is_the_gradient_of_the_weighted_loss():
    examples = Examples(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0] * 6 + [1, 2]))
    training = TrainingSection.model_validate({"batch_size": 8, "balance": "weight", "optimizer": {"lr": 1.0}})
    trainer = Trainer(_Linear(), Recipe(training), 5, CPU)
    start = P.snapshot(P.exchanged(trainer.model))
    found = trainer.train(Assignment(1, "a", start), examples).delta["weight"]
    weight = start["weight"].clone().requires_grad_()
    outputs = examples.inputs @ weight.T
    # torch divides by the sum of the weights, which is the number of examples here.
    loss = F.cross_entropy(outputs, examples.targets, torch.tensor([8 / 18, 8 / 3, 8 / 3]))
    torch.testing.assert_close(found, -torch.autograd.grad(loss, weight)[0])


class _Linear:
    def model(self) -> nn.Module:
        return nn.Linear(3, 3, bias=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def metrics(self) -> Mapping[str, Metric]:
        return {}


CURRICULUM = {"rounds": 5, "start": 0.2}
FAR = [0.0, 90.0, 10.0, 50.0, 20.0, 30.0, 80.0, 40.0, 60.0, 70.0]


def learn(round_number: int, task: Distance | None = None, **training: Any) -> tuple[Distance, Trainer]:
    """Train from a model that says 1, to which an example is as difficult as its target is far from 1."""
    task = task or Distance()
    section = TrainingSection.model_validate({"batch_size": 2, "optimizer": {"lr": 1e-9}, **training})
    trainer = Trainer(task, Recipe(section), 5, CPU)
    examples = Examples(torch.ones(10, 1), torch.tensor(FAR))
    trainer.train(Assignment(round_number, "a", {"weight": torch.ones(1, 1)}), examples)
    return task, trainer


@pytest.mark.parametrize(("round_number", "share"), [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (9, 10)])
def test_a_round_sees_exactly_its_share_of_the_easiest(round_number, share):
    task, trainer = learn(round_number, curriculum=CURRICULUM)
    assert sorted(task.trained_on) == sorted(FAR)[:share]  # one pass over those that take part
    assert trainer.model.training


def test_an_own_score_says_what_is_easy():
    task = Distance()
    task.difficulty = lambda inputs, targets: -targets  # type: ignore[attr-defined]
    learn(1, task, curriculum={**CURRICULUM, "score": "own_score.py:far"})
    assert sorted(task.trained_on) == [80.0, 90.0]


def test_the_last_rounds_of_a_curriculum_are_as_if_there_were_none():
    assert learn(5, curriculum=CURRICULUM)[0].trained_on == learn(5)[0].trained_on


def test_of_equally_difficult_examples_the_first_take_part():
    section = CurriculumSection(rounds=2, start=0.4)
    examples = Examples(torch.arange(5.0)[:, None], torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))
    task: Any = Distance()
    chosen = easiest(section, 1, examples, _Zero(), task)
    assert chosen.inputs[:, 0].tolist() == [0.0, 1.0]


class _Zero(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        assert not self.training, "difficulty is measured without dropout"
        return torch.zeros_like(inputs)


def test_more_examples_than_one_forward_pass_are_ranked_alike():
    section = CurriculumSection(rounds=2, start=0.3)
    targets = torch.from_numpy(generator(3, "targets").permutation(2500)).float()
    chosen = easiest(section, 1, Examples(torch.zeros(2500, 1), targets), _Zero(), Distance())
    assert sorted(chosen.targets.tolist()) == list(range(750))


def test_a_score_gives_one_number_per_example():
    task: Any = Distance()
    score: Callable[[Tensor, Tensor], Tensor] = lambda inputs, targets: targets.float().mean()  # noqa: E731
    task.difficulty = score
    with pytest.raises(TaskError, match=r"training\.curriculum\.score"):
        easiest(CurriculumSection(score="own.py:score"), 1, rows(1, 2, 3), _Zero(), task)
