"""Our Algorithm as a flwr Strategy, and what the round loop needs of any strategy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedtrain import flower, wire
from fedtrain.params import Params, RunningMean, add
from fedtrain.strategies.base import Algorithm, State
from fedtrain.training.evaluation import weighted_mean

__all__ = ["AlgorithmRunner", "FlowerStrategy", "RoundStrategy", "Selector"]

Selector = Callable[[int, Sequence[int]], Sequence[int]]
"""(round number, node ids) -> ids of the nodes to ask, in the order of the sum."""


class RoundStrategy(Protocol):
    """What the round loop asks of a strategy: an Algorithm of ours, or any flwr Strategy."""

    state: State
    """Between two rounds: all that a resumed run needs to go on equal to the byte."""

    def configure(self, round_number: int, params: Params, node_ids: Sequence[int]) -> Sequence[int]:
        """Begin a round; return whom to ask of the nodes that were selected."""

    def share(self) -> Params:
        """Tensors that clients are sent beside the parameters."""

    def extra(self, params: Params) -> Params:
        """Names, shapes and dtypes of the tensors that an update must bring beside its delta."""

    def objection(self, update: wire.Update) -> str | None:
        """Why the strategy cannot use an update that has passed the gate."""

    def aggregate(self, round_number: int, params: Params, updates: Iterable[wire.Update]) -> Params:
        """Turn a round's updates, in client order, into the next parameters; none leave them as they are."""


class AlgorithmRunner:
    """An Algorithm with its state, as the round loop runs it.

    Args:
        algorithm: the server half of a strategy.
        params: the initial global parameters.
        buffers: names of those that are buffers of the model, not trained.
    """

    def __init__(self, algorithm: Algorithm, params: Params, buffers: Collection[str] = ()) -> None:
        self._algorithm = algorithm
        self._buffers = frozenset(() if algorithm.takes_buffers else buffers)
        self.state: State = algorithm.init(self._trained(params))

    def configure(self, round_number: int, params: Params, node_ids: Sequence[int]) -> Sequence[int]:
        return node_ids

    def share(self) -> Params:
        return self._algorithm.share(self.state)

    def extra(self, params: Params) -> Params:
        return self._algorithm.extra(self._trained(params))

    def objection(self, update: wire.Update) -> str | None:
        return self._algorithm.objection(self._without_buffers(update))

    def aggregate(self, round_number: int, params: Params, updates: Iterable[wire.Update]) -> Params:
        buffers = {name: t for name, t in params.items() if name in self._buffers}
        total = RunningMean(like=buffers)

        def passing() -> Iterable[wire.Update]:
            for update in updates:
                total.add(update.delta, update.num_examples)
                yield self._without_buffers(update)

        new, self.state = self._algorithm.apply(self.state, self._trained(params), passing())
        merged = {**new, **(add(buffers, total.mean()) if total.weight else buffers)}
        return {name: merged[name] for name in params}

    def _trained(self, params: Params) -> Params:
        return {name: t for name, t in params.items() if name not in self._buffers}

    def _without_buffers(self, update: wire.Update) -> wire.Update:
        return replace(update, delta=self._trained(update.delta))


class FlowerStrategy(AlgorithmRunner, Strategy):
    """The same as a flwr Strategy, for a Flower server that knows nothing of fedtrain.

    Args:
        algorithm: the server half of a strategy.
        params: the initial global parameters.
        select_train: who trains in a round.
        select_evaluate: who evaluates in a round.
        buffers: names of those of the parameters that are buffers of the model, not trained.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        params: Params,
        select_train: Selector,
        select_evaluate: Selector,
        buffers: Collection[str] = (),
    ) -> None:
        super().__init__(algorithm, params, buffers)
        self._params = params
        self._select_train, self._select_evaluate = select_train, select_evaluate

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._params = flower.tensors(arrays)
        return self._messages(MessageType.TRAIN, self._select_train, server_round, arrays, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Apply the algorithm to the replies as they come; no reply leaves the model as it is."""
        losses: list[tuple[dict[str, float], int]] = []

        def updates() -> Iterable[wire.Update]:
            for reply in replies:
                if reply.has_error():
                    continue
                update = wire.update(reply.content)
                losses.append((dict(update.metrics), update.num_examples))
                yield update

        self._params = self.aggregate(server_round, self._params, updates())
        return flower.array_record(self._params), MetricRecord(dict(weighted_mean(losses)))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._messages(MessageType.EVALUATE, self._select_evaluate, server_round, arrays, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean over the clients' held-out examples."""
        measurements = [wire.measurement(reply.content) for reply in replies if not reply.has_error()]
        return MetricRecord(dict(weighted_mean((m.metrics, m.num_examples) for m in measurements)))

    def summary(self) -> None:
        """Nothing to log: the run's folder records the resolved experiment."""

    def _messages(
        self, kind: str, select: Selector, server_round: int, arrays: ArrayRecord, grid: Grid
    ) -> list[Message]:
        known = grid.get_node_ids()
        node_ids = known if isinstance(known, Sequence) else list(known)
        shared = flower.array_record(self.share())
        return [
            Message(wire.instruction_content(arrays, server_round, shared), node_id, kind, group_id=str(server_round))
            for node_id in select(server_round, node_ids)
        ]
