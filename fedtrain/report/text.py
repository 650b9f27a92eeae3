"""A run in a few sentences, and how its numbers are written; the page and the command line share both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from fedtrain.errors import shorten
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import OwnStrategy
from fedtrain.records import DataSummary
from fedtrain.report.view import Facts, RunView, guarantee

__all__ = ["named", "show_bytes", "show_epsilon", "show_metric", "show_seconds", "summary_lines"]


def summary_lines(run: RunView) -> list[str]:
    """Sum a run up in plain sentences, one a line.

    Returns:
        sentences free of control characters, whatever the clients and metrics are called.
    """
    facts = Facts.of(run)
    lines = [
        _status(run, facts),
        _what(run, facts),
        _skew(run) if run.data else "",
        _central(facts),
        _clients(facts),
        _personal(facts),
        _privacy(run, facts),
        _cost(facts),
        _virtual(facts),
        _late(facts),
        _target(run, facts),
        _quarantined(facts),
        _gone("Set aside for the rest of the run", facts.set_aside),
        _gone("Ended, for their budget or policy allows no more", facts.ended),
    ]
    return [line for line in lines if line]


def show_metric(metric: str, value: float | None) -> str:
    """Write a metric's value: accuracy in percent, all else with four digits."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def show_epsilon(value: float | None) -> str:
    """Write an epsilon, or a difference of two, with three digits."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "infinite"
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def show_bytes(count: float) -> str:
    """Write a number of bytes in kB, MB, GB or TB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def show_seconds(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def named(clients: Sequence[tuple[int, str]]) -> str:
    """Name the first three of some clients.

    Args:
        clients: (round, client).
    """
    return _first([f"{shorten(client, 40)} in round {number}" for number, client in clients])


def _status(run: RunView, facts: Facts) -> str:
    where = f"after round {facts.rounds_done} of {run.experiment.rounds}"
    return {
        "running": f"The run is not finished: this is its state {where}.",
        "interrupted": f"The run was interrupted {where}; the same command resumes it.",
        "failed": f"The run failed {where}; what was finished is kept.",
    }.get(run.manifest.status, "")


def _what(run: RunView, facts: Facts) -> str:
    experiment, data = run.experiment, run.data
    source = data.source if data else experiment.data.name or PurePath(experiment.data.path or "").name
    clients = data.num_clients if data else experiment.data.clients
    spread = f", spread over {_count(clients, 'client')}" if clients else ""
    asked = experiment.clients.per_round
    each = f", {asked:,} clients a round" if asked else ""
    return (
        f"Trained {shorten(experiment.task.name)} ({_count(run.manifest.parameters, 'parameter')}) on "
        f"{shorten(source)}{spread}: {_count(facts.rounds_done, 'round')} of {_strategy(experiment)}{each}."
    )


def _skew(run: RunView) -> str:
    data = run.data
    assert data is not None
    smallest, largest = data.smallest_client, data.largest_client
    sizes = f"{smallest:,} to {largest:,} examples" if smallest < largest else _count(largest, "example")
    if data.heterogeneity is None:
        return f"A client holds {sizes}."
    noun = "label" if data.target == "class" else "target range"
    held = f"{data.heterogeneity.labels_per_client:.1f}".removesuffix(".0")
    return (
        f"{_degree(data)} {noun}s: a client holds {held} of {_count(len(data.label_names), noun)} on average, "
        f"and {sizes}."
    )


def _degree(data: DataSummary) -> str:
    """Words for the size-weighted L1 distance, which runs from 0 to 2."""
    assert data.heterogeneity is not None
    l1 = data.heterogeneity.l1
    for bound, words in ((0.3, "Nearly even"), (0.7, "Moderately skewed"), (1.2, "Strongly skewed")):
        if l1 < bound:
            return words
    return "Extremely skewed"


def _central(facts: Facts) -> str:
    if facts.final is None:
        return ""
    name = f"Central {shorten(facts.metric, 40)}"
    final = f"{name}: {show_metric(facts.metric, facts.final)} after round {facts.final_round}"
    if facts.best is None:
        return f"{final}; no value was finite."
    if facts.best_round == facts.final_round:
        return f"{final}, the best of the run."
    return f"{final}; best {show_metric(facts.metric, facts.best)} after round {facts.best_round}."


def _clients(facts: Facts) -> str:
    if facts.clients_mean is None:
        return ""
    text = (
        f"On the clients' own held-out examples: {shorten(facts.metric, 40)} "
        f"{show_metric(facts.metric, facts.clients_mean)} on average"
    )
    worst = show_metric(facts.metric, facts.worst_tenth)
    return f"{text} of {_count(facts.clients_measured, 'client')}, {worst} for the {facts.worst}."


def _personal(facts: Facts) -> str:
    own, shared = facts.personal, facts.not_personal
    if own is None or shared is None:
        return ""
    values = [show_metric(facts.metric, v) for v in (own.mean, own.worst_tenth, shared.mean, shared.worst_tenth)]
    return (
        f"Personal models: {shorten(facts.metric, 40)} {values[0]} on average of {_count(own.clients, 'client')}, "
        f"{values[1]} for the {own.worst}; without them {values[2]} and {values[3]}."
    )


def _privacy(run: RunView, facts: Facts) -> str:
    promise = run.privacy
    if promise is None:
        return ""
    planned = show_epsilon(promise.planned_epsilon)
    if facts.epsilon is None:
        return f"{'NOT PRIVATE' if facts.not_private else 'Privacy'}: nothing recorded yet; planned epsilon {planned}."
    spent = guarantee(promise, facts.epsilon, facts.rounds_done)
    one = "example" if promise.unit == "sample" else "client"
    figure = (
        f"epsilon {show_epsilon(spent.epsilon)} at delta {spent.delta:g} (each {one}, {spent.relation}, "
        f"{spent.accountant.upper()}), {'more than the ' if spent.epsilon > promise.planned_epsilon else ''}"
        f"planned {planned}"
    )
    if facts.not_private:
        why = ": the noise follows from a seed; with secret noise," if promise.seeded else ":"
        return f"NOT PRIVATE{why} {figure}."
    return f"Privacy: {figure}; {spent.trust} must be trusted."


def _cost(facts: Facts) -> str:
    moved = facts.bytes_up + facts.bytes_down
    return (
        f"{show_bytes(moved)} moved ({show_bytes(facts.bytes_up)} up, {show_bytes(facts.bytes_down)} down) "
        f"in {show_seconds(facts.seconds)}."
    )


def _virtual(facts: Facts) -> str:
    if not facts.virtual_seconds:
        return ""
    stale = f"; an update was {facts.staleness:.1f} rounds old on average" if facts.staleness else ""
    return f"The run took {show_seconds(facts.virtual_seconds)} on the virtual clock{stale}."


def _late(facts: Facts) -> str:
    if not facts.late:
        return ""
    share = facts.late / facts.asked
    return f"Late and not waited for: {facts.late:,} of {_count(facts.asked, 'update')} asked for ({share:.1%})."


def _target(run: RunView, facts: Facts) -> str:
    goal = run.experiment.evaluation
    if goal.target_metric is None:
        return ""
    name = f"Target {shorten(goal.target_metric, 40)} {show_metric(goal.target_metric, goal.target_value)}"
    return (
        f"{name}: reached in round {facts.target_round}." if facts.target_round is not None else f"{name}: not reached."
    )


def _quarantined(facts: Facts) -> str:
    if not facts.quarantined:
        return ""
    often = Counter(client for _, client, _ in facts.quarantined)
    whose = f"{_count(len(often), 'client')}: {_first([shorten(client, 40) for client, _ in often.most_common()])}"
    return f"Quarantined {_count(len(facts.quarantined), 'update')} of {whose}."


def _gone(how: str, clients: Sequence[tuple[int, str]]) -> str:
    return f"{how}: {named(clients)}." if clients else ""


def _first(names: Sequence[str]) -> str:
    """The first three of some names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _strategy(experiment: Experiment) -> str:
    strategy = experiment.strategy
    return shorten(strategy.path) if isinstance(strategy, OwnStrategy) else strategy.name
