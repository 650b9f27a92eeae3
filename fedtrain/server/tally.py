"""What a round comes to know of its clients."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedtrain.experiment.privacy import PrivacySection
from fedtrain.params import Params
from fedtrain.records import RoundRecord
from fedtrain.server.drift import Drift
from fedtrain.training.evaluation import weighted_mean

__all__ = ["Tally"]


@dataclass
class Tally:
    """What is learned of a round while its replies stream by."""

    number: int
    names: dict[int, str]  # node id -> client, in client order
    late: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    started: dict[int, int] = field(default_factory=dict)  # node id -> round, for those that began in an earlier one
    passed: int = 0  # updates that the gate let through
    replied: set[int] = field(default_factory=set)
    participants: list[str] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    losses: list[tuple[dict[str, float], int]] = field(default_factory=list)  # with the examples behind them
    staleness: list[int] = field(default_factory=list)
    client_bytes: dict[str, tuple[int, int]] = field(default_factory=dict)  # up and down
    received: Params = field(default_factory=dict)  # the model that this round's clients start from
    drift: Drift | None = None

    def count(self, client: str, *, up: int = 0, down: int = 0) -> None:
        """Count bytes of a message from a client, or to it."""
        before = self.client_bytes.get(client, (0, 0))
        self.client_bytes[client] = before[0] + up, before[1] + down

    @property
    def bytes_up(self) -> int:
        """Of all clients."""
        return sum(up for up, _ in self.client_bytes.values())

    @property
    def bytes_down(self) -> int:
        """To all clients."""
        return sum(down for _, down in self.client_bytes.values())

    def note_silence(self) -> None:
        """Count those who were asked and never replied as late."""
        self.late += [client for node, client in self.names.items() if node not in self.replied]

    def silent(self, nodes: Mapping[int, int]) -> list[int]:
        """Positions of the clients that were asked and have sent nothing of use."""
        gone = {*self.quarantined, *self.ended, *self.late}
        return [nodes[node] for node, client in self.names.items() if client in gone]

    def record(self, privacy: PrivacySection | None) -> RoundRecord:
        """Write down what was learned.

        Args:
            privacy: of the experiment, which says what may not be told.
        """
        protects_clients = privacy is not None and privacy.unit == "client"
        return RoundRecord(
            round_number=self.number,
            participants=self.participants,
            quarantined=self.quarantined,
            set_aside=self.set_aside,
            ended=self.ended,
            late=self.late,
            num_examples=0 if privacy else sum(examples for _, examples in self.losses),
            train=weighted_mean(self.losses),
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            client_bytes={} if protects_clients else self.client_bytes,
            drift=self.drift.clients() if self.drift else {},
            diversity=self.drift.diversity() if self.drift else None,
            staleness=sum(self.staleness) / max(1, len(self.staleness)),
        )
