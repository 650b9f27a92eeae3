"""flwr's Grid over the hub: what the round loop and any flwr Strategy see of remote clients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from flwr.app import Message

from fedtrain.flower import BaseGrid, set_message_id
from fedtrain.link.hub import Hub

__all__ = ["LinkGrid"]


class LinkGrid(BaseGrid):
    """Reaches clients through a hub. Node ids are 1 to the number of names.

    Args:
        hub: serves the clients.
        names: gives the clients' names in the order of the node ids, which only grows.
        limit: most bytes of a reply's arrays.
        patience: see `Hub.exchange`.
        deadline: likewise, where a caller sets no timeout.
    """

    def __init__(
        self,
        hub: Hub,
        names: Callable[[], Sequence[str]],
        limit: int,
        patience: float | None = None,
        deadline: float | None = None,
    ) -> None:
        super().__init__(run_id=1)
        self._hub, self._names = hub, names
        self._limit, self._patience, self._deadline = limit, patience, deadline
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Sequence[int]:
        return range(1, len(self._names()) + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        for reply in self.send_and_receive(sent):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield replies as they come; who does not answer in time is left out."""
        names, tasks = self._names(), []
        for message in messages:
            set_message_id(message, str(next(self._ids)))
            tasks.append((names[message.metadata.dst_node_id - 1], message))
        deadline = self._deadline if timeout is None else timeout
        return self._hub.exchange(tasks, self._limit, self._patience, deadline)
