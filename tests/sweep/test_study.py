from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.errors import ExperimentError, InputError, MissingExtraError
from fedtrain.sweep.grid import Trial, axis
from fedtrain.sweep.study import Goal, Range, Study, range_of

FILE = """
seed = 3
[data]
name = "digits"
clients = 4
"""


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Study]:
    pytest.importorskip("optuna")
    file = tmp_path / "digits.toml"
    file.write_text(FILE)

    def make(trials: int = 12, maximize: bool = False, low: str = "0.001") -> Study:
        ranges = [range_of(f"training.optimizer.lr={low}:1:log"), range_of("training.batch_size=1:64")]
        axes = [axis("strategy.name=fedavg,fedprox"), axis("rounds=7")]
        return Study(file, axes, ranges, Goal("loss", maximize), trials, 2)

    return make


def distance(trial: Trial) -> float:
    """Least at lr = 0.1."""
    lr = trial.experiments[0].training.optimizer.lr
    return abs(lr - 0.1)


def labels(trials: list[Trial]) -> list[str]:
    return [trial.label for trial in trials]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=0.001:1:log", Range("lr", 0.001, 1, log=True, whole=False)),
        ("lr=1:2", Range("lr", 1, 2, log=False, whole=True)),
        ("lr= -1 : 2.0", Range("lr", -1, 2, log=False, whole=False)),
    ],
)
def test_a_range_has_two_ends_and_maybe_a_scale(text: str, expected: Range) -> None:
    assert range_of(text) == expected


@pytest.mark.parametrize(
    "text", ["lr", "lr=1", "lr=2:1", "lr=1:1", "lr=0:1:log", "lr=1:2:lin", "=1:2", "lr=nan:1", "lr=0:inf"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--range is wrong"):
        range_of(text)


def test_a_study_tries_the_values_it_was_given_and_ends_with_the_best_first(study: Callable, tmp_path: Path) -> None:
    tried: list[Trial] = []

    def value_of(trial: Trial) -> float:
        tried.append(trial)
        return distance(trial)

    found = study().run(tmp_path, value_of)
    assert len(tried) == len(found) == 12
    assert [distance(trial) for trial in found] == sorted(map(distance, tried))
    experiments = [trial.experiments for trial in tried]
    assert {tuple(e.seed for e in pair) for pair in experiments} == {(3, 4)}
    assert {pair[0].rounds for pair in experiments} == {7}
    assert {pair[0].strategy.name for pair in experiments} == {"fedavg", "fedprox"}
    assert all(0.001 <= pair[0].training.optimizer.lr <= 1 for pair in experiments)
    assert all(isinstance(pair[0].training.batch_size, int) for pair in experiments)
    largest = study(3, maximize=True).run(_folder(tmp_path / "max"), distance)
    assert distance(largest[0]) == max(map(distance, largest))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_study_that_was_killed_goes_on_as_if_it_had_not_been(study: Callable, tmp_path: Path) -> None:
    whole, cut = _folder(tmp_path / "whole"), _folder(tmp_path / "cut")
    expected: list[str] = []
    study().run(whole, lambda trial: expected.append(trial.label) or distance(trial))
    for killed_at in (0, 5, 11):
        seen: list[str] = []

        def value_of(trial: Trial, seen: list[str] = seen, killed_at: int = killed_at) -> float:
            seen.append(trial.label)
            if len(seen) == killed_at + 1:
                raise KeyboardInterrupt
            return distance(trial)

        with pytest.raises(KeyboardInterrupt):
            study().run(cut, value_of)
        assert seen == expected[: killed_at + 1]
    seen = []
    found = study().run(cut, lambda trial: seen.append(trial.label) or distance(trial))
    assert seen == expected
    assert sorted(labels(found)) == sorted(expected)


def test_a_trial_that_failed_is_tried_again_the_next_time(study: Callable, tmp_path: Path) -> None:
    first: list[str] = []

    def fails_once(trial: Trial) -> float | None:
        first.append(trial.label)
        return [distance(trial), None, float("nan")][len(first) - 1]

    assert labels(study(3).run(tmp_path, fails_once)) == first[:1]
    assert sorted(labels(study(3).run(tmp_path, distance))) == sorted(first)


def test_more_trials_may_be_added_but_not_another_study(study: Callable, tmp_path: Path) -> None:
    study(2).run(tmp_path, distance)
    assert len(study(3).run(tmp_path, distance)) == 3
    for other in (study(3, maximize=True), study(3, low="0.01")):
        with pytest.raises(InputError, match="another study"):
            other.run(tmp_path, distance)


def test_the_ends_of_the_ranges_are_checked_first(study: Callable) -> None:
    assert len(study().corners()) == 8
    with pytest.raises(ExperimentError, match=r"training\.optimizer\.lr: got -1"):
        Study(study().file, [], [range_of("training.optimizer.lr=-1.0:1")], Goal("loss", False), 3, 1).corners()


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"fedtrain\[sweep\]"):
        Study(tmp_path, [], [range_of("lr=1:2")], Goal("loss", False), 3, 1).corners()
