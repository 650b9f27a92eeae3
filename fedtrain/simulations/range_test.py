"""The range test of learning rates: which rate a client's loss falls fastest at, and where it diverges.

References:
    Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3, with a rate that grows
    exponentially and not linearly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedtrain import params
from fedtrain.data.base import Examples
from fedtrain.data.federated import PartitionedData
from fedtrain.errors import InputError, nearest
from fedtrain.experiment.sections import Experiment
from fedtrain.seeds import generator
from fedtrain.tasks.base import Task
from fedtrain.training.loop import Assignment, Recipe, Trainer

__all__ = ["RangeTest", "Rates", "find_clients", "range_test"]

_Curve = npt.NDArray[np.float64]
_MEMORY = 0.9  # of the running mean by which divergence is told
_DIVERGED = 4.0  # times the least running mean


@dataclass(frozen=True)
class Rates:
    """The learning rates to try, one in each step, growing by the same factor.

    Raises:
        InputError: there are no such rates.
    """

    low: float = 1e-6
    high: float = 10.0
    steps: int = 100

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < math.inf):
            raise InputError(
                "learning rates must grow", got=f"{self.low:g} to {self.high:g}", expected="0 < --from < --to"
            )
        if self.steps < 10:
            raise InputError("so few steps show no curve", got=f"--steps {self.steps}", expected="at least 10")

    def at(self, share: float) -> float:
        """The rate when this share of the steps is done; the last step has the highest."""
        return float(self.low * (self.high / self.low) ** (share * self.steps / (self.steps - 1)))


@dataclass(frozen=True)
class RangeTest:
    """What was found.

    Attributes:
        rates: `(N,)` that were tried, until the first client diverged.
        losses: `(N,)` training loss of each step before it was taken, mean over clients.
        smoothed: `(N,)` the same as means over neighbours.
        diverged: whether the loss rose to 4 times its least before the highest rate.
    """

    rates: _Curve
    losses: _Curve
    smoothed: _Curve
    diverged: bool

    @property
    def least(self) -> float:
        """The rate with the least loss."""
        return float(self.rates[self.smoothed.argmin()])

    @property
    def steepest(self) -> float | None:
        """The rate at which the loss falls fastest, per decade of the rate; None if it does not fall."""
        end = int(self.smoothed.argmin())
        if end == 0:
            return None
        slopes = np.gradient(self.smoothed, np.log(self.rates))
        return float(self.rates[slopes[: end + 1].argmin()])


def find_clients(data: PartitionedData, names: Sequence[str], count: int | None, seed: int) -> list[str]:
    """Find the clients of a range test: those named, so many by lot, or the one with the most examples.

    Args:
        data: the clients'.
        names: of clients.
        count: how many to draw; None for no draw.
        seed: the experiment's.

    Raises:
        InputError: there are no such clients, or not so many with training examples.
    """
    sizes = dict(zip(data.client_ids(), data.sizes().tolist(), strict=True))
    present = [client for client, size in sizes.items() if size]
    for name in names:
        if name not in sizes:
            raise InputError("there is no such client", got=name, hint=nearest(name, sizes, otherwise=""))
        if not sizes[name]:
            raise InputError("this client has no training examples", got=name)
    if names and count is not None:
        raise InputError("--client names clients and --clients draws some", hint="Give one of both")
    if not present or (count is not None and not 1 <= count <= len(present)):
        raise InputError(
            "there are not so many clients with training examples", got=count, expected=f"1 to {len(present)}"
        )
    if count is not None:
        drawn = generator(seed, "lr-find").choice(len(present), count, replace=False)
        return [present[i] for i in sorted(drawn)]
    return list(dict.fromkeys(names)) or [max(present, key=sizes.__getitem__)]


def range_test(
    experiment: Experiment, task: Task, examples: Sequence[tuple[str, Examples]], device: torch.device, rates: Rates
) -> RangeTest:
    """Train from the initial model at growing learning rates, as the experiment's clients do in their first round.

    A strategy's own part of a step is not in it, and neither is the schedule. No file of a run is touched.

    Args:
        experiment: how clients train.
        task: model and loss, as `experiment_task` gives it.
        examples: names and training examples of some clients, at least one.
        device: where to train.
        rates: to try.

    Raises:
        InputError: the experiment is private, or the loss is no number from the first step on.
    """
    if experiment.privacy is not None:
        raise InputError(
            "a range test shows losses on the clients' examples, which have no noise",
            got=f'privacy.unit = "{experiment.privacy.unit}"',
            hint="Try it without [privacy], on public data of the same kind",
        )
    curves = [_losses(experiment, task, client, device, rates) for client in examples]
    shortest = min(map(len, curves))
    if shortest < 2:
        raise InputError("the loss is no finite number from the first step on", hint="Lower --from")
    losses = np.mean([curve[:shortest] for curve in curves], axis=0)
    tried = np.array([rates.at(step / rates.steps) for step in range(shortest)])
    return RangeTest(tried, losses, _smoothed(losses, rates.steps // 20), shortest < rates.steps)


class _DivergedError(Exception):
    """A client's loss has grown so far that larger rates tell nothing more."""


