from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from fedtrain.errors import ExperimentError
from fedtrain.experiment import load
from fedtrain.experiment.evaluation import EvaluationSection, MetricName, higher_is_better, objections
from fedtrain.experiment.sections import Experiment


def experiment(**sections: Any) -> Experiment:
    data = {"name": "digits", "clients": 4} | sections.pop("data", {})
    return Experiment.model_validate({"data": data, **sections})


def test_what_grows_and_what_shrinks() -> None:
    shrink = {"calibration-error", "perplexity", "confusion-matrix", "rmse", "mae", "mape"}
    assert {name for name in get_args(MetricName) if not higher_is_better(name)} == shrink
    assert higher_is_better("adversarial-accuracy")
    assert not any(map(higher_is_better, ("loss", "auroc-bound", "parity-difference", "odds-difference", "own")))


def test_of_a_file(tiny: Path) -> None:
    section = load(
        tiny,
        (
            'evaluation.metrics=["auroc", "f1-macro"]',
            'evaluation.group={column="sex=Male"}',
            "evaluation.attack={epsilon=0.1, clip=[0.0, 1.0]}",
        ),
    ).evaluation
    assert section.metrics == ["auroc", "f1-macro"]
    assert section.group is not None
    assert section.group.above == 0.5
    assert section.attack is not None
    assert section.attack.clip == (0.0, 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('evaluation.metrics=["auc"]', r"evaluation.metrics\[0\]: got .?auc"),
        ("evaluation.attack={epsilon=0.0}", "evaluation.attack.epsilon: got 0.0"),
        ("evaluation.attack={epsilon=0.1, clip=[1.0, 0.0]}", "clip needs its least value before its greatest"),
        ("evaluation.attack={epsilon=0.1, steps=3}", "evaluation.attack.steps: got an unknown key"),
        ("evaluation.group={above=0.5}", "evaluation.group.column"),
        ('evaluation.target_metric="auroc"', "target_metric and target_value go together"),
        ('evaluation={target_metric="f1", target_value=90}', "target_value = 90 is never reached: f1 is at most 1"),
    ],
)
def test_bad_values_name_their_field(tiny: Path, override: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        load(tiny, (override,))


def test_a_goal_of_an_error_may_be_any_number(tiny: Path) -> None:
    assert load(tiny, ('evaluation={target_metric="accuracy", target_value=1.0}',)).evaluation.target_value == 1
    section = load(tiny, ('evaluation={target_metric="mae", target_value=90}',)).evaluation
    assert section.target_value == 90


def test_what_does_not_go_with_the_rest() -> None:
    both = {"group": {"column": "age"}, "attack": {"epsilon": 0.1}}
    assert list(objections(experiment(evaluation=both))) == []
    for name, section in both.items():
        with pytest.raises(ValidationError, match=f"evaluation.{name} "):
            experiment(evaluation={name: section}, data={"scaling": "client"})
    with pytest.raises(ValidationError, match=r"evaluation.attack "):
        experiment(evaluation={"attack": both["attack"]}, personalization={"private": ["fc2*"]})


def test_nothing_is_asked_for_by_default() -> None:
    section = EvaluationSection()
    assert (section.metrics, section.group, section.attack) == ([], None, None)
