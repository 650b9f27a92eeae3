"""Measuring models on the central test set, and on the clients' held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from flwr.app import MessageType
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedtrain import wire
from fedtrain.data.base import Examples, FederatedData
from fedtrain.errors import FedtrainError, InputError, RunError, shorten
from fedtrain.experiment.sections import Experiment
from fedtrain.importing import raised
from fedtrain.params import Params, load
from fedtrain.records import PERSONAL, Histogram
from fedtrain.server.gate import measurement_objection
from fedtrain.server.mail import Mail
from fedtrain.server.tally import Tally
from fedtrain.tasks.base import Task
from fedtrain.training.attacks import ADVERSARIAL, make_attack
from fedtrain.training.evaluation import add_up, means, weighted_mean
from fedtrain.training.inspection import activations, weights_and_changes
from fedtrain.training.layout import for_model
from fedtrain.training.loop import build_model
from fedtrain.training.metrics.pooled import Counts, PooledMetrics, common_scaling, make_metrics

__all__ = ["CentralTest", "Measured", "Measuring", "Spread"]

Spread = Callable[[Params, Sequence[int]], Iterable[dict[str, Tensor]]]
"""Model and first rows -> `CentralTest.part` of each, in this order, found by several processes."""

_LOOKED_AT = 256  # test examples whose activations are counted
_MEANS = "means"  # of the sums that are the task's own


class CentralTest:
    """Measures models on the central test set.

    Args:
        experiment: says what is measured.
        task: model, loss and metrics.
        data: of the run.
        device: to measure on.
        examples: the test set; None where the server has none that it may measure on.

    Attributes:
        metrics: beside the task's own.
        examples: the test set.
        spread: measures the batches of the test set; they are measured one after another if it is None.

    Raises:
        InputError: a metric or the attack does not suit the data.
    """

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        data: FederatedData,
        device: torch.device,
        examples: Examples | None,
    ) -> None:
        section, scaling = experiment.evaluation, common_scaling(data)
        asked = [name for name in ("metrics", "group", "attack") if getattr(section, name)]
        if asked and getattr(task, "output_names", None):
            what = f"evaluation.{asked[0]} is for predictions of the target"
            raise InputError(
                f"{what}, which task {experiment.task.name!r} does not make",
                hint="Leave it out; the task's own metrics are measured all the same",
            )
        self.metrics = make_metrics(section, data.spec, scaling)
        self._attack = make_attack(section.attack, data.spec, scaling, experiment.seed)
        self._experiment, self._task, self._device, self.examples = experiment, task, device, examples
        self._sums: dict[str, Tensor] = {}
        self.spread: Spread | None = None

    def look(self, after: Params, before: Params) -> dict[str, Histogram]:
        """Histograms of a model's weights, of what a round has changed, and of its activations on the test set."""
        found = weights_and_changes(after, before)
        if self.examples is not None and len(self.examples):
            load(self._model, after)
            seen = Examples(self.examples.inputs[:_LOOKED_AT], self.examples.targets[:_LOOKED_AT])
            found |= activations(self._model, for_model(seen, self._model, self._task).inputs)
        return found

    @cached_property
    def _model(self) -> nn.Module:
        return build_model(self._task, self._experiment.seed).to(self._device)

    @property
    def firsts(self) -> range:
        """Where each batch of the test set begins."""
        return range(0, len(self.examples or ()), self._experiment.evaluation.batch_size)

    @property
    def names(self) -> list[str]:
        """Of all numbers that are measured on any examples, but for those of personal models and of the attack."""
        return ["loss", *self._task.metrics(), *self.metrics.names]

    def measure(self, model: Params) -> dict[str, float]:
        """Find loss and metrics of global parameters; nothing where there are no examples.

        Raises:
            RunError: the task's code fails.
        """
        self._sums = {}
        if not self.examples:
            return {}
        if self.spread and len(self.firsts) > 1:
            parts = self.spread(model, self.firsts)
        else:
            parts = (self.part(None if first else model, first) for first in self.firsts)
        for part in parts:
            self._sums = {name: self._sums[name] + sums if self._sums else sums for name, sums in part.items()}
        numbers = means(self._task, self._sums[_MEANS], len(self.examples)) | self.metrics.numbers(self._sums)
        if self._attack:
            numbers[ADVERSARIAL] = int(self._sums[ADVERSARIAL]) / len(self.examples)
        return numbers

    def part(self, model: Params | None, first: int) -> dict[str, Tensor]:
        """Add up what a batch of the test set says of a model.

        Args:
            model: global parameters; None: those of the call before.
            first: position of the batch's first example.

        Raises:
            RunError: the task's code fails.
        """
        assert self.examples is not None
        if model is not None:
            load(self._model, model)
        rows = slice(first, first + self._experiment.evaluation.batch_size)
        batch, counts = Examples(self.examples.inputs[rows], self.examples.targets[rows]), Counts(self.metrics)
        try:
            batch = for_model(batch, self._model, self._task)  # once for the two below
            found = {_MEANS: add_up(self._model, self._task, batch, counts).cpu(), **counts.sums}
            if self._attack:
                found[ADVERSARIAL] = torch.tensor(self._attack.withstood(self._model, self._task, batch, first))
        except Exception as error:
            raise raised("evaluating on the central test set", error, RunError) from error
        return found

    def confusion(self) -> list[list[int]]:
        """The confusion matrix of the model measured last; empty where it is not asked for."""
        return self.metrics.confusion(self._sums)


