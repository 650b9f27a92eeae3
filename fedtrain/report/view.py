"""What a report is made from, and the few numbers that sum a run up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedtrain.experiment.evaluation import higher_is_better
from fedtrain.experiment.sections import Experiment
from fedtrain.privacy.accounting import Guarantee
from fedtrain.records import PERSONAL, DataSummary, Manifest, PrivacySummary, RoundRecord

__all__ = [
    "SERIES",
    "ClientScore",
    "Facts",
    "RunView",
    "Spread",
    "client_scores",
    "guarantee",
    "measured",
    "scores_of",
    "until_result",
    "worst_of",
    "worst_tenth",
]

SERIES = {
    "central": "central test set",
    "clients": "clients' held-out examples",
    "personal": "clients' personal models",
    "train": "training examples",
}
"""Part of what is measured in a round -> what it is measured on; what matters most first."""


@dataclass(frozen=True)
class RunView:
    """A run as it was read from its folder, finished or not."""

    experiment: Experiment
    experiment_text: str  # the resolved experiment, TOML
    manifest: Manifest
    records: Sequence[RoundRecord]  # in the order of rounds
    data: DataSummary | None
    privacy: PrivacySummary | None  # None where nothing is protected


@dataclass(frozen=True)
class ClientScore:
    """One client's result on its own held-out examples."""

    client: str
    value: float  # of the run's main metric; NaN if the client reported none
    loss: float
    num_examples: float
    personal: float | None = None  # the value of its own model, if it has one


@dataclass(frozen=True)
class Spread:
    """How some clients fare."""

    clients: int
    mean: float  # weighted by held-out examples
    worst_tenth: float  # mean over the worst tenth of the clients, each counted once

    @property
    def worst(self) -> str:
        """What `worst_tenth` is the mean over, in words."""
        return worst_of(self.clients)


@dataclass(frozen=True)
class Facts:
    """The numbers of a run's headline; a value is None where nothing was measured."""

    metric: str
    rounds_done: int
    final: float | None  # of the run's result, on the central test set
    final_round: int
    best: float | None  # finite values only
    best_round: int
    clients_mean: float | None  # weighted by held-out examples
    worst_tenth: float | None  # mean over the worst tenth of the clients, each counted once
    clients_measured: int
    personal: Spread | None  # the clients with a model of their own
    not_personal: Spread | None  # the same clients without it
    bytes_up: int
    bytes_down: int
    seconds: float
    virtual_seconds: float  # of the whole run; 0 without a virtual clock
    asked: int  # updates that were asked for and either arrived or were late
    late: int  # of these, those that were not waited for
    staleness: float  # mean over the updates used, in rounds; 0 but for asynchronous strategies
    target_round: int | None
    quarantined: tuple[tuple[int, str, str], ...]  # (round, client, reason)
    set_aside: tuple[tuple[int, str], ...]  # (round, client)
    ended: tuple[tuple[int, str], ...]  # (round, client)
    epsilon: float | None  # spent up to the last record; None without privacy, and before the first record
    not_private: bool  # whether an epsilon is counted that protects nobody

    @classmethod
    def of(cls, run: RunView) -> Facts:
        """Sum a run up."""
        metric = _main_metric(run)
        central = [(r.round_number, r.central[metric]) for r in run.records if metric in r.central]
        of_result = [(r.round_number, r.central[metric]) for r in until_result(run, "central") if metric in r.central]
        finite = [(n, value) for n, value in central if math.isfinite(value)]
        better = max if higher_is_better(metric) else min
        best_round, best = better(finite, key=lambda pair: pair[1]) if finite else (0, None)
        scores = client_scores(run, metric)
        with_own = [score for score in scores if score.personal is not None]
        personal = [replace(score, value=score.personal) for score in with_own if score.personal is not None]
        used = sum(len(r.participants) for r in run.records)
        late = sum(len(r.late) for r in run.records)
        clients = [r.clients[metric] for r in until_result(run, "clients") if metric in r.clients]
        epsilon = run.records[-1].epsilon if run.privacy and run.records else None
        return cls(
            metric=metric,
            rounds_done=max((r.round_number for r in run.records), default=0),
            final=of_result[-1][1] if of_result else None,
            final_round=of_result[-1][0] if of_result else 0,
            best=best,
            best_round=best_round,
            clients_mean=clients[-1] if clients else None,
            worst_tenth=worst_tenth(scores) if scores else None,
            clients_measured=len(scores),
            personal=_spread(_worst_first(personal, metric)),
            not_personal=_spread(with_own),
            bytes_up=sum(r.bytes_up for r in run.records),
            bytes_down=sum(r.bytes_down for r in run.records),
            seconds=sum(r.seconds_train + r.seconds_evaluate for r in run.records),
            virtual_seconds=sum(r.virtual_seconds for r in run.records),
            asked=used + late + sum(len(r.quarantined) for r in run.records),
            late=late,
            staleness=sum(r.staleness * len(r.participants) for r in run.records) / max(used, 1),
            target_round=_target_round(run),
            quarantined=tuple(
                (r.round_number, client, reason) for r in run.records for client, reason in r.quarantined.items()
            ),
            set_aside=tuple((r.round_number, client) for r in run.records for client in r.set_aside),
            ended=tuple((r.round_number, client) for r in run.records for client in r.ended),
            epsilon=epsilon,
            not_private=run.privacy is not None and (run.privacy.seeded or epsilon == math.inf),
        )

    @property
    def worst(self) -> str:
        """What `worst_tenth` is the mean over, in words."""
        return worst_of(self.clients_measured)


