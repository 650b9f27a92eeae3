from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.stopping import EmaAveraging, SwaAveraging, objections
from fedtrain.experiment.training import TrainingSection

SAMPLE = {"unit": "sample", "noise_multiplier": 1.0, "delta": 1e-5}
CENTRAL: dict[str, Any] = {"early_stopping": {}}
CLIENTS: dict[str, Any] = {"early_stopping": {"on": "clients"}}
PLATEAU: dict[str, Any] = {"schedule": {"name": "plateau", "on": "clients"}}
TESTED: dict[str, Any] = {"data": {"test": 0.2}, "evaluation": {"clients_every": 1}}


def objections_to(training: dict[str, Any], **sections: Any) -> list[str]:
    data = {"name": "digits", "clients": 3, **sections.pop("data", {})}
    # Built without validation, which would raise what `objections` says.
    whole = Experiment.model_validate({"data": data, **sections})
    return list(objections(whole.model_copy(update={"training": TrainingSection.model_validate(training)})))


@pytest.mark.parametrize(
    ("training", "sections", "words"),
    [
        (CENTRAL, {"evaluation": {"central_every": 0}}, "evaluation.central_every = 0"),
        (CLIENTS, {"data": {"test": 0.2}}, "evaluation.clients_every = 0"),
        (CLIENTS, {**TESTED, "evaluation": {"clients_every": 1, "max_clients": 0}}, "evaluation.max_clients = 0"),
        (CLIENTS, {"evaluation": {"clients_every": 1}}, "set data.test"),
        (CLIENTS, {"privacy": SAMPLE}, "privacy does not let out"),
        (PLATEAU, {"data": {"test": 0.2}}, 'training.schedule.on = "clients"'),
        (CLIENTS, {**TESTED, "personalization": {"private": ["fc2.*"]}}, "personalization.private"),
        (CENTRAL, {"personalization": {"fine_tune_epochs": 1}}, "personalization.fine_tune_epochs"),
        ({"average": {"start_round": 11}}, {}, "rounds = 10"),
    ],
)
def test_what_cannot_be_combined_is_one_sentence_that_names_the_field(training, sections, words):
    (sentence,) = objections_to(training, **sections)
    assert words in sentence
    assert "training." in sentence


def test_private_parameters_leave_no_central_evaluation_to_watch():
    plateau = {"schedule": {"name": "plateau"}}
    (sentence,) = objections_to(plateau, personalization={"private": ["fc2.*"]})
    assert "leaves the server no whole model" in sentence


@pytest.mark.parametrize(
    ("training", "sections"),
    [
        (CENTRAL, {}),
        (CENTRAL, {"privacy": SAMPLE}),
        (CLIENTS, TESTED),
        (PLATEAU, TESTED),
        ({"average": {}}, {"privacy": SAMPLE}),
        ({"average": {"start_round": 10}}, {"evaluation": {"central_every": 0}}),
        ({}, {"evaluation": {"central_every": 0}, "personalization": {"private": ["fc2.*"]}}),
    ],
)
def test_what_goes_together(training, sections):
    assert not objections_to(training, **sections)


def test_an_average_is_exponential_unless_named():
    average = lambda **section: TrainingSection.model_validate({"average": section}).average  # noqa: E731
    assert average() == EmaAveraging(name="ema", decay=0.9, start_round=1)
    assert average(name="swa", start_round=3) == SwaAveraging(name="swa", start_round=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"early_stopping": {"patience": 0}},
        {"early_stopping": {"min_delta": -0.1}},
        {"early_stopping": {"on": "server"}},
        {"average": {"decay": 1.0}},
        {"average": {"name": "swa", "decay": 0.9}},
        {"average": {"start_round": 0}},
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError):
        TrainingSection.model_validate(wrong)
