"""The engine whose clients are elsewhere: behind a hub, and therefore with a time of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Error, Message, MessageType

from fedtrain.flower import CLIENT_AWAY
from fedtrain.link.board import Batch
from fedtrain.link.hub import Hub

__all__ = ["Remote", "Waits"]


@dataclass(frozen=True)
class Waits:
    """How long clients are waited for.

    Attributes:
        patience: seconds without progress; None waits on.
        deadline: seconds in all; None for no such end.
        flowing: clients train on from round to round, and each is waited for by itself.
    """

    patience: float | None = None
    deadline: float | None = None
    flowing: bool = False


class Remote:
    """Asks clients through a hub.

    A client that did not answer, and is not there, is not waited for until it comes back.

    Args:
        hub: serves the clients.
        names: of the clients, in the order of the node ids.
        limit: most bytes of a reply's arrays.
        waits: for how long.
    """

    def __init__(self, hub: Hub, names: Sequence[str], limit: int, waits: Waits) -> None:
        self._hub, self._names, self._limit, self._waits = hub, names, limit, waits
        self._batch = Batch()
        self._gone: set[str] = set()

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        waits = self._waits
        here = {member.name for member in self._hub.members() if member.connected}
        self._gone -= here
        asked = {message.metadata.message_id: self._names[message.metadata.dst_node_id - 1] for message in messages}
        tasks = [(asked[m.metadata.message_id], m) for m in messages if asked[m.metadata.message_id] not in self._gone]
        if waits.flowing and all(message.metadata.message_type == MessageType.TRAIN for message in messages):
            yield from self._flow(messages, tasks)
            return
        silent = {name for name, _ in tasks}
        for reply in self._hub.exchange(tasks, self._limit, waits.patience, waits.deadline):
            if reply.has_content():  # an error may be of the hub's, about one who is not let in any more
                silent.discard(asked[reply.metadata.reply_to_message_id])
            yield reply
        self._gone |= silent

    def close(self) -> None:
        """Want nothing any more of what is under way."""
        self._hub.withdraw(self._batch.tasks)

    def _flow(self, messages: Sequence[Message], tasks: Sequence[tuple[str, Message]]) -> Iterator[Message]:
        known = {name for name, _ in tasks}
        for message in messages:
            if self._names[message.metadata.dst_node_id - 1] not in known:
                self._batch.replies.put(Message(Error(CLIENT_AWAY, "it is not there"), reply_to=message))
        for reply in self._hub.flow(tasks, self._limit, self._waits.patience, self._batch):
            if reply.has_error() and reply.error.code == CLIENT_AWAY:
                self._gone.add(self._names[reply.metadata.src_node_id - 1])
            yield reply
