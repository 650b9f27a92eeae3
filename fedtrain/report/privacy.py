"""What a run's promise of privacy looks like on its page, beside what was spent of it."""

from __future__ import annotations

from collections.abc import Sequence

from fedtrain.privacy.accounting import delta_warning
from fedtrain.records import RoundRecord
from fedtrain.report.text import named, show_epsilon
from fedtrain.report.view import Facts, RunView, guarantee

__all__ = ["increments", "promise_rows", "sentences", "warnings"]


def increments(records: Sequence[RoundRecord]) -> dict[int, float]:
    """Tell what each round added to epsilon.

    Args:
        records: in the order of rounds.

    Returns:
        Round -> the growth since the round before; rounds without an epsilon are left out.
    """
    added, before = {}, 0.0
    for record in records:
        if record.epsilon is not None:
            added[record.round_number] = record.epsilon - before
            before = record.epsilon
    return added


def sentences(run: RunView, facts: Facts) -> Sequence[str]:
    """Say who is protected and what the epsilon that was spent means; nothing before the first round."""
    if run.privacy is None or facts.epsilon is None or not facts.rounds_done:
        return ()
    return guarantee(run.privacy, facts.epsilon, facts.rounds_done).sentences()


def warnings(run: RunView, facts: Facts) -> list[str]:
    """Say what a reader must not miss: a budget that was passed, a delta that is too large."""
    promise = run.privacy
    if promise is None:
        return []
    found = []
    if facts.epsilon is not None and facts.epsilon > promise.planned_epsilon:
        found.append(
            f"Epsilon {show_epsilon(facts.epsilon)} was spent, more than the planned "
            f"{show_epsilon(promise.planned_epsilon)}: rounds that were repeated after a crash are paid for again."
        )
    if run.data is not None:
        # A client's delta must suit its own examples, so the largest client is the first for which it is too large.
        n = run.data.num_clients if promise.unit == "client" else run.data.largest_client
        if warning := delta_warning(promise.delta, n):
            found.append(f"{warning[0].upper()}{warning[1:]}.")
    return found


def promise_rows(run: RunView, facts: Facts) -> list[tuple[str, str]]:
    """(name, value) of everything that epsilon means nothing without."""
    promise = run.privacy
    if promise is None:
        return []
    one = "example" if promise.unit == "sample" else "client"
    amplified = "" if promise.sampling == "Poisson" else ": counted without amplification"
    whose = "of each client" if promise.unit == "sample" else "of the run"
    return [
        ("Protected unit", "each example" if promise.unit == "sample" else "each client with all its examples"),
        ("Relation", f"{promise.relation} {one}"),
        ("Delta", f"{promise.delta:g}"),
        ("Accountant", promise.accountant.upper()),
        ("Sampling", f"{promise.sampling}{amplified}"),
        ("Must be trusted", guarantee(promise, promise.planned_epsilon, facts.rounds_done).trust),
        ("Noise multiplier", _span(promise.noise_multiplier)),
        ("Sample rate", _span(promise.sample_rate)),
        ("Steps per participation", _span(promise.steps)),
        ("Calibrated for", f"{_rounds(promise.participations)} {whose}"),
        ("Clipped", promise.clipping),
        ("Ledgers", _ledgers(promise.ledgers)),
        ("Clients that have ended", f"{len(facts.ended):,}: {named(facts.ended)}" if facts.ended else "none"),
    ]


def _rounds(number: int) -> str:
    return "1 round" if number == 1 else f"{number:,} rounds"


def _span(values: tuple[float, float]) -> str:
    least, most = (f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in values)
    return least if least == most else f"{least} to {most}, from client to client"


def _ledgers(folder: str) -> str:
    if not folder:
        return "none, for nothing is protected"
    return "in the run's folder, ledgers" if folder == "ledgers" else f"{folder}; other runs may have spent there too"
