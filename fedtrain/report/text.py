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
from fedtrain.report.communication import Communication, codecs
from fedtrain.report.drift import Correlation, client_links, correlation, drift_rounds, typical
from fedtrain.report.fairness import evaluations
from fedtrain.report.systems import Clock, Participation
from fedtrain.report.view import Facts, RunView, guarantee

__all__ = [
    "link_sentence",
    "named",
    "show_bytes",
    "show_difference",
    "show_epsilon",
    "show_metric",
    "show_seconds",
    "summary",
    "summary_lines",
]


def summary_lines(run: RunView) -> list[str]:
    """Sum a run up in plain sentences, one a line.

    Returns:
        sentences free of control characters, whatever the clients and metrics are called.
    """
    return [line for paragraph in summary(run) for line in paragraph]


def summary(run: RunView) -> list[list[str]]:
    """Sum a run up as `summary_lines` does, in paragraphs: what came of it, for whom, at what cost, what went wrong.

    Returns:
        the sentences of each paragraph, the first one of which is never empty.
    """
    facts = Facts.of(run)
    sent = Communication.of(run, facts)
    paragraphs = [
        [
            _status(run, facts),
            _what(run, facts),
            _skew(run) if run.data else "",
            _central(facts),
            _ended(run, facts),
            _result(run, facts),
            _target(run, facts, sent),
            _privacy(run, facts),
        ],
        [_clients(facts), _personal(facts), _forgetting(run, facts), _links(run, facts), _drift(run)],
        [_cost(facts), codecs(run.experiment), _by_client(sent), _virtual(facts), _clock(run)],
        [
            _late(facts),
            _participation(run),
            _quarantined(facts),
            _gone("Set aside for the rest of the run", facts.set_aside),
            _gone("Ended, for their budget or policy allows no more", facts.ended),
        ],
    ]
    said = [[line for line in paragraph if line] for paragraph in paragraphs]
    return [lines for lines in said if lines]


def show_metric(metric: str, value: float | None) -> str:
    """Write a metric's value: accuracy in percent, all else with four digits."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def show_difference(metric: str, value: float) -> str:
    """Write the difference of two values of a metric: of accuracies in percentage points."""
    return f"{100 * value:.1f} points" if metric == "accuracy" else show_metric(metric, value)


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


def link_sentence(found: Correlation, figure: str) -> str:
    """Say whether clients whose labels differ more have a higher or a lower figure.

    Args:
        found: how the two go together.
        figure: what it is called.
    """
    figures = f"(rank correlation {found.rank:.2f} over {_count(found.clients, 'client')})"
    if not found.clear:
        return f"How far a client's labels are from everybody's says little about its {figure} {figures}."
    return (
        f"The more a client's labels differ from everybody's, the {'higher' if found.rank > 0 else 'lower'} "
        f"its {figure} {figures}."
    )


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
    bounds = ((0.15, "Nearly even"), (0.4, "Slightly skewed"), (0.7, "Moderately skewed"), (1.2, "Strongly skewed"))
    for bound, words in bounds:
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


def _ended(run: RunView, facts: Facts) -> str:
    why = run.manifest.ended
    return (
        f"The run ended after round {facts.rounds_done} of {run.experiment.rounds}: {shorten(why, 200)}." if why else ""
    )


def _result(run: RunView, facts: Facts) -> str:
    """Which model the result is, where that is not simply the last one."""
    number, average = run.manifest.result_round, run.experiment.training.average
    if number is None:
        return ""
    if average and number >= average.start_round:
        kind = {"ema": "moving average", "swa": "mean"}[average.name]
        return f"The result is the {kind} of the models of rounds {average.start_round} to {number}."
    if number == facts.rounds_done:
        return ""
    return f"The result is the model of round {number}, and not of round {facts.rounds_done}, the last."


def _clients(facts: Facts) -> str:
    if facts.clients_mean is None:
        return ""
    text = (
        f"On the clients' own held-out examples: {shorten(facts.metric, 40)} "
        f"{show_metric(facts.metric, facts.clients_mean)} on average"
    )
    worst = show_metric(facts.metric, facts.worst_tenth)
    return f"{text} of {_count(facts.clients_measured, 'client')}, {worst} for the {facts.worst}."


def _forgetting(run: RunView, facts: Facts) -> str:
    last = next(reversed(evaluations(run, facts)), None)
    if last is None or not 0.0005 <= last.forgetting < math.inf:
        return ""
    lost = show_difference(facts.metric, last.forgetting)
    return f"At the last evaluation a client was {lost} worse than at its own best before, on average."


def _links(run: RunView, facts: Facts) -> str:
    found = correlation(client_links(run, facts), lambda link: link.value)
    return link_sentence(found, shorten(facts.metric, 40)) if found and found.clear else ""


def _drift(run: RunView) -> str:
    medians = typical(drift_rounds(run.records))
    if medians is None:
        return ""
    return (
        f"Drift: the cosine of a client's update and the mean of its round is {medians[0]:.2f}, "
        f"and its norm {medians[1]:.2f} times that of the mean (medians)."
    )


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


def _by_client(sent: Communication | None) -> str:
    if sent is None or sent.client_mean is None or sent.client_most is None:
        return ""
    mean, most = sent.client_mean, sent.client_most[1]
    return f"A client moved {show_bytes(mean.both)} on average, and {show_bytes(most.both)} at most."


def _clock(run: RunView) -> str:
    clock = Clock.of(run)
    if clock is None:
        return ""
    wasted = f"; {clock.wasted_share:.1%} of the clients' work was wasted" if clock.wasted_seconds else ""
    return f"Half of the rounds took up to {show_seconds(clock.median)}, 95% up to {show_seconds(clock.p95)}{wasted}."


def _participation(run: RunView) -> str:
    taken = Participation.of(run)
    if taken is None or (not taken.never and taken.gini < 0.2):
        return ""
    were = "was" if taken.never == 1 else "were"
    never = f"; {taken.never:,} of {_count(taken.clients, 'client')} {were} never used" if taken.never else ""
    return (
        f"A client's update was used in {taken.least:,} to {taken.most:,} rounds (Gini coefficient {taken.gini:.2f})"
        f"{never}."
    )


def _late(facts: Facts) -> str:
    if not facts.late:
        return ""
    share = facts.late / facts.asked
    return f"Late and not waited for: {facts.late:,} of {_count(facts.asked, 'update')} asked for ({share:.1%})."


def _target(run: RunView, facts: Facts, sent: Communication | None) -> str:
    goal = run.experiment.evaluation
    if goal.target_metric is None:
        return ""
    name = f"Target {shorten(goal.target_metric, 40)} {show_metric(goal.target_metric, goal.target_value)}"
    if facts.target_round is None:
        return f"{name}: not reached."
    cost = (
        f", after {show_bytes(sent.target.up)} up and {show_bytes(sent.target.down)} down"
        if sent and sent.target
        else ""
    )
    return f"{name}: reached in round {facts.target_round}{cost}."


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
