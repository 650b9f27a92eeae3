from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec, Examples
from fedtrain.data.prepare import Moments
from fedtrain.errors import InputError
from fedtrain.experiment.evaluation import AttackSection, FgsmAttack, PgdAttack
from fedtrain.tasks.objectives import Classification
from fedtrain.training.attacks import Attack, make_attack

SPEC = DataSpec((3,), "class", 2)
WEIGHTS = torch.tensor([[1.0, -2.0, 0.5]])


class Linear(Classification):
    def model(self) -> nn.Module:
        layer = nn.Linear(3, 1)
        with torch.no_grad():
            layer.weight.copy_(WEIGHTS)
            layer.bias.fill_(0.1)
        return layer


def attack(section: AttackSection, scaling: Moments | None = None) -> Attack:
    made = make_attack(section, SPEC, scaling, 7)
    assert made is not None
    return made


@pytest.fixture
def examples() -> Examples:
    rng = torch.Generator().manual_seed(1)
    inputs = torch.rand(50, 3, generator=rng)
    return Examples(inputs, torch.randint(2, (50,), generator=rng))


def closed_form(examples: Examples, epsilon: Tensor | float) -> Tensor:
    """The loss of class 1 falls along the weights, that of class 0 grows."""
    away = torch.where(examples.targets[:, None] == 1, -1.0, 1.0) * WEIGHTS.sign()
    return examples.inputs + epsilon * away


def test_fgsm_on_a_linear_model_is_its_closed_form(examples: Examples) -> None:
    task, fgsm = Linear(), attack(FgsmAttack(epsilon=0.2))
    model = task.model()
    expected = closed_form(examples, 0.2)
    torch.testing.assert_close(fgsm.change(model, task, examples, 0), expected)
    right = ((model(expected)[:, 0] > 0).long() == examples.targets).sum()
    assert fgsm.withstood(model, task, examples, 0) == right


def test_bounds_are_in_the_inputs_scale_before_scaling(examples: Examples) -> None:
    scaling = Moments(torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.1, 0.2, 0.4]))
    scaled = Examples((examples.inputs - scaling.mean) / scaling.std, examples.targets)
    task = Linear()
    changed = attack(FgsmAttack(epsilon=0.2, clip=(0.0, 1.0)), scaling).change(task.model(), task, scaled, 0)
    expected = closed_form(examples, 0.2).clamp(0, 1)
    torch.testing.assert_close(changed * scaling.std + scaling.mean, expected)


def test_many_steps_stay_in_the_box_and_reach_its_worst_corner(examples: Examples) -> None:
    pgd = attack(PgdAttack(name="pgd", epsilon=0.2, steps=8))
    task = Linear()
    torch.testing.assert_close(pgd.change(task.model(), task, examples, 0), closed_form(examples, 0.2))


def test_random_starts_are_of_a_named_stream(examples: Examples) -> None:
    pgd = attack(PgdAttack(name="pgd", epsilon=0.2, steps=1, step_size=1e-6))
    task = Linear()
    model = task.model()
    torch.manual_seed(1)
    first = pgd.change(model, task, examples, 0)
    torch.manual_seed(2)
    torch.testing.assert_close(pgd.change(model, task, examples, 0), first, rtol=0, atol=0)
    assert not torch.equal(pgd.change(model, task, examples, 50), first)
    assert 0.1 < (first - examples.inputs).abs().max() <= 0.2 + 1e-6


def test_the_model_is_left_as_it_was(examples: Examples) -> None:
    task = Linear()
    model = task.model()
    attack(FgsmAttack(epsilon=0.2)).withstood(model, task, examples, 7)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.weight, WEIGHTS)


def test_no_attack() -> None:
    assert make_attack(None, SPEC, None, 7) is None


@pytest.mark.parametrize("target", ["number", "tokens"])
def test_an_attack_needs_classes(target: str) -> None:
    spec = DataSpec((3,), target, 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"evaluation.attack needs .*got {target}"):
        make_attack(FgsmAttack(epsilon=0.1), spec, None, 7)
