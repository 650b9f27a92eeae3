"""Runs beside each other: groups that differ only in the seed, what sets them apart, and what came of each."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedtrain.errors import InputError, nearest, shorten
from fedtrain.experiment.evaluation import higher_is_better
from fedtrain.experiment.fields import fields
from fedtrain.records import RoundRecord
from fedtrain.report.view import SERIES, Facts, RunView, client_scores, measured, until_result, worst_of, worst_tenth

__all__ = ["Comparison", "Difference", "Group", "Point", "Stat", "compare"]

_LONGEST_VALUE = 40  # characters of a field's value in a group's name


@dataclass(frozen=True)
class Stat:
    """A number over the runs of a group that have it."""

    runs: int
    mean: float
    deviation: float | None  # standard deviation of the sample; None of a single run
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Stat | None:
        """Sum up; None where no run has the number."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        if not all(map(math.isfinite, known)):
            return cls(len(known), math.nan, None, min(known), max(known))
        deviation = statistics.stdev(known) if len(known) > 1 else None
        return cls(len(known), statistics.fmean(known), deviation, min(known), max(known))


@dataclass(frozen=True)
class Point:
    """One run up to the end of a round at which it was measured."""

    round_number: int
    value: float
    bytes_up: int
    bytes_down: int
    seconds: float  # wall-clock
    virtual_seconds: float

    @property
    def moved(self) -> int:
        """Bytes in both directions."""
        return self.bytes_up + self.bytes_down


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, or that have the field in common by which runs are grouped."""

    label: str
    names: tuple[str, ...]  # what the user called the runs
    runs: tuple[RunView, ...]
    curves: tuple[tuple[Point, ...], ...]  # of each run; empty where nothing was measured
    finals: tuple[float | None, ...]  # of each run's result; None where nothing was measured
    target: float | None  # of the comparison
    metric: str

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of each run."""
        return tuple(run.experiment.seed for run in self.runs)

    @property
    def unfinished(self) -> tuple[str, ...]:
        """What to say of each run that is not complete."""
        return tuple(
            f"{shorten(name)} ({shorten(run.manifest.status)}, after round {_rounds(run)} of {run.experiment.rounds})"
            for name, run in zip(self.names, self.runs)
            if run.manifest.status != "complete"
        )

    @property
    def final(self) -> Stat | None:
        """The value of each run's result."""
        return Stat.of(self.finals)

    @property
    def best(self) -> Stat | None:
        """The best finite value of each run."""
        return Stat.of(_best(curve, self.metric) for curve in self.curves)

    @property
    def worst_tenth(self) -> Stat | None:
        """Mean over each run's worst tenth of the clients, on their own examples."""
        scores = (client_scores(run, self.metric) for run in self.runs)
        return Stat.of(worst_tenth(of) if of else None for of in scores)

    @property
    def epsilon(self) -> Stat | None:
        """Spent by each run that protects somebody."""
        return Stat.of(run.records[-1].epsilon for run in self.runs if run.records)

    @property
    def not_private(self) -> bool:
        """Whether an epsilon is counted in it that protects nobody."""
        return any(Facts.of(run).not_private for run in self.runs)

    def total(self, count: Callable[[RoundRecord], float]) -> Stat | None:
        """Add a number up over the rounds of each run."""
        return Stat.of(sum(map(count, run.records)) for run in self.runs if run.records)

    def to_target(self, read: Callable[[Point], float]) -> Stat | None:
        """Read a number off each run at its first point that reached the target; None where no run did."""
        firsts = (_first_at(curve, self.metric, self.target) for curve in self.curves)
        return Stat.of(None if point is None else read(point) for point in firsts)

    def mean_curve(self) -> list[tuple[Point, float, float]]:
        """Average the runs round by round, as far as all of them went.

        Returns:
            (means of all that a point holds, least value, largest value) of each round.
        """
        by_round = [{point.round_number: point for point in curve} for curve in self.curves if curve]
        shared = sorted(set.intersection(*(set(rounds) for rounds in by_round))) if by_round else []
        return [_averaged([rounds[number] for rounds in by_round]) for number in shared]


