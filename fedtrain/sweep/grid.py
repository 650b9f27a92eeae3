"""What a sweep runs: values of fields, every combination of them, and each with several seeds."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtrain.errors import ExperimentError, Fault, InputError, shorten
from fedtrain.experiment.load import identity, load
from fedtrain.experiment.schema import inline
from fedtrain.experiment.sections import Experiment

__all__ = ["Axis", "Trial", "axis", "grid", "trial"]

_MOST_RUNS = 10_000
_OPENING, _CLOSING = "[{", "]}"


@dataclass(frozen=True)
class Axis:
    """One field and the values that it is to have, each as --set of `simulate` takes it."""

    key: str  # dotted path
    values: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One combination of values: a run for each seed."""

    overrides: tuple[str, ...]  # KEY=VALUE, those with several values in the sweep
    experiments: tuple[Experiment, ...]  # one per seed

    @property
    def label(self) -> str:
        """The combination in words."""
        return ", ".join(self.overrides) or "as in the file"

    def folders(self, out: Path) -> list[Path]:
        """The runs' folders: where there is one of the same experiment, as of an earlier sweep, that is taken."""
        words = "-".join(override.partition("=")[2] for override in self.overrides)
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", words)[:40].strip("-.") or "run"
        found = []
        for experiment in self.experiments:
            digest = identity(experiment)[:16]
            new = out / f"{slug}-seed{experiment.seed}-{digest}"
            found.append(next(iter(sorted(out.glob(f"*-seed*-{digest}"))), new))
        return found


def axis(text: str) -> Axis:
    """Read `KEY=V1,V2,...`.

    The values are the members of a TOML array, `KEY=[1, 2]`, or what stands between commas outside of quotes, brackets
    and braces. A field whose value is itself a list needs a list of lists.

    Raises:
        InputError: there is no key or no value.
    """
    key, _, listed = text.partition("=")
    key, listed = key.strip(), listed.strip()
    values: list[str] = []
    if listed.startswith("["):
        try:
            values = [inline(member) for member in tomllib.loads(f"value = {listed}")["value"]]
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"the values of --set {shorten(key)} are no TOML array",
                got=listed,
                expected='KEY=V1,V2 or KEY=["v1", "v2"]',
                hint="Text needs quotes in an array",
            ) from error
    else:
        values = [part.strip() for part in _split(listed)]
    if not key or not values or not all(values):
        raise InputError("--set names no values", got=text, expected="KEY=V1,V2, such as training.optimizer.lr=0.1,0.3")
    return Axis(key, tuple(dict.fromkeys(values)))


def grid(file: Path, axes: Sequence[Axis], seeds: int) -> list[Trial]:
    """Make all combinations of values, each of which is loaded and checked.

    Args:
        file: the experiment file.
        axes: the last one changes fastest.
        seeds: runs per combination: the file's seed and those after it.

    Raises:
        InputError: a field is swept twice, or there are too many runs.
        ExperimentError: combinations have faults; the error lists those of all.
    """
    _check_axes(axes, seeds)
    count = seeds
    for one in axes:
        count *= len(one.values)
    if count > _MOST_RUNS:
        raise InputError("the sweep has too many runs", got=count, expected=f"at most {_MOST_RUNS}")
    faults: dict[str, Fault] = {}
    trials = []
    varied = {one.key for one in axes if len(one.values) > 1}
    for values in itertools.product(*(one.values for one in axes)):
        try:
            trials.append(trial(file, {one.key: value for one, value in zip(axes, values)}, varied, seeds))
        except ExperimentError as error:
            faults |= {str(fault): fault for fault in error.faults}
    if faults:
        raise ExperimentError(str(file), list(faults.values()))
    _refuse_twins(trials)
    return trials


def _refuse_twins(trials: Sequence[Trial]) -> None:
    """Refuse combinations that are one experiment: what `identity` leaves out is not part of a run's folder."""
    seen: dict[str, str] = {}
    for one in trials:
        for experiment in one.experiments:
            other = seen.setdefault(identity(experiment), one.label)
            if other != one.label:
                raise InputError(
                    "two combinations are the same experiment: its name, [run] and compression.max_bytes do not count",
                    got=f"{other}; {one.label}",
                    hint="Sweep other fields; for those of [run], start `fedtrain simulate` with --set and --out",
                )


def trial(file: Path, values: Mapping[str, str], varied: Container[str], seeds: int) -> Trial:
    """Load one combination.

    Args:
        file: the experiment file.
        values: field -> value, in the order in which they are set.
        varied: the fields that have other values in other combinations.
        seeds: runs.

    Raises:
        ExperimentError: it has faults.
    """
    overrides = [f"{key}={value}" for key, value in values.items()]
    experiment = load(file, overrides)
    others = (load(file, [*overrides, f"seed={experiment.seed + i}"]) for i in range(1, seeds))
    return Trial(tuple(f"{key}={value}" for key, value in values.items() if key in varied), (experiment, *others))


def _check_axes(axes: Sequence[Axis], seeds: int) -> None:
    keys = [one.key for one in axes]
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise InputError("a field is set twice", got=", ".join(twice), hint="Name all its values in one --set")
    if "seed" in keys and seeds > 1:
        raise InputError("--seeds and --set seed contradict each other", hint="Give one of them")


def _split(text: str) -> Iterator[str]:
    """Split at commas outside of quotes, brackets and braces."""
    start = depth = 0
    quote = ""
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in _OPENING:
            depth += 1
        elif c in _CLOSING:
            depth -= 1
        elif c == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]
