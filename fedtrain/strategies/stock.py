"""Any flwr Strategy, driven round by round: it sees the arrays, the nodes and the replies that it would see in flwr.

fedtrain sends its own messages, for its clients answer with deltas, so what a strategy puts into a message beside the
model has no effect. Where that would change the algorithm silently, the strategy is refused.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flwr_strategies
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedtrain import flower
from fedtrain.errors import FedtrainError, InputError, RunError
from fedtrain.importing import blame
from fedtrain.params import Params, add, snapshot
from fedtrain.seeds import global_torch_seed, seed_of
from fedtrain.strategies.attributes import attributes, restore
from fedtrain.strategies.base import State
from fedtrain.wire import Update

__all__ = ["StockStrategy", "fitted", "naming_failures", "refuse_unsuitable"]

_TREES = "it exchanges XGBoost trees, and fedtrain the tensors of a torch model"
_NO_CLIPPING = (
    "it expects clients that clip by flwr's mods, which fedtrain's do not have: its noise would hide too little"
)
_WEAK_NOISE = "its noise comes from NumPy's global generator, which a run seeds: whoever knows the seed can subtract it"
_UNSUITABLE: Mapping[type[Strategy], str] = {
    flwr_strategies.FedProx: 'its proximal term is the clients\' part; use name = "fedprox"',
    flwr_strategies.FedXgbBagging: _TREES,
    flwr_strategies.FedXgbCyclic: _TREES,
    flwr_strategies.DifferentialPrivacyClientSideAdaptiveClipping: _NO_CLIPPING,
    flwr_strategies.DifferentialPrivacyClientSideFixedClipping: _NO_CLIPPING,
    flwr_strategies.DifferentialPrivacyServerSideAdaptiveClipping: _WEAK_NOISE,
    flwr_strategies.DifferentialPrivacyServerSideFixedClipping: _WEAK_NOISE,
}


class StockStrategy:
    """A flwr Strategy with the interface that the server drives.

    All updates of a round are held at once: flwr's strategies take lists of models.

    Args:
        strategy: the object; it is changed from round to round.
        seed: the experiment's seed, from which the global generators are seeded while the strategy's code runs.
        client_name: node id -> the `client_id` of that node's updates.

    Raises:
        RunError: an attribute of the strategy could not be saved in a checkpoint.
    """

    def __init__(self, strategy: Strategy, seed: int, client_name: Callable[[int], str]) -> None:
        self._strategy, self._seed, self._client_name = strategy, seed, client_name
        self._requests: dict[str, Message] = {}  # by client_id
        attributes(strategy)  # refuses now what no checkpoint could hold

    @property
    def state(self) -> State:
        """A copy of the strategy's attributes, as a checkpoint can save it."""
        return attributes(self._strategy)

    @state.setter
    def state(self, state: State) -> None:
        restore(self._strategy, state)

    def configure(self, round_number: int, params: Params, node_ids: Sequence[int]) -> list[int]:
        """Show the strategy the round's model and nodes.

        Returns:
            The nodes that it chose to ask, in ascending order.

        Raises:
            RunError: it would wait for more nodes, asks more of clients than to train the model, or its code raises.
        """
        if not node_ids:
            return []
        if (wanted := _nodes_wanted(self._strategy, len(node_ids))) > len(node_ids):
            raise RunError(
                f"{self._name} would wait for more clients than take part in round {round_number}",
                got=f"{len(node_ids)} clients",
                expected=f"{wanted}, by its fraction_train, min_train_nodes and min_available_nodes",
            )
        arrays = flower.array_record(snapshot(params))  # a copy, for some strategies keep it
        with self._running("configure_train", round_number):
            messages = list(self._strategy.configure_train(round_number, arrays, ConfigRecord(), _Nodes(node_ids)))
        self._requests.clear()
        for message in messages:
            if why := _objection(message, arrays):
                raise RunError(f"{self._name} cannot run here: {why}")
            node_id = message.metadata.dst_node_id
            flower.set_message_id(message, str(node_id))
            self._requests[self._client_name(node_id)] = message
        return sorted({message.metadata.dst_node_id for message in messages})

    def share(self) -> Params:
        """Nothing: flwr's strategies send the model alone."""
        return {}

    def extra(self, params: Params) -> Params:
        """Nothing: they take models alone."""
        return {}

    def objection(self, update: Update) -> str | None:
        """None: they judge no single update."""
        return None

    def aggregate(self, round_number: int, params: Params, updates: Iterable[Update]) -> dict[str, Tensor]:
        """Let the strategy make the next model of the updates of clients that `configure` chose.

        Returns:
            Tensors of the names, shapes and dtypes of `params`: copies of these if the strategy makes none.

        Raises:
            RunError: its code raises, or what it makes is no such model.
        """
        replies = [self._reply(params, update) for update in updates]
        if not replies:
            return snapshot(params)
        with self._running("aggregate_train", round_number):
            arrays, _ = self._strategy.aggregate_train(round_number, replies)
            result = params if arrays is None else flower.tensors(arrays)
        return fitted(result, params, self._name)

    @property
    def _name(self) -> str:
        return type(self._strategy).__name__

    def _reply(self, params: Params, update: Update) -> Message:
        """What a client of flwr's own would have sent: its model, where ours sends the difference."""
        loss = update.metrics.get("loss", float("nan"))
        metrics = MetricRecord({"num-examples": update.num_examples, "loss": loss, "train_loss": loss})
        content = RecordDict({"arrays": flower.array_record(add(params, update.delta)), "metrics": metrics})
        return Message(content, reply_to=self._requests[update.client_id])

    @contextmanager
    def _running(self, method: str, round_number: int) -> Iterator[None]:
        with (
            naming_failures(f"{self._name}.{method} in round {round_number}"),
            _quiet_flwr(),
            _global_seeds(self._seed, "flwr-strategy", method, round_number),
        ):
            yield


