"""The messages of a round: written, read, and weighed as they pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType

from fedtrain import flower, wire
from fedtrain.params import Params
from fedtrain.rundir import RunFolder
from fedtrain.server.cohort import Cohort
from fedtrain.server.prices import Prices
from fedtrain.server.tally import Tally
from fedtrain.strategies.adapter import RoundStrategy

__all__ = ["Mail"]


@dataclass(frozen=True)
class Mail:
    """Writes instructions, and reads what comes back.

    Attributes:
        prices: what messages weigh, and how parameters travel in them.
        strategy: shares tensors with the clients.
        cohort: remembers the clients' receipts.
        folder: knows how far back the run might go.
        client_name: node id -> client.
        lr_factor: that clients multiply their learning rate with; None where the server has no say in it.
    """

    prices: Prices
    strategy: RoundStrategy
    cohort: Cohort
    folder: RunFolder
    client_name: Callable[[int], str]
    lr_factor: float | None = None

    def instructions(
        self, kind: str, params: Params, seen: Tally, nodes: Iterable[int], work: Mapping[int, float]
    ) -> list[Message]:
        """One message per client; all share one record of the parameters.

        Args:
            kind: of flwr's message types.
            params: the global model.
            seen: of the round; counts the bytes.
            nodes: ids of the clients' nodes.
            work: node -> share of the local steps, where there is not time for all.
        """
        parcel = self.prices.exchange.send(params, kind, seen.number)
        shared = None
        if kind == MessageType.TRAIN:
            seen.received = parcel.received
            shared = flower.array_record(self.strategy.share())
        arrays, kept = flower.array_record(parcel.encoded), self.folder.oldest_checkpoint_round()
        messages = []
        for node in nodes:
            client = self.client_name(node)
            receipt = self.cohort.receipts.get(client, "")
            content = wire.instruction_content(
                arrays,
                seen.number,
                shared,
                work=work.get(node, 1.0),
                kept_round=kept,
                receipt=receipt,
                lr_factor=self.lr_factor,
            )
            seen.count(client, down=wire.size(content))
            messages.append(Message(content, node, kind, group_id=str(seen.number)))
        return messages

    def update(self, reply: Message, client: str, seen: Tally) -> wire.Update:
        """Read and decode an update.

        Raises:
            ClientEndedError: the client says that it takes no further part.
            RunError: it cannot be read.
        """
        seen.count(client, up=wire.size(reply.content))
        update = wire.update(reply.content)
        return replace(update, delta=self.prices.exchange.delta(update.delta, seen.received))

    def measurement(self, reply: Message, client: str, seen: Tally) -> wire.Measurement:
        """Read a measurement.

        Raises:
            RunError: it cannot be read.
        """
        seen.count(client, up=wire.size(reply.content))
        return wire.measurement(reply.content)
