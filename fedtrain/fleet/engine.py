"""Our messages over flwr's own Grid, to the SuperNodes of a fleet."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import Array, ArrayRecord, Error, Message, MessageType, Metadata, RecordDict
from flwr.serverapp import Grid

from fedtrain import flower
from fedtrain.errors import InputError, RunError, shorten
from fedtrain.fleet.settings import NodeSettings, RunSettings

__all__ = ["FleetEngine", "plain"]

_POLL = 0.5  # seconds between two looks for replies, of which flwr's Grid tells nobody
_QUERY_SECONDS = 60.0  # for a SuperNode to start our ClientApp once


def plain(content: RecordDict, known: dict[int, ArrayRecord] | None = None) -> RecordDict:
    """Copy a message's content with arrays of flwr's own class, which other processes can read.

    Args:
        content: as `fedtrain.wire` writes it.
        known: arrays by the id of the record that they were made from, so that messages go on sharing them.
    """
    known = {} if known is None else known
    copy = RecordDict()
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            if id(record) not in known:
                known[id(record)] = ArrayRecord({name: Array(t.numpy()) for name, t in flower.tensors(record).items()})
            copy[key] = known[id(record)]
        else:
            copy[key] = record
    return copy


class FleetEngine:
    """The engine over flwr's Grid. Node ids on our side are positions among the clients, from 1.

    Args:
        grid: of the ServerApp that runs in this process; nothing has made a grid of ours here yet.
        client_ids: names in the order of our node ids.
        settings: how long to wait.
        notice: is told which SuperNodes and clients take no part.

    Raises:
        RunError: no client has a SuperNode.
    """

    def __init__(
        self, grid: Grid, client_ids: Sequence[str], settings: RunSettings, notice: Callable[[str], None]
    ) -> None:
        self._grid, self._client_ids, self._patience, self._notice = grid, client_ids, settings.patience, notice
        self._sender = Message(RecordDict(), 1, MessageType.QUERY).metadata  # flwr's ids of the run and the task
        self._clients: dict[int, str] = {}  # SuperNode -> its client; "" for one that is none of ours
        self._nodes: dict[str, int] = {}  # client -> its SuperNode, if that is alive
        end = time.monotonic() + settings.wait
        self._meet()
        while len(self._nodes) < len(client_ids) and time.monotonic() < end:
            time.sleep(_POLL)
            self._meet()
        if not self._nodes:
            raise RunError(
                "no SuperNode serves a client of this experiment",
                got=f"{len(self._clients)} other SuperNodes after {settings.wait:g} s",
                expected="one per client, with its client-id or partition-id in --node-config",
            )
        if missing := [name for name in client_ids if name not in self._nodes]:
            notice(f"{len(missing)} of {len(client_ids)} clients have no SuperNode, such as {shorten(missing[0])}")

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yield replies as they come; that of a client without a SuperNode is an error."""
        self._meet()
        known: dict[int, ArrayRecord] = {}
        asked, sent = [], []
        for message in messages:
            node = self._nodes.get(self._client_ids[message.metadata.dst_node_id - 1])
            if node is None:
                yield _reply(Error(flower.CLIENT_FAILED, "no SuperNode of the fleet serves this client"), message)
            else:
                asked.append(message)
                sent.append(self._addressed(plain(message.content, known), node, message.metadata))
        answered = 0
        for position, answer in self._answers(sent, self._patience):
            answered += 1
            yield _reply(answer.error if answer.has_error() else answer.content, asked[position])
        if answered < len(asked):
            took = f"in {self._patience:g} seconds: --patience is for a whole round here"
            self._notice(f"{answered} of {len(asked)} clients have answered {took}")

    def _meet(self) -> None:
        """Ask SuperNodes that are new whose they are; note which are alive."""
        alive = set(self._grid.get_node_ids())
        new = sorted(alive - self._clients.keys())
        self._clients |= dict.fromkeys(new, "")
        questions = [self._addressed(RecordDict(), node, self._sender) for node in new]
        for position, answer in self._answers(questions, _QUERY_SECONDS):
            self._clients[new[position]] = self._name(answer)
        self._nodes = {}
        for node, client in self._clients.items():
            if client and node in alive:
                self._nodes.setdefault(client, node)
        for node in new:
            client = self._clients[node]
            if client and self._nodes[client] != node:
                self._notice(f"a second SuperNode says that it is {shorten(client)}: it is not asked")

    def _name(self, answer: Message) -> str:
        """The client that a SuperNode serves; "" if it is none of ours."""
        try:
            if answer.has_error():
                raise InputError(shorten(answer.error.reason, 300))
            return NodeSettings.introduced(answer.content).name_among(self._client_ids)
        except InputError as error:
            self._notice(f"a SuperNode takes no part: {error}")
            return ""

    def _addressed(self, content: RecordDict, node: int, like: Metadata) -> Message:
        sender = self._sender
        metadata = Metadata(
            run_id=sender.run_id,
            message_id="",  # flwr names it by its content
            src_node_id=sender.src_node_id,
            dst_node_id=node,
            reply_to_message_id="",
            group_id=like.group_id,
            created_at=time.time(),  # noqa: TID251 - a date
            ttl=like.ttl,
            message_type=like.message_type,
            src_task_id=sender.src_task_id,
        )
        return flower.message(content, metadata)

    def _answers(self, sent: list[Message], seconds: float) -> Iterator[tuple[int, Message]]:
        """Send messages; yield what came back, one at a time, each with the position of what it answers."""
        if not sent:
            return
        ids = list(self._grid.push_messages(sent))
        if len(ids) != len(sent) or not all(ids):
            raise RunError("the SuperLink did not take a message", hint="Its own log says why")
        sent.clear()  # the SuperLink holds them now
        waiting = dict(zip(ids, itertools.count()))
        end = time.monotonic() + seconds
        while waiting:
            for message_id in list(waiting):
                for answer in self._grid.pull_messages([message_id]):
                    yield waiting.pop(message_id), answer
            if time.monotonic() > end:
                return
            if waiting:
                time.sleep(_POLL)


def _reply(content: RecordDict | Error, message: Message) -> Message:
    reply = Message(content, reply_to=message)
    flower.set_message_id(reply, f"reply-{message.metadata.message_id}")
    return reply