@dataclass(frozen=True)
class Difference:
    """A field in which the groups differ."""

    path: str  # dotted, as for --set
    values: tuple[str, ...]  # one per group; "" where the field does not exist there


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and what sets them apart."""

    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    metric: str
    part: str  # key of SERIES: on whose examples
    target: float | None  # what the costs are counted to; None where there is no such value
    target_is_goal: bool  # the experiments' own goal, not the best value that all runs reached

    @property
    def clock(self) -> bool:
        """Whether all runs have a virtual clock."""
        points = [curve[-1] for group in self.groups for curve in group.curves if curve]
        return bool(points) and all(point.virtual_seconds for point in points)

    @property
    def unfinished(self) -> list[str]:
        """What to say of each run that is not complete."""
        return [text for group in self.groups for text in group.unfinished]

    @property
    def worst(self) -> str:
        """What `Group.worst_tenth` is the mean over, in words."""
        runs = [run for group in self.groups for run in group.runs]
        return worst_of(max(len(client_scores(run, self.metric)) for run in runs))


def compare(runs: Mapping[str, RunView], by: str | None = None, metric: str | None = None) -> Comparison:
    """Put runs beside each other.

    Args:
        runs: name -> run, finished or not; at least one.
        by: dotted path of the field whose values make the groups; unless given, all fields but the seed do.
        metric: what to compare; the runs' main metric unless given.

    Raises:
        InputError: the runs were not measured by the same metric, or there is no such field.
    """
    flat = {name: _fields(run) for name, run in runs.items()}
    known = dict.fromkeys(path for of in flat.values() for path in of if path != "seed")
    if by is not None and not any(_is_in(path, by) for path in known):
        raise InputError("the runs have no such field", got=by, hint=nearest(by, known, otherwise=""))
    grouped: dict[tuple[str, ...], list[str]] = {}
    for name, of in flat.items():
        grouped.setdefault(_key(of, by), []).append(name)
    members = list(grouped.values())
    differences = _differences([[flat[name] for name in names] for names in members])
    metric = metric or _shared_metric(runs)
    part = _shared_part(runs, metric)
    curves = {name: _curve(run, part, metric) for name, run in runs.items()}
    target, is_goal = _target(runs.values(), curves.values(), metric, part)
    labels = _labels(len(members), [d for d in differences if by is None or _is_in(d.path, by)])
    groups = [
        Group(
            label,
            tuple(names),
            tuple(runs[n] for n in names),
            tuple(curves[n] for n in names),
            tuple(_final(runs[n], part, metric) for n in names),
            target,
            metric,
        )
        for label, names in zip(labels, members)
    ]
    return Comparison(tuple(groups), tuple(differences), metric, part, target, is_goal)


def _fields(run: RunView) -> dict[str, str]:
    """What a run is: its experiment's fields, and the contents of the user's own files that they name."""
    own = {f"contents of {shorten(name)}": digest[:12] for name, digest in run.manifest.own_files.items()}
    known = fields(run.experiment) | own
    return {path: value for path, value in known.items() if path != "name"}


def _key(of: Mapping[str, str], by: str | None) -> tuple[str, ...]:
    return tuple(f"{path} = {value}" for path, value in of.items() if path != "seed" and _is_in(path, by))


def _is_in(path: str, section: str | None) -> bool:
    return section is None or path == section or path.startswith(f"{section}.")


def _differences(groups: Sequence[Sequence[Mapping[str, str]]]) -> list[Difference]:
    """List the fields, but the seed, of which not all groups have the same value; one with several lists them."""
    paths = dict.fromkeys(path for group in groups for of in group for path in of if path != "seed")
    found = []
    for path in paths:
        values = tuple(", ".join(dict.fromkeys(of.get(path, "") for of in group)) for group in groups)
        if len(set(values)) > 1:
            found.append(Difference(path, values))
    return found


def _labels(groups: int, differences: Sequence[Difference]) -> list[str]:
    """Name each group by the fewest fields, from the first on, that tell all of them apart."""
    chosen: list[Difference] = []
    told_apart = 1
    for difference in differences:
        kinds = len(set(zip(*(d.values for d in [*chosen, difference]))))
        if kinds > told_apart:
            chosen.append(difference)
            told_apart = kinds
    if not chosen:
        return ["all runs"] * groups
    keys = _short([d.path for d in chosen])
    named = ([f"{key}={_plain(d.values[i])}" for key, d in zip(keys, chosen) if d.values[i]] for i in range(groups))
    return [", ".join(parts) or f"no {keys[0]}" for parts in named]


def _short(paths: Sequence[str]) -> list[str]:
    """Name fields by their last part, and the name or kind of a table by the table's own, where that is clear."""
    words = [re.sub(r"\.(name|kind)$", "", path).rpartition(".")[2] for path in paths]
    return [word if words.count(word) == 1 else path for word, path in zip(words, paths)]


