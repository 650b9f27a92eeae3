"""How long one local step takes on this machine."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from fedtrain import params
from fedtrain.data.base import FederatedData
from fedtrain.errors import RunError
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.privacy.accounting import Spend
from fedtrain.tasks.base import Task
from fedtrain.training.loop import Assignment, Recipe, Trainer

__all__ = ["measure_step"]

_WARM_UP = 3  # steps that also load code and choose algorithms
_STEPS = 30
_LEAST = 5  # steps that are timed however slow they are
_ENOUGH = 3.0  # seconds of timed steps


class _EnoughError(Exception):
    """The steps that were wanted have been taken."""


@dataclass
class _Stopwatch:
    device: torch.device
    moments: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.moments.append(time.perf_counter())
        timed = self.moments[_WARM_UP:]
        if len(timed) > _STEPS or (len(timed) > _LEAST and timed[-1] - timed[0] > _ENOUGH):
            raise _EnoughError


def measure_step(experiment: Experiment, task: Task, data: FederatedData, device: torch.device) -> float:
    """Time local steps of an experiment on a model of its own; no random stream of the run is touched.

    The client with the most examples takes them, with the experiment's batch size, optimiser, precision and privacy. A
    strategy's own part of a step is not in it.

    Args:
        experiment: how clients train.
        task: model and loss.
        data: the clients' examples.
        device: where to train.

    Returns:
        The median in seconds, some first steps left out.

    Raises:
        RunError: there are no examples here to train on.
    """
    sizes = data.sizes()
    examples = data.client(data.client_ids()[int(sizes.argmax())]).train
    if not len(examples):
        raise RunError(
            "a step cannot be timed without examples",
            hint="Give clients.duration.step_seconds a number",
        )
    most = _WARM_UP + _STEPS + 1
    training = getattr(task, "training", experiment.training)
    training = training.model_copy(update={"local_epochs": None, "local_steps": most})
    privacy = experiment.privacy if isinstance(experiment.privacy, SamplePrivacy) else None
    rate = min(1.0, training.batch_size / len(examples))
    charge = Spend(1.0, rate, most) if privacy else None  # nothing leaves this function, so nothing is spent
    stopwatch = _Stopwatch(device)
    trainer = Trainer(
        task, Recipe(training, privacy=privacy, model=experiment.model), experiment.seed, device, stopwatch
    )
    initial = params.snapshot(params.exchanged(trainer.model))
    with contextlib.suppress(_EnoughError):
        # As in the last round, when nothing is frozen or left out any more.
        trainer.train(Assignment(experiment.rounds, "calibration", initial, charge=charge), examples)
    return float(np.median(np.diff(stopwatch.moments[_WARM_UP:])))