def until_result(run: RunView, part: str) -> Sequence[RoundRecord]:
    """A run's records as far as that in which the model that is its result was measured.

    In the round that ends a run, what early stopping watches is measured on that round's model, and the other part on
    the result, which may be an earlier one.

    Args:
        run: finished or not.
        part: a key of `SERIES`.
    """
    stopping, last = run.experiment.training.early_stopping, run.manifest.result_round
    of_the_result = ["central"] if stopping and stopping.on == "clients" else ["clients", "personal"]
    if last is None or part in of_the_result:
        return run.records
    return [record for record in run.records if record.round_number <= last]


def measured(record: RoundRecord, part: str) -> Mapping[str, float]:
    """Pick a part of what was measured in a round.

    Args:
        record: of the round.
        part: a key of `SERIES`; the clients' numbers are without, the personal ones with a model of their own.

    Returns:
        Loss and metrics by name.
    """
    if part == "personal":
        own = ((name, value) for name, value in record.clients.items() if name.startswith(PERSONAL))
        return {name.removeprefix(PERSONAL): value for name, value in own}
    if part == "clients":
        return {name: value for name, value in record.clients.items() if not name.startswith(PERSONAL)}
    numbers: dict[str, float] = getattr(record, part)
    return numbers


def client_scores(run: RunView, metric: str) -> list[ClientScore]:
    """List the clients of the last evaluation on their own examples, the worst first.

    A client without a finite value counts as worst.
    """
    last = next((r for r in reversed(run.records) if r.per_client), None)
    return [] if last is None else scores_of(last, metric)


def scores_of(record: RoundRecord, metric: str) -> list[ClientScore]:
    """List the clients of one round's evaluation on their own examples, as `client_scores` does."""
    scores = [
        ClientScore(
            client,
            values.get(metric, math.nan),
            values.get("loss", math.nan),
            values.get("num_examples", 0.0),
            values.get(f"{PERSONAL}{metric}"),
        )
        for client, values in record.per_client.items()
    ]
    return _worst_first(scores, metric)


def worst_tenth(scores: Sequence[ClientScore]) -> float:
    """Take the mean over the worst tenth of the clients, each counted once.

    Args:
        scores: of at least one client, the worst first.
    """
    first = [score.value for score in scores[: math.ceil(len(scores) / 10)]]
    return sum(first) / len(first)


def worst_of(clients: int) -> str:
    """Say what the worst tenth of so many clients is."""
    return "worst client" if clients <= 10 else "worst tenth"


def guarantee(privacy: PrivacySummary, epsilon: float, rounds: int) -> Guarantee:
    """State an epsilon with all that it means nothing without.

    Args:
        privacy: what the run promises.
        epsilon: that was spent.
        rounds: that it covers.
    """
    return Guarantee(
        epsilon=epsilon,
        delta=privacy.delta,
        unit=privacy.unit,
        accountant=privacy.accountant,
        sampling=privacy.sampling,
        rounds=rounds,
        seeded=privacy.seeded,
    )


def _worst_first(scores: Iterable[ClientScore], metric: str) -> list[ClientScore]:
    sign = 1 if higher_is_better(metric) else -1
    return sorted(scores, key=lambda s: (sign * s.value if math.isfinite(s.value) else -math.inf, s.client))


def _spread(scores: Sequence[ClientScore]) -> Spread | None:
    """Sum up scores that come worst first."""
    examples = sum(score.num_examples for score in scores)
    if not examples:
        return None
    mean = sum(score.value * score.num_examples for score in scores) / examples
    return Spread(len(scores), mean, worst_tenth(scores))


def _main_metric(run: RunView) -> str:
    """The target's metric, else accuracy, else the first asked for, else the first beside the loss, else the loss."""
    names = list(_names(run.records))
    for wanted in (run.experiment.evaluation.target_metric, "accuracy", *run.experiment.evaluation.metrics):
        if wanted in names:
            return wanted
    return next((name for name in names if name != "loss"), "loss")


def _names(records: Iterable[RoundRecord]) -> dict[str, None]:
    return {name: None for r in records for part in SERIES for name in measured(r, part)}


def _target_round(run: RunView) -> int | None:
    goal = run.experiment.evaluation
    if goal.target_metric is None or goal.target_value is None:
        return None
    sign = 1 if higher_is_better(goal.target_metric) else -1
    for record in run.records:
        value = record.central.get(goal.target_metric, math.nan)
        if sign * value >= sign * goal.target_value:
            return record.round_number
    return None
