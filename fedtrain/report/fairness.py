"""How the clients fare from one evaluation on their own examples to the next, and what they forget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedtrain.experiment.evaluation import higher_is_better
from fedtrain.report.drift import Quantiles
from fedtrain.report.tables import thinned
from fedtrain.report.view import Facts, RunView, scores_of, worst_tenth

__all__ = ["Evaluation", "Grid", "client_grid", "evaluations"]

_MOST_ROWS = 200  # clients of a grid
_MOST_COLUMNS = 100  # evaluations of a grid


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the run's main metric on the clients' own examples."""

    round_number: int
    clients: int
    spread: Quantiles
    worst_tenth: float  # mean over the worst tenth of the clients, each counted once
    forgetting: float
    """Mean over the clients measured before of how much better their best earlier value was (Chaudhry et al.,
    "Riemannian Walk for Incremental Learning", ECCV 2018); negative if they got better, NaN at the first one."""


@dataclass(frozen=True)
class Grid:
    """The clients' values at each evaluation."""

    clients: list[str]  # of the last evaluation, the worst first; at most 200, evenly spaced
    rounds: list[int]  # at most 100, evenly spaced
    values: list[list[float]]  # (clients, rounds); NaN where not measured


def evaluations(run: RunView, facts: Facts) -> list[Evaluation]:
    """Sum up each evaluation on the clients' own examples, in the order of rounds."""
    better = max if higher_is_better(facts.metric) else min
    sign = 1 if higher_is_better(facts.metric) else -1
    best: dict[str, float] = {}
    found = []
    for record in run.records:
        if not record.per_client:
            continue
        scores = scores_of(record, facts.metric)
        values = {score.client: score.value for score in scores if math.isfinite(score.value)}
        lost = [sign * (best[client] - value) for client, value in values.items() if client in best]
        found.append(
            Evaluation(
                record.round_number,
                len(scores),
                Quantiles.of([score.value for score in scores]),
                worst_tenth(scores),
                sum(lost) / len(lost) if lost else math.nan,
            )
        )
        best |= {client: better(best.get(client, value), value) for client, value in values.items()}
    return found


def client_grid(run: RunView, facts: Facts) -> Grid:
    """List the clients' values at each evaluation; both are thinned out where they are many."""
    records = thinned([record for record in run.records if record.per_client], _MOST_COLUMNS)
    last = scores_of(records[-1], facts.metric) if records else []
    clients = [score.client for score in thinned(last, _MOST_ROWS)]
    values = [[r.per_client.get(client, {}).get(facts.metric, math.nan) for r in records] for client in clients]
    return Grid(clients, [record.round_number for record in records], values)
