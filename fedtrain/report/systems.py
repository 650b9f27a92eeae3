"""How long a run takes on its clients' machines and links, and whose updates it uses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from fedtrain.measures import gini
from fedtrain.records import RoundRecord
from fedtrain.report.view import RunView

__all__ = ["Clock", "Participation", "Use"]


@dataclass(frozen=True)
class Clock:
    """A run on its virtual clock; seconds."""

    seconds: float  # of the whole run
    median: float  # of a round
    p95: float  # of a round
    longest: tuple[int, float]  # round and its length
    client_seconds: float  # that clients have worked
    wasted_seconds: float  # of these, without use

    @classmethod
    def of(cls, run: RunView) -> Clock | None:
        """Sum the clock up over the rounds that took time on it; None if none did."""
        rounds = [r for r in run.records if r.virtual_seconds]
        if not rounds:
            return None
        lengths = np.array([r.virtual_seconds for r in rounds])
        median, p95 = np.quantile(lengths, [0.5, 0.95]).tolist()
        longest = rounds[int(lengths.argmax())]
        return cls(
            seconds=float(lengths.sum()),
            median=median,
            p95=p95,
            longest=(longest.round_number, longest.virtual_seconds),
            client_seconds=sum(r.client_seconds for r in rounds),
            wasted_seconds=sum(r.wasted_seconds for r in rounds),
        )

    @property
    def wasted_share(self) -> float:
        """The wasted part of the clients' work, 0 to 1."""
        return self.wasted_seconds / self.client_seconds if self.client_seconds else 0.0


@dataclass(frozen=True)
class Use:
    """How often one client's update was used."""

    client: str
    used: int  # rounds
    examples: int | None  # that it holds; None if not known


@dataclass(frozen=True)
class Participation:
    """Whose updates a run has used."""

    clients: int  # that there are
    updates: int  # that were used
    uses: tuple[Use, ...]  # of the clients that are known by name, the least used first
    least: int  # rounds that the update of the client used least was used in
    most: int  # rounds that the update of the client used most was used in
    never: int  # clients whose update was never used
    gini: float  # of how often clients were used; 0 if all equally often

    @classmethod
    def of(cls, run: RunView) -> Participation | None:
        """Count whose updates were used; None if none was, or all clients' equally often."""
        used = Counter(client for r in run.records for client in r.participants)
        sizes = dict(zip(run.data.shown_clients, run.data.shown_sizes)) if run.data else {}
        known = {client: None for r in run.records for client in _asked(r)} | dict.fromkeys(sizes)
        clients = max(len(known), run.data.num_clients if run.data else 0)
        # Where only a sample of the clients is known by name, the others were never asked.
        often = [*(used[client] for client in known), *[0] * (clients - len(known))]
        if not used or min(often) == max(often):
            return None
        return cls(
            clients=clients,
            updates=used.total(),
            uses=tuple(Use(c, used[c], sizes.get(c)) for c in sorted(known, key=lambda c: (used[c], c))),
            least=min(often),
            most=max(often),
            never=often.count(0),
            gini=gini(often),
        )

    @property
    def even(self) -> float:
        """Each client's share of the updates if all were used equally often, 0 to 1."""
        return 1 / self.clients


def _asked(record: RoundRecord) -> list[str]:
    return [*record.participants, *record.late, *record.quarantined, *record.ended]
