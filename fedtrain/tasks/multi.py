"""Several answers for one input: labels that go together, and several tasks on one network.

A target is then the combination of the answers, as one class whose name spells it out: "rain+wind", or "7/odd". So
partitions, splits, reports and predictions treat it as they treat any class. The model answers each question by
itself, and gives each combination that there is the log-probability that these answers make it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.tasks.base import Metric
from fedtrain.tasks.checks import needs_classes
from fedtrain.tasks.networks import build_network

__all__ = ["MultiLabel", "MultiTask"]


class MultiTask:
    """One network with a head for each of several tasks, each of which is a class to predict.

    Args:
        spec: data with classes named after their parts: "7/odd" is class 7 of the first task and odd of the second.
        names: of the tasks, in this order; task1, task2, ... unless given.
        weights: factor of each task's loss; or "uncertainty": log-variances that are learned with the model, and
            travel with it.
        network: what all heads share, by the name of a classifier's task.
        network_options: its options, such as { hidden = [64] }.
        separator: between the parts of a class's name.

    References:
        Kendall, Gal, Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018.
    """

    def __init__(
        self,
        spec: DataSpec,
        names: Sequence[str] = (),
        weights: str | Sequence[float] = (),
        network: str = "mlp",
        network_options: Mapping[str, Any] | None = None,
        separator: str = "/",
    ) -> None:
        needs_classes("multi-task", spec)
        parts = [name.split(separator) for name in spec.class_names] if separator else []
        count = len(parts[0]) if parts else 0
        if count < 2 or any(len(part) != count for part in parts):
            raise TaskError(
                "task 'multi-task' needs classes of two or more parts each",
                got=", ".join(spec.class_names[:3]),
                expected=f'parts with {separator!r} between them, such as "7{separator}odd"',
            )
        self.names = tuple(names) or tuple(f"task{number}" for number in range(1, count + 1))
        if len(self.names) != count or not all(isinstance(name, str) for name in self.names):
            raise TaskError("the task option 'names' is wrong", got=names, expected=f"{count} names")
        choices = [list(dict.fromkeys(part)) for part in zip(*parts)]
        self.answers = torch.tensor([[c.index(a) for c, a in zip(choices, part)] for part in parts])
        self.sizes = tuple(map(len, choices))
        self.weights = _weights(weights, count)
        self._network = build_network(network, spec, sum(self.sizes), network_options)
        self.channels_last: bool = getattr(self._network, "channels_last", False)

    def model(self) -> nn.Module:
        """Network and heads; `(B, combinations)` weighted log-probabilities."""
        return _Combined(self._network.model(), self.answers, self.sizes, self.weights)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Weighted sum of the tasks' cross-entropies of each example, in nats: `(B,)`."""
        return -outputs.gather(1, targets[:, None])[:, 0]

    def metrics(self) -> Mapping[str, Metric]:
        """`accuracy`: of the whole combination; `accuracy_NAME`: of one task's part of it."""

        def of(column: int) -> Metric:
            answers = self.answers[:, column]
            return lambda outputs, targets: _same(answers, outputs, targets)

        return {"accuracy": _exact, **{f"accuracy_{name}": of(column) for column, name in enumerate(self.names)}}


class MultiLabel(MultiTask):
    """Several labels for one input, each there or not: a task of its own for each label.

    Args:
        spec: data with classes named after the labels that are there: "rain+wind".
        nothing: name of the class of no label at all.
        network: what all labels share, by the name of a classifier's task.
        network_options: its options, such as { hidden = [64] }.
        separator: between the labels in a class's name.
    """

    def __init__(
        self,
        spec: DataSpec,
        nothing: str = "none",
        network: str = "mlp",
        network_options: Mapping[str, Any] | None = None,
        separator: str = "+",
    ) -> None:
        needs_classes("multi-label", spec)
        if not separator:
            raise TaskError("the task option 'separator' is wrong", got=separator, expected="one or more characters")
        sets = [set() if name == nothing else set(name.split(separator)) for name in spec.class_names]
        self.labels = tuple(sorted(set().union(*sets)))
        if len(self.labels) < 2:
            raise TaskError(
                "task 'multi-label' needs two or more labels",
                got=", ".join(spec.class_names[:3]),
                expected=f'classes such as "rain{separator}wind"',
            )
        self.answers = torch.tensor([[label in chosen for label in self.labels] for chosen in sets], dtype=torch.int64)
        self.sizes, self.weights = (2,) * len(self.labels), (1.0,) * len(self.labels)
        self._network = build_network(network, spec, sum(self.sizes), network_options)
        self.channels_last = getattr(self._network, "channels_last", False)

    def metrics(self) -> Mapping[str, Metric]:
        """`accuracy`: of the whole set; `missed` and `wrong`: labels left out, and labels too many, of all labels."""

        def missed(outputs: Tensor, targets: Tensor) -> Tensor:
            return self._share(targets, outputs.argmax(1))

        def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
            return self._share(outputs.argmax(1), targets)

        return {"accuracy": _exact, "missed": missed, "wrong": wrong}

    def _share(self, these: Tensor, those: Tensor) -> Tensor:
        """Share of the labels that are in these sets, and not in those."""
        answers = self.answers.to(these.device)
        return (answers[these] > answers[those]).float().mean(1)


class _Combined(nn.Module):
    """Log-probabilities of combinations from the logits of all tasks, which lie beside each other.

    Args:
        network: `(B, sum of sizes)` logits.
        answers: `(combinations, tasks)` which class of each task makes up a combination.
        sizes: classes of each task.
        weights: of the tasks; None to learn log-variances.
    """

    def __init__(
        self, network: nn.Module, answers: Tensor, sizes: Sequence[int], weights: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.network, self.sizes, self.weights = network, list(sizes), weights
        self.answers: Tensor
        self.register_buffer("answers", answers, persistent=False)
        if weights is None:
            self.log_variances = nn.Parameter(torch.zeros(len(self.sizes)))

    def forward(self, inputs: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for number, logits in enumerate(self.network(inputs).split(self.sizes, 1)):
            of_task = logits.log_softmax(1)[:, self.answers[:, number]]
            if self.weights is None:
                s = self.log_variances[number]
                total = total + (-s).exp() * of_task - s / 2  # equation 10 with s = log sigma^2
            else:
                total = total + self.weights[number] * of_task
        assert isinstance(total, Tensor)
        return total


def _weights(given: str | Sequence[float], count: int) -> tuple[float, ...] | None:
    if isinstance(given, str):
        if given == "uncertainty":
            return None
    elif all(isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < float("inf") for w in given):
        if len(given) == count and any(given):
            return tuple(map(float, given))
        if not given:
            return (1.0,) * count
    raise TaskError(
        "the task option 'weights' is wrong", got=given, expected=f'{count} numbers of at least 0, or "uncertainty"'
    )


def _exact(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float()


def _same(answers: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    answers = answers.to(outputs.device)
    return (answers[outputs.argmax(1)] == answers[targets]).float()
