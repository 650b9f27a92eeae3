"""The task as an experiment trains it: with the experiment's model section and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import InputError
from fedtrain.experiment.augment import unsuited
from fedtrain.experiment.optimizers import rooted
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.training import TrainingSection
from fedtrain.tasks.base import Metric, Task
from fedtrain.tasks.hook import check_hook
from fedtrain.tasks.losses import Loss, check_balance, load_score, make_loss
from fedtrain.tasks.modelling import adapt
from fedtrain.tasks.registry import make_task

__all__ = ["experiment_task"]


def experiment_task(experiment: Experiment, spec: DataSpec, base: Path) -> Task:
    """Build the task of an experiment, and what [model] and training.loss make of it.

    Args:
        experiment: names the task.
        spec: what the data are like.
        base: the experiment file's folder.

    Raises:
        InputError: there is no such task, or it does not go with the data, the model section or the loss.
    """
    task, training = make_task(experiment.task, spec, base), experiment.training
    check_balance(training.balance, spec)
    check_hook(task, experiment)
    if training.loss is not None and getattr(task, "output_names", None):
        what = "training.loss is for predictions of the target"
        raise InputError(f"{what}, which task {experiment.task.name!r} does not make")
    if why := unsuited(training.augment, spec.input_shape, tokens=spec.target == "tokens"):
        raise InputError(why)
    prepare = partial(adapt, section=experiment.model, spec=spec, base=base)
    adapted = _Adapted(task, prepare, make_loss(training.loss, task, spec, base))
    adapted.training = rooted(training, base)
    if score := load_score(training.curriculum, base):
        adapted.difficulty = score
    return adapted


class _Adapted:
    """A task whose model and loss are changed; all else is the task's own.

    Attributes:
        difficulty: of examples, in a curriculum with a score of the user's own.
        training: how clients train; moments that are averaged are buffers of the model.
    """

    difficulty: Loss
    training: TrainingSection

    def __init__(self, task: Task, prepare: Callable[[nn.Module], nn.Module], loss: Loss) -> None:
        self._task, self._prepare, self._loss = task, prepare, loss

    def model(self) -> nn.Module:
        return self._prepare(self._task.model())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(outputs, targets)

    def metrics(self) -> Mapping[str, Metric]:
        return self._task.metrics()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while it is unpickled
            raise AttributeError(name)
        return getattr(self._task, name)
