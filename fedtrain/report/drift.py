"""What unlike data does to the updates: how far they point apart, and whose do."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedtrain.measures import jensen_shannon, rank_correlation
from fedtrain.records import RoundRecord
from fedtrain.report.view import Facts, RunView, client_scores

__all__ = [
    "ClientLink",
    "Correlation",
    "DriftRound",
    "Quantiles",
    "client_links",
    "correlation",
    "drift_rounds",
    "typical",
]

_FEWEST = 5  # clients whose order says anything


@dataclass(frozen=True)
class Quantiles:
    """How a figure of the clients spreads."""

    low: float  # a tenth of the clients lies below
    median: float
    high: float  # a tenth of the clients lies above

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Take the deciles of at least one value; those that are not finite are left out, NaN if all are."""
        finite = [value for value in values if math.isfinite(value)]
        return cls(*(np.quantile(finite, [0.1, 0.5, 0.9]).tolist() if finite else [math.nan] * 3))


@dataclass(frozen=True)
class DriftRound:
    """How the updates of one round differ."""

    round_number: int
    updates: int
    cosine: Quantiles  # of an update and the mean of the round's updates
    ratio: Quantiles  # of an update's L2 norm and that of the mean
    diversity: float  # gradient diversity; NaN if not known


@dataclass(frozen=True)
class ClientLink:
    """How unlike the others' a client's labels are, and what goes with it; NaN where not known."""

    client: str
    distance: float  # Jensen-Shannon divergence of its labels from those of all clients shown, bits
    value: float  # of the run's main metric on its own examples, at the last evaluation
    cosine: float  # of its updates and the means of their rounds, mean over its rounds
    ratio: float  # of their norms, mean over its rounds


@dataclass(frozen=True)
class Correlation:
    """Whether two figures of the clients go together."""

    rank: float  # Spearman's rank correlation
    clients: int

    @property
    def clear(self) -> bool:
        """Whether chance alone gives so much in fewer than about one of twenty cases."""
        return abs(self.rank) * math.sqrt(self.clients - 1) > 1.96


def drift_rounds(records: Sequence[RoundRecord]) -> list[DriftRound]:
    """Sum up the drift of each round that measured it."""
    return [
        DriftRound(
            r.round_number,
            len(r.drift),
            Quantiles.of([cosine for cosine, _ in r.drift.values()]),
            Quantiles.of([ratio for _, ratio in r.drift.values()]),
            math.nan if r.diversity is None else r.diversity,
        )
        for r in records
        if r.drift
    ]


def typical(rounds: Sequence[DriftRound]) -> tuple[float, float] | None:
    """Take the medians over rounds of the median cosine and the median norm ratio; None without one of them."""
    cosine = Quantiles.of([r.cosine.median for r in rounds]).median
    ratio = Quantiles.of([r.ratio.median for r in rounds]).median
    return (cosine, ratio) if math.isfinite(cosine + ratio) else None


def client_links(run: RunView, facts: Facts) -> list[ClientLink]:
    """Put each client's label distance beside its result and its drift; nothing where labels are not known.

    Only the clients of the label map are among them, and its counts are the pool that they are compared with.
    """
    data = run.data
    if data is None or not data.label_names:
        return []
    distances = jensen_shannon(np.array(data.label_counts, dtype=np.float64)).tolist()
    values = {score.client: score.value for score in client_scores(run, facts.metric)}
    drifts: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in run.records:
        for client, drift in record.drift.items():
            drifts[client].append(drift)
    links = []
    for client, distance in zip(data.shown_clients, distances):
        cosine, ratio = (_mean([drift[i] for drift in drifts[client]]) for i in range(2))
        links.append(ClientLink(client, distance, values.get(client, math.nan), cosine, ratio))
    return links


def correlation(links: Sequence[ClientLink], figure: Callable[[ClientLink], float]) -> Correlation | None:
    """Correlate the clients' label distances with another figure of theirs, by rank.

    Args:
        links: the clients.
        figure: picks the other one.

    Returns:
        None where fewer than five clients have both, or all have the same.
    """
    pairs = [(link.distance, figure(link)) for link in links if math.isfinite(link.distance + figure(link))]
    if len(pairs) < _FEWEST:
        return None
    rank = rank_correlation([distance for distance, _ in pairs], [value for _, value in pairs])
    return None if math.isnan(rank) else Correlation(rank, len(pairs))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
