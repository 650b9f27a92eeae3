"""What a round comes to know of its clients."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

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
    bytes_up: int = 0
    bytes_down: int = 0

    def note_silence(self) -> None:
        """Count those who were asked and never replied as late."""
        self.late += [client for node, client in self.names.items() if node not in self.replied]

    def silent(self, nodes: Mapping[int, int]) -> list[int]:
        """Positions of the clients that were asked and have sent nothing of use."""
        gone = {*self.quarantined, *self.ended, *self.late}
        return [nodes[node] for node, client in self.names.items() if client in gone]
