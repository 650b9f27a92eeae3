"""What a run sends: bytes in total, by round, by client, and until its target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedtrain.experiment.sections import Experiment
from fedtrain.records import RoundRecord
from fedtrain.report.view import Facts, RunView

__all__ = ["Communication", "Traffic", "client_traffic", "codecs"]


@dataclass(frozen=True)
class Traffic:
    """Bytes in the two directions."""

    up: float  # clients to server
    down: float  # server to clients

    @property
    def both(self) -> float:
        """Bytes both ways."""
        return self.up + self.down


@dataclass(frozen=True)
class Communication:
    """The bytes of a run; a value is None where none were moved, or are not known by client."""

    total: Traffic
    round_mean: Traffic  # over the rounds that moved any
    round_most: tuple[int, Traffic]  # the round that moved most
    client_mean: Traffic | None  # of the whole run, over the clients that moved any
    client_most: tuple[str, Traffic] | None  # the client that moved most in the whole run
    turn_mean: Traffic | None  # of a client in one of its rounds
    target: Traffic | None  # up to and with the round that reached the target

    @classmethod
    def of(cls, run: RunView, facts: Facts) -> Communication | None:
        """Sum up what was sent; None if nothing was."""
        moving = [r for r in run.records if r.bytes_up or r.bytes_down]
        if not moving:
            return None
        by_client = client_traffic(run.records)
        most = max(moving, key=lambda r: r.bytes_up + r.bytes_down)
        turns = [Traffic(*moved) for r in run.records for moved in r.client_bytes.values()]
        until = [r for r in run.records if facts.target_round is not None and r.round_number <= facts.target_round]
        return cls(
            total=Traffic(facts.bytes_up, facts.bytes_down),
            round_mean=_mean([Traffic(r.bytes_up, r.bytes_down) for r in moving]),
            round_most=(most.round_number, Traffic(most.bytes_up, most.bytes_down)),
            client_mean=_mean(list(by_client.values())) if by_client else None,
            client_most=next(iter(by_client.items()), None),
            turn_mean=_mean(turns) if turns else None,
            target=Traffic(sum(r.bytes_up for r in until), sum(r.bytes_down for r in until)) if until else None,
        )


def codecs(experiment: Experiment) -> str:
    """Say which codecs the messages pass, in a sentence; empty where they pass none."""
    section = experiment.compression
    ways = [f"{way} by {', '.join(stages)}" for way, stages in (("up", section.up), ("down", section.down)) if stages]
    return f"Messages were compressed {' and '.join(ways)}." if ways else ""


def client_traffic(records: Sequence[RoundRecord]) -> dict[str, Traffic]:
    """Add up each client's bytes over the whole run.

    Returns:
        Client -> its bytes, the client that moved most first.
    """
    up, down = Counter[str](), Counter[str]()
    for record in records:
        for client, (sent, received) in record.client_bytes.items():
            up[client] += sent
            down[client] += received
    return {client: Traffic(up[client], down[client]) for client in sorted(up, key=lambda c: (-up[c] - down[c], c))}


def _mean(traffic: Sequence[Traffic]) -> Traffic:
    return Traffic(sum(t.up for t in traffic) / len(traffic), sum(t.down for t in traffic) / len(traffic))
