"""Inputs that are changed against a model, and how many of them it still gets right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec, Examples
from fedtrain.data.prepare import Moments
from fedtrain.errors import InputError
from fedtrain.experiment.evaluation import AttackSection, PgdAttack
from fedtrain.seeds import generator
from fedtrain.tasks.base import Task
from fedtrain.training.layout import for_model
from fedtrain.training.metrics.statistics import Batch

__all__ = ["ADVERSARIAL", "Attack", "make_attack"]

ADVERSARIAL = "adversarial-accuracy"
"""Name of the accuracy on attacked inputs."""


@dataclass(frozen=True)
class Attack:
    """An attack within a box around each input; every bound is in the scale that the model sees.

    Attributes:
        epsilon: most that an entry may change; broadcasts over an input.
        step: of each gradient's sign; likewise.
        steps: how many; a random start goes before them if `random_start`.
        low: least value of an entry; None for no bound.
        high: greatest.
        seed: of the run.
    """

    epsilon: Tensor
    step: Tensor
    steps: int
    random_start: bool
    low: Tensor | None
    high: Tensor | None
    seed: int

    def withstood(self, model: nn.Module, task: Task, batch: Examples, first: int) -> int:
        """Count the examples that the model gets right although their inputs were changed.

        Args:
            model: on any device.
            task: its loss is what the attack makes large.
            batch: at least one example.
            first: position of its first example among all, which names its random start.
        """
        model.eval()
        batch = for_model(batch, model, task)
        changed = self.change(model, task, batch, first)
        with torch.inference_mode():
            seen = Batch(changed, model(changed), batch.targets)
            return int((seen.predicted == seen.labels).sum())

    def change(self, model: nn.Module, task: Task, examples: Examples, first: int) -> Tensor:
        """Change inputs so that the loss grows.

        Args:
            model: in evaluation mode.
            task: gives the loss.
            examples: a batch, on the model's device.
            first: position of its first example among all, which names its random start.
        """
        inputs = examples.inputs
        epsilon, step = self.epsilon.to(inputs.device), self.step.to(inputs.device)
        changed = inputs
        if self.random_start:
            draws = generator(self.seed, "attack", first).uniform(-1.0, 1.0, tuple(inputs.shape))
            changed = self._bounded(inputs + epsilon * torch.from_numpy(draws).to(inputs), inputs, epsilon)
        for _ in range(self.steps):
            changed = changed.detach().requires_grad_()
            loss = task.loss(model(changed), examples.targets).sum()
            (gradient,) = torch.autograd.grad(loss, changed)
            changed = self._bounded(changed.detach() + step * gradient.sign(), inputs, epsilon)
        return changed

    def _bounded(self, changed: Tensor, inputs: Tensor, epsilon: Tensor) -> Tensor:
        changed = torch.maximum(torch.minimum(changed, inputs + epsilon), inputs - epsilon)
        if self.low is None or self.high is None:
            return changed
        return torch.maximum(torch.minimum(changed, self.high.to(changed.device)), self.low.to(changed.device))


def make_attack(section: AttackSection | None, spec: DataSpec, scaling: Moments | None, seed: int) -> Attack | None:
    """Build the attack of an experiment; None for none.

    Args:
        section: its bounds are in the inputs' scale before scaling.
        spec: what the data are like.
        scaling: of the inputs; None for none.
        seed: the experiment's.

    Raises:
        InputError: the inputs have no gradient, or the targets are no classes.

    References:
        Goodfellow, Shlens, Szegedy: Explaining and Harnessing Adversarial Examples. ICLR 2015.
        Madry, Makelov, Schmidt, Tsipras, Vladu: Towards Deep Learning Models Resistant to Adversarial Attacks. ICLR
        2018.
    """
    if section is None:
        return None
    if spec.target != "class":
        raise InputError(
            "evaluation.attack needs inputs that are numbers, and classes to predict",
            got={"number": "numbers to predict", "tokens": "tokens"}[spec.target],
            hint="Leave it out",
        )
    mean = torch.zeros(()) if scaling is None else scaling.mean
    std = torch.ones(()) if scaling is None else scaling.std
    steps, step = 1, section.epsilon
    if isinstance(section, PgdAttack):
        steps = section.steps
        step = section.step_size or 2.5 * section.epsilon / steps
    low, high = ((bound - mean) / std for bound in section.clip) if section.clip else (None, None)
    return Attack(section.epsilon / std, step / std, steps, isinstance(section, PgdAttack), low, high, seed)
