from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedtrain.experiment.losses import CurriculumSection, objections
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.training import TrainingSection

SAMPLE = {"unit": "sample", "noise_multiplier": 1.0, "delta": 1e-5}


def experiment(privacy: dict[str, Any] | None = None, **training: Any) -> Experiment:
    # Built without validation, which would raise what `objections` says.
    whole = Experiment.model_validate({"data": {"name": "digits", "clients": 3}, "privacy": privacy})
    return whole.model_copy(update={"training": TrainingSection.model_validate(training)})


@pytest.mark.parametrize("field", ["balance", "curriculum"])
def test_what_tells_of_the_examples_without_noise_is_refused_where_each_is_protected(field):
    value = {"balance": "weight", "curriculum": {}}[field]
    (sentence,) = objections(experiment(SAMPLE, **{field: value}))
    assert f"training.{field}" in sentence
    assert "privacy.unit" in sentence
    assert not list(objections(experiment(**{field: value})))
    assert not list(objections(experiment({**SAMPLE, "unit": "client"}, **{field: value})))


def test_losses_and_penalties_go_with_privacy():
    assert not list(objections(experiment(SAMPLE, loss={"name": "focal"}, penalty={"l1": 0.1}, balance="none")))


def test_a_curriculum_grows_linearly_to_all_examples():
    section = CurriculumSection(rounds=5, start=0.2)
    assert [section.share(r) for r in (1, 2, 3, 4, 5, 6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": {"name": "cross"}},
        {"loss": {"name": "mse", "delta": 1.0}},
        {"loss": {"name": "quantile", "q": []}},
        {"loss": {"name": "quantile", "q": [1.0]}},
        {"loss": {"name": "focal", "gamma": -1.0}},
        {"loss": {"name": "cross-entropy", "label_smoothing": 1.0}},
        {"loss": {"name": "own", "path": "loss.py"}},
        {"penalty": {"l1": -0.1}},
        {"balance": "both"},
        {"curriculum": {"rounds": 1}},
        {"curriculum": {"start": 0.0}},
        {"curriculum": {"score": "difficulty"}},
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError):
        TrainingSection.model_validate(wrong)