@dataclass(frozen=True)
class Measured:
    """What an evaluation on the clients has found."""

    pooled: Mapping[str, float] = field(default_factory=dict)  # as if all their examples lay in one place
    per_client: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)  # of the pooled examples; empty if not asked for


@dataclass(frozen=True)
class Measuring:
    """Asks clients to measure a model.

    Attributes:
        grid: reaches the clients.
        mail: writes and reads messages, and knows the metrics.
        notice: is told of what could not be used.
    """

    grid: Grid
    mail: Mail
    notice: Callable[[str], None]

    def clients(self, params: Params, names: Mapping[int, str], seen: Tally) -> Measured:
        """Measure on each client's held-out examples; clients without any are left out.

        Args:
            params: the global model.
            names: node id -> client, of those that are asked.
            seen: of the round; counts the bytes.
        """
        metrics = self.mail.prices.pooled
        per_client: dict[str, dict[str, float]] = {}
        means: list[tuple[Mapping[str, float], int]] = []
        total: dict[str, Tensor] = {}
        for value in self._measurements(params, names, seen):
            means.append((value.metrics, value.num_examples))
            numbers = {**value.metrics, **_numbers(metrics, value.sums)}
            per_client[value.client_id] = {**numbers, "num_examples": value.num_examples}
            total |= {name: total[name] + sums if name in total else sums for name, sums in value.sums.items()}
        pooled = {**weighted_mean(means), **_numbers(metrics, total)}
        return Measured(pooled, per_client, metrics.confusion(total))

    def _measurements(self, params: Params, names: Mapping[int, str], seen: Tally) -> Iterator[wire.Measurement]:
        """Those that the gate lets through and that have examples, in client order."""
        messages = self.mail.instructions(MessageType.EVALUATE, params, seen, names, {})
        for reply in wire.in_order(self.grid.send_and_receive(messages) if messages else (), names):
            client_id = names[reply.metadata.src_node_id]
            try:
                if reply.has_error():
                    raise RunError(shorten(reply.error.reason, 300))
                value = self.mail.measurement(reply, client_id, seen)
                if why := measurement_objection(value, client_id, self.mail.prices.pooled):
                    raise RunError(why)
            except FedtrainError as error:
                self.notice(f"round {seen.number}: evaluation of {shorten(client_id)} not used: {error}")
                continue
            if value.num_examples:
                yield value


def _numbers(metrics: PooledMetrics, sums: Params) -> dict[str, float]:
    """The metrics of the global model, and of personal ones where their sums are there."""
    found = metrics.numbers(sums) if sums else {}
    own = {name.removeprefix(PERSONAL): values for name, values in sums.items() if name.startswith(PERSONAL)}
    return found | {f"{PERSONAL}{name}": value for name, value in (metrics.numbers(own) if own else {}).items()}
