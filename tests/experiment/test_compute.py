from typing import Any

import pytest

from fedtrain.experiment.compute import objections
from fedtrain.experiment.sections import Experiment

PLAIN = Experiment.model_validate({"data": {"name": "digits", "clients": 2}})
PRIVATE = Experiment.model_validate(
    {
        "data": {"name": "digits", "clients": 2},
        "privacy": {"unit": "sample", "epsilon": 1.0, "delta": 1e-5, "max_grad_norm": 1.0},
    }
)


def changed(experiment: Experiment, section: str, **fields: Any) -> Experiment:
    return experiment.model_copy(update={section: getattr(experiment, section).model_copy(update=fields)})


@pytest.mark.parametrize(
    ("section", "field", "value", "instead"),
    [
        ("training", "clip_norm", 1.0, "privacy.max_grad_norm"),
        ("training", "clip_value", 1.0, "privacy.max_grad_norm"),
        ("training", "micro_batch_size", 4, "privacy.physical_batch_size"),
        ("training", "compile", True, "leave it out"),
        ("model", "checkpoint", ["fc*"], "privacy.physical_batch_size"),
        ("run", "gpus", 2, "run.gpus = 1"),
    ],
)
def test_what_dp_sgd_cannot_take_is_refused_by_name(section: str, field: str, value: Any, instead: str) -> None:
    (sentence,) = objections(changed(PRIVATE, section, **{field: value}))
    assert f"{section}.{field}" in sentence
    assert instead in sentence
    assert not list(objections(changed(PLAIN, section, **{field: value})))


def test_workers_and_several_devices_contradict_each_other() -> None:
    (sentence,) = objections(changed(PLAIN, "run", gpus=2, workers=2))
    assert sentence.startswith("run.gpus = 2")
    assert not list(objections(changed(PLAIN, "run", gpus=2, workers=0)))
    assert not list(objections(PRIVATE))


def test_the_compiler_leaves_no_room_for_checkpoints() -> None:
    (sentence,) = objections(changed(changed(PLAIN, "training", compile=True), "model", checkpoint=["fc*"]))
    assert "training.compile" in sentence
    assert "model.checkpoint" in sentence