def refuse_unsuitable(kind: type[Strategy]) -> None:
    """Refuse those of flwr's strategies that would do something else here than they promise.

    Raises:
        InputError: `kind` is one of them, or inherits from one.
    """
    for unsuitable, why in _UNSUITABLE.items():
        if issubclass(kind, unsuitable):
            raise InputError(f"flwr's {unsuitable.__name__} cannot run here: {why}")


def fitted(result: Params, params: Params, name: str) -> dict[str, Tensor]:
    """Copy what foreign code made to the dtypes of the model that it is to replace.

    Args:
        result: what it made.
        params: the model: names, shapes and dtypes.
        name: of the strategy, for the error.

    Raises:
        RunError: other names or shapes, or a value that is not finite.
    """
    if result.keys() != params.keys():
        lacks, more = (sorted(a - b) for a, b in ((params.keys(), result.keys()), (result.keys(), params.keys())))
        what = f"without {', '.join(lacks) or 'none'}; with {', '.join(more) or 'none'}"
        raise RunError(f"{name} made a model with other tensors", got=what, expected="the model's names")
    new: dict[str, Tensor] = {}
    for key, t in params.items():
        if result[key].shape != t.shape:
            got, expected = tuple(result[key].shape), tuple(t.shape)
            raise RunError(f"{name} changed the shape of {key}", got=got, expected=str(expected))
        new[key] = torch.empty(t.shape, dtype=t.dtype).copy_(result[key])
        if not new[key].isfinite().all():
            raise RunError(f"{name} made NaN or infinite values in {key}", hint="Its learning rate may be too high")
    return new


@contextmanager
def naming_failures(what: str) -> Iterator[None]:
    """Turn what a user's or flwr's code raises into one line that names its place."""
    try:
        yield
    except FedtrainError:
        raise
    except Exception as exc:
        raise RunError(f"{what} failed at {blame(exc)}") from exc


class _Nodes(Grid):
    """What a strategy sees of the grid: whom it may ask. The messages are the server's."""

    def __init__(self, node_ids: Sequence[int]) -> None:
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> list[int]:
        return list(self._node_ids)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RunError("a flwr Strategy can send no messages of its own here")

    create_message = flower.BaseGrid.create_message
    set_run = push_messages = pull_messages = send_and_receive = _refuse
    run = property(_refuse)


def _nodes_wanted(strategy: Strategy, available: int) -> int:
    """How many nodes flwr's `sample_nodes` waits for, also where one strategy wraps another."""
    return max(
        int(available * getattr(strategy, "fraction_train", 0.0)),
        getattr(strategy, "min_train_nodes", 0),
        getattr(strategy, "min_available_nodes", 0),
        *(_nodes_wanted(inner, available) for inner in vars(strategy).values() if isinstance(inner, Strategy)),
    )


def _objection(message: Message, arrays: ArrayRecord) -> str | None:
    """Say what the strategy tells clients that ours would not hear."""
    for record in message.content.config_records.values():
        if unheard := sorted(record.keys() - {"server-round"}):
            return f"it sends clients {', '.join(unheard)}, which fedtrain's clients do not read"
    for sent in message.content.array_records.values():
        if sent.keys() != arrays.keys() or any(sent[name] is not array for name, array in arrays.items()):
            return "it sends clients other arrays than the global model"
    return None


@contextmanager
def _quiet_flwr() -> Iterator[None]:
    """Keep flwr's progress lines from the console; its warnings still show."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _global_seeds(seed: int, *names: str | int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch, which flwr's code draws on, and put them back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed_of(seed, *names))
    np.random.seed(seed_of(seed, *names) % 2**32)  # noqa: NPY002
    try:
        with global_torch_seed(seed, *names):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
