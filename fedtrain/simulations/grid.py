"""A grid whose clients live on this machine: flwr's Grid over an engine that runs the ClientApp."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtrain.client.app import CLIENT_ID
from fedtrain.errors import FedtrainError
from fedtrain.flower import CLIENT_FAILED, BaseGrid, set_message_id
from fedtrain.importing import blame

__all__ = ["Engine", "InProcess", "SimulationGrid", "answer"]


class Engine(Protocol):
    """Runs the ClientApp for messages."""

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yield one reply per message, in any order; what is not consumed is not run."""


def answer(app: ClientApp, message: Message, client_id: str) -> Message:
    """Let one client answer one message; its failure is an error reply, never an exception."""
    node_id = message.metadata.dst_node_id
    context = Context(message.metadata.run_id, node_id, {CLIENT_ID: client_id}, RecordDict(), {})
    try:
        reply = app(message, context)
    except Exception as error:  # one bad client is one line in the report
        reply = Message(Error(CLIENT_FAILED, _reason(error)), reply_to=message)
    set_message_id(reply, f"reply-{message.metadata.message_id}")
    return reply


class InProcess:
    """Runs one client after another in this process.

    Args:
        app: serves every client.
        client_ids: names in the order of the node ids.
    """

    def __init__(self, app: ClientApp, client_ids: Sequence[str]) -> None:
        self._app, self._client_ids = app, client_ids

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            yield answer(self._app, message, self._client_ids[message.metadata.dst_node_id - 1])


class SimulationGrid(BaseGrid):
    """flwr's Grid over an engine. Node ids are 1 to the number of clients; nothing is held per client.

    Args:
        engine: runs the clients.
        num_clients: registered clients.
    """

    def __init__(self, engine: Engine, num_clients: int) -> None:
        super().__init__(run_id=1)
        self._engine, self._num_clients = engine, num_clients
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Sequence[int]:
        return range(1, self._num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = self._identified(messages)
        for reply in self._engine.run(sent):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield replies as they come, so that the receiver decides how many are held at once."""
        return self._engine.run(self._identified(messages))

    def _identified(self, messages: Iterable[Message]) -> list[Message]:
        sent = list(messages)
        for message in sent:
            set_message_id(message, str(next(self._ids)))
        return sent


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, FedtrainError) else f"failed at {blame(error)}"
