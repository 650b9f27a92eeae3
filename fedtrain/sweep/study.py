"""An Optuna study over fields of an experiment; killed and started again it goes on as if it had not been.

Each trial draws from a sampler seeded by the experiment's seed and the trial's number, so what it suggests depends only
on the trials before it, not on how often the study was stopped.

References:
    Akiba et al.: Optuna: A Next-generation Hyperparameter Optimization Framework. KDD 2019.
    Bergstra et al.: Algorithms for Hyper-Parameter Optimization (TPE). NeurIPS 2011.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedtrain.errors import InputError, MissingExtraError
from fedtrain.experiment.load import identity
from fedtrain.experiment.schema import inline
from fedtrain.seeds import seed_of
from fedtrain.sweep.grid import Axis, Trial, grid, trial

__all__ = ["Goal", "Range", "Study", "range_of"]

_FILE = "study.db"


@dataclass(frozen=True)
class Range:
    """One field and the numbers that it may have."""

    key: str  # dotted path
    low: float
    high: float
    log: bool
    whole: bool  # integers only


@dataclass(frozen=True)
class Goal:
    """What a study looks for."""

    metric: str
    maximize: bool


@dataclass(frozen=True)
class Study:
    """What a study tries.

    Attributes:
        file: the experiment file.
        axes: fields with one value, or with several to choose from.
        ranges: fields with a range of numbers.
        goal: what it looks for.
        trials: how many combinations it tries.
        seeds: runs per combination.
    """

    file: Path
    axes: Sequence[Axis]
    ranges: Sequence[Range]
    goal: Goal
    trials: int
    seeds: int

    def corners(self) -> list[Trial]:
        """Load the combinations at the ends of the ranges, so that their faults are found before anything is run.

        Raises:
            MissingExtraError: optuna is not installed.
            InputError: a field is given twice.
            ExperimentError: they have faults.
        """
        _optuna()
        ends = [Axis(r.key, tuple(dict.fromkeys(_text(end, r) for end in (r.low, r.high)))) for r in self.ranges]
        return grid(self.file, [*self.axes, *ends], self.seeds)

    def run(self, out: Path, value_of: Callable[[Trial], float | None]) -> list[Trial]:
        """Try all combinations; those that were measured before are run and measured again, which costs nothing.

        Args:
            out: the sweep's folder, which keeps the study.
            value_of: runs a combination and measures it; None if it failed.

        Returns:
            The combinations that were measured, the best first.

        Raises:
            InputError: the folder holds another study.
        """
        optuna = _optuna()
        corner = self.corners()[0].experiments[0]
        study = optuna.create_study(
            storage=f"sqlite:///{(out / _FILE).absolute()}",
            study_name="sweep",
            direction="maximize" if self.goal.maximize else "minimize",
            load_if_exists=True,
        )
        self._refuse_other(study, identity(corner), out)
        for index in range(self.trials):
            study.sampler = optuna.samplers.TPESampler(seed=seed_of(corner.seed, "sweep", index) % 2**32)
            earlier = [t for t in study.trials if t.user_attrs.get("index") == index]
            params = dict(earlier[0].params) if earlier else self._suggest(study, index)
            value = value_of(self._trial(params))
            is_new = all(t.value is None for t in earlier)
            if is_new and value is not None and math.isfinite(value):
                study.add_trial(
                    optuna.trial.create_trial(
                        value=value,
                        params=params,
                        distributions=self._distributions(optuna),
                        user_attrs={"index": index},
                    )
                )
        sign = -1 if self.goal.maximize else 1
        done = sorted((t for t in study.trials if t.value is not None), key=lambda t: sign * t.value)
        return [self._trial(t.params) for t in done]

    def _suggest(self, study: Any, index: int) -> dict[str, Any]:
        """Ask the sampler, and write down what it says: a study that is killed tries the same again."""
        optuna = _optuna()
        asked = study.ask(self._distributions(optuna))
        asked.set_user_attr("index", index)
        study.tell(asked, state=optuna.trial.TrialState.FAIL)  # until it is measured
        return dict(asked.params)

    def _distributions(self, optuna: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            one.key: optuna.distributions.CategoricalDistribution(one.values)
            for one in self.axes
            if len(one.values) > 1
        }
        for one in self.ranges:
            if one.whole:
                found[one.key] = optuna.distributions.IntDistribution(int(one.low), int(one.high), log=one.log)
            else:
                found[one.key] = optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)
        return found

    def _trial(self, params: Mapping[str, Any]) -> Trial:
        """Load the combination of a trial's parameters."""
        values = {one.key: params.get(one.key, one.values[0]) for one in self.axes}
        values |= {one.key: _text(params[one.key], one) for one in self.ranges}
        return trial(self.file, values, params, self.seeds)

    def _refuse_other(self, study: Any, corner: str, out: Path) -> None:
        axes, ranges = [asdict(one) for one in self.axes], [asdict(one) for one in self.ranges]
        parts = [corner, axes, ranges, asdict(self.goal), self.seeds]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        if study.user_attrs.get("sweep", digest) != digest:
            raise InputError(
                "this folder holds another study",
                got=out,
                hint="Give the same ranges, values, metric and seeds, or choose another folder with --out",
            )
        study.set_user_attr("sweep", digest)


def range_of(text: str) -> Range:
    """Read `KEY=LOW:HIGH[:log]`; if both ends are written as integers, only integers are tried.

    Raises:
        InputError: it is something else.
    """
    key, _, span = text.partition("=")
    ends = span.strip().split(":")
    log = len(ends) == 3 and ends[2].strip() == "log"
    try:
        low, high = map(float, ends[:2] if log else ends)
    except ValueError:
        low, high = 1.0, 0.0
    if not key.strip() or not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0):
        raise InputError(
            "--range is wrong",
            got=text,
            expected="KEY=LOW:HIGH or KEY=LOW:HIGH:log, such as training.optimizer.lr=0.001:1:log",
            hint="LOW is below HIGH, and above 0 where the scale is logarithmic",
        )
    whole = all(end.strip().lstrip("+-").isdigit() for end in ends[:2])
    return Range(key.strip(), low, high, log, whole)


def _text(value: float, one: Range) -> str:
    if one.whole:
        return inline(int(value))
    return inline(min(max(float(f"{value:.4g}"), one.low), one.high))  # more digits decide nothing


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "sweep", "--optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