def _plain(value: str) -> str:
    """A value as it is told in a name: without the quotes of a word."""
    bare = value[1:-1] if value[:1] == value[-1:] == '"' else value
    return shorten(bare, _LONGEST_VALUE)


def _shared_metric(runs: Mapping[str, RunView]) -> str:
    """The goal's metric or accuracy where all were measured by it, else the first beside the loss, else the loss."""
    names = {name: _metrics(run) for name, run in runs.items()}
    measured_ones = [of for of in names.values() if of]
    if not measured_ones:
        raise InputError("nothing was measured in these runs yet", got=", ".join(runs))
    mains = {Facts.of(run).metric: name for name, run in runs.items() if names[name]}
    if len(mains) > 1:
        shared = [metric for metric in measured_ones[0] if all(metric in of for of in measured_ones)]
        raise InputError(
            "the runs are measured by different metrics",
            got="; ".join(f"{shorten(metric, 40)} in {shorten(name)}" for metric, name in mains.items()),
            hint=f"Say which to compare: --metric {shorten(shared[0], 40)}" if shared else "Compare them apart",
        )
    return next(iter(mains))


def _metrics(run: RunView) -> list[str]:
    return list(dict.fromkeys(name for r in run.records for part in SERIES for name in measured(r, part)))


def _shared_part(runs: Mapping[str, RunView], metric: str) -> str:
    """On whose examples all runs that were measured at all have the metric; the central test set before others."""
    have = {
        name: {part for r in run.records for part in SERIES if metric in measured(r, part)}
        for name, run in runs.items()
        if _metrics(run)
    }
    for part in SERIES:
        if have and all(part in of for of in have.values()):
            return part
    lacking = [shorten(name) for name, of in have.items() if not of]
    known = dict.fromkeys(name for run in runs.values() for name in _metrics(run))
    if lacking:
        raise InputError(
            f"the metric {shorten(metric, 40)} was not measured in {lacking[0]}"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""),
            hint=nearest(metric, map(shorten, known)),
        )
    raise InputError("the runs are not measured on the same examples", got=metric, hint="Compare them apart")


def _final(run: RunView, part: str, metric: str) -> float | None:
    values = [measured(record, part).get(metric) for record in until_result(run, part)]
    return next((value for value in reversed(values) if value is not None), None)


def _curve(run: RunView, part: str, metric: str) -> tuple[Point, ...]:
    points, up, down, seconds, virtual = [], 0, 0, 0.0, 0.0
    for record in run.records:
        up, down = up + record.bytes_up, down + record.bytes_down
        seconds += record.seconds_train + record.seconds_evaluate
        virtual += record.virtual_seconds
        value = measured(record, part).get(metric)
        if value is not None:
            points.append(Point(record.round_number, value, up, down, seconds, virtual))
    return tuple(points)


def _target(
    runs: Iterable[RunView], curves: Iterable[Sequence[Point]], metric: str, part: str
) -> tuple[float | None, bool]:
    """The goal that all experiments share, else the best value that every measured run reached."""
    goals = {(run.experiment.evaluation.target_metric, run.experiment.evaluation.target_value) for run in runs}
    goal_metric, goal_value = next(iter(goals))
    if len(goals) == 1 and goal_metric == metric and part == "central":
        return goal_value, True
    bests = [best for curve in curves if curve and (best := _best(curve, metric)) is not None]
    if not bests:
        return None, False
    return (min(bests) if higher_is_better(metric) else max(bests)), False


def _best(curve: Sequence[Point], metric: str) -> float | None:
    finite = [point.value for point in curve if math.isfinite(point.value)]
    return (max if higher_is_better(metric) else min)(finite) if finite else None


def _first_at(curve: Sequence[Point], metric: str, target: float | None) -> Point | None:
    if target is None:
        return None
    sign = 1 if higher_is_better(metric) else -1
    return next((point for point in curve if sign * point.value >= sign * target), None)


def _averaged(points: Sequence[Point]) -> tuple[Point, float, float]:
    values = [point.value for point in points]
    mean = Point(
        points[0].round_number,
        statistics.fmean(values),
        round(statistics.fmean(point.bytes_up for point in points)),
        round(statistics.fmean(point.bytes_down for point in points)),
        statistics.fmean(point.seconds for point in points),
        statistics.fmean(point.virtual_seconds for point in points),
    )
    return mean, min(values), max(values)


def _rounds(run: RunView) -> int:
    return max((record.round_number for record in run.records), default=0)