class _Watched:
    """A task whose losses are noted, step by step, until they diverge; all else is the task's own."""

    def __init__(self, task: Task) -> None:
        self._task, self._step = task, list[Tensor]()
        self._mean, self._least = 0.0, math.inf
        self.losses: list[float] = []

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self._task.loss(outputs, targets)
        if torch.is_grad_enabled():  # else it is measured and not trained on
            self._step.append(losses.detach().flatten())
        return losses

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._task, name)
        if name != "batch_loss":
            return found

        def hook(*arguments: Any) -> Tensor:
            losses: Tensor = found(*arguments)
            self._step.append(losses.detach().flatten())
            return losses

        return hook

    def end_step(self) -> None:
        """Note the mean loss of the step, whose batch may have come in several parts.

        Raises:
            _DivergedError: it has diverged.
        """
        loss = float(torch.cat(self._step).double().mean())
        self._step.clear()
        if not math.isfinite(loss):
            raise _DivergedError
        self.losses.append(loss)
        self._mean = _MEMORY * self._mean + (1 - _MEMORY) * loss
        mean = self._mean / (1 - _MEMORY ** len(self.losses))
        self._least = min(self._least, mean)
        if mean > self._least + (_DIVERGED - 1) * abs(self._least):  # losses may be negative
            raise _DivergedError


def _losses(
    experiment: Experiment, task: Task, client: tuple[str, Examples], device: torch.device, rates: Rates
) -> _Curve:
    """Loss of each step of one client, until it diverges."""
    steps = {"local_epochs": None, "local_steps": rates.steps, "optimizer_state": "reset", "compile": False}
    training = getattr(task, "training", experiment.training).model_copy(update=steps)
    watched, (name, examples) = _Watched(task), client
    recipe = Recipe(training, model=experiment.model)
    trainer = Trainer(watched, recipe, experiment.seed, device, watched.end_step)
    initial = params.snapshot(params.exchanged(trainer.model))
    lr = training.optimizer.lr
    with contextlib.suppress(_DivergedError):
        trainer.train(Assignment(1, name, initial, rate=lambda share: rates.at(share) / lr), examples)
    return np.array(watched.losses)


def _smoothed(losses: _Curve, reach: int) -> _Curve:
    """Means over neighbours on both sides, the nearer the heavier: a running mean would lag behind."""
    kernel = np.r_[1 : reach + 2, reach:0:-1].astype(np.float64)
    padded = np.convolve(losses, kernel)[reach : reach + len(losses)]
    weights = np.convolve(np.ones(len(losses)), kernel)[reach : reach + len(losses)]
    return np.asarray(padded / weights, dtype=np.float64)
