"""Bytes and time of a plan, for a person and for a program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedtrain.experiment.sections import Experiment
from fedtrain.report.text import show_bytes, show_seconds
from fedtrain.simulations.outlook import Outlook

__all__ = ["document", "lines"]


def document(found: Outlook) -> dict[str, Any]:
    """All of it as JSON can hold it."""
    return {
        "bytes_are": found.sure,
        "bytes_per_update": found.traffic.up,
        "bytes_per_instruction": found.traffic.down,
        "bytes_up": sum(up for up, _ in found.rounds),
        "bytes_down": sum(down for _, down in found.rounds),
        "bytes_by_round": [{"up": up, "down": down} for up, down in found.rounds],
        "clock": _clock(found),
    }


def lines(found: Outlook, experiment: Experiment) -> Iterator[str]:
    """Say what it will cost, one line for each thing."""
    about = {"exact": "exactly, if everybody answers", "most": "at most", "about": "about"}[found.sure]
    up, down = (sum(way) for way in zip(*found.rounds))
    yield f"Update      {_message(found.traffic.up, found.plain.up, experiment.compression.up)}"
    yield f"Instruction {_message(found.traffic.down, found.plain.down, experiment.compression.down)}"
    yield f"The run     {show_bytes(up)} up, {show_bytes(down)} down, {about}"
    if found.measuring:
        yield f"            {show_bytes(found.measuring)} of it to measure on clients, by evaluation.clients_every"
    most = experiment.compression.max_bytes
    if most is not None and up + down > most:
        affordable, spent = 0, 0
        for one in found.rounds:
            spent += sum(one)
            affordable += spent <= most
        yield f"            compression.max_bytes = {most:,} ends it after round {affordable}"
    clients = experiment.clients
    if clients.duration is None and (clients.deadline is not None or clients.over_selection > 1):
        yield "            for a server; a simulation needs clients.duration for its deadline and over_selection"
    if found.starved:
        yield f"            it stops in round {found.starved}: too few updates for clients.quorum = {clients.quorum}"
    if found.forecast:
        clock = found.forecast
        yield f"Clock       {show_seconds(clock.total_seconds)} for the run; a round takes " + (
            f"{show_seconds(clock.round_quantile(0.5))} (median), {show_seconds(clock.round_quantile(0.95))} (p95)"
        )
        yield f"            {clock.wasted_share:.0%} of the clients' time leads to no update that is used"
        yield f"            {clock.never_used:.0%} of the clients are never used; Gini of use {clock.gini:.2f}"
        if clock.slowest_tenth is not None:
            yield f"            the slowest tenth of the clients has {clock.slowest_tenth:.0%} of its share of updates"


def _message(size: int, plain: int, stages: list[str]) -> str:
    by = f", by {', '.join(stages)}: {plain / size:.1f} times less than plain" if stages else ""
    return f"{show_bytes(size)} ({size:,} bytes{by})"


def _clock(found: Outlook) -> dict[str, Any] | None:
    clock = found.forecast
    if clock is None:
        return None
    return {
        "total_seconds": clock.total_seconds,
        "round_seconds_p50": clock.round_quantile(0.5),
        "round_seconds_p95": clock.round_quantile(0.95),
        "wasted_share": clock.wasted_share,
        "gini": clock.gini,
        "never_used": clock.never_used,
        "slowest_tenth": clock.slowest_tenth,
    }
