from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from fedtrain.experiment import Experiment
from fedtrain.experiment.optimizers import OptimizerSection, OwnOptimizer, objections, rooted
from fedtrain.experiment.training import TrainingSection

MINIMAL = {"data": {"name": "digits", "clients": 5}}


def experiment(**sections) -> Experiment:
    """Sections that are right each by itself, whether or not they go together."""
    each = {key: getattr(Experiment.model_validate({**MINIMAL, key: value}), key) for key, value in sections.items()}
    return Experiment.model_validate(MINIMAL).model_copy(update=each)


def named_like_torchs() -> dict[str, str]:
    kinds = vars(torch.optim).items()
    return {
        name.lower(): name
        for name, kind in kinds
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }


def test_the_names_are_those_of_torch() -> None:
    union = get_args(OptimizerSection)[0]
    names = {name for kind in get_args(union) for name in get_args(kind.model_fields["name"].annotation)}
    assert names - {"adabound", "own"} == named_like_torchs().keys() - {"lbfgs", "sparseadam"}


@pytest.mark.parametrize(("name", "why"), [("lbfgs", "several times in a step"), ("Sparse-Adam", "sparse gradients")])
def test_what_is_not_offered_says_why(name: str, why: str) -> None:
    with pytest.raises(ValidationError, match=f'"{name.lower().replace("-", "")}" is not offered.*{why}'):
        TrainingSection.model_validate({"optimizer": {"name": name}})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("torch.optim:RAdam", "torch.optim:RAdam"),
        ("own.py:Mine", "/some/where/own.py:Mine"),
        ("/else/own.py:Mine", "/else/own.py:Mine"),
    ],
)
def test_an_own_optimizer_is_found_from_everywhere(path: str, expected: str) -> None:
    training = TrainingSection(optimizer=OwnOptimizer(name="own", path=path, lr=0.5), batch_size=7)
    found = rooted(training, Path("/some/where"))
    assert found == training.model_copy(update={"optimizer": OwnOptimizer(name="own", path=expected, lr=0.5)})
    assert rooted(TrainingSection(), Path("/some/where")) == TrainingSection()


@pytest.mark.parametrize(
    ("sections", "objection"),
    [
        ({"training": {"schedule": {"by": "step"}}}, None),
        ({"training": {"optimizer_state": "average"}}, None),
        ({"strategy": {"name": "scaffold"}, "training": {"schedule": {"by": "step"}}}, 'schedule.by = "step"'),
        ({"strategy": {"name": "fednova"}, "training": {"layer_lr": {"fc*": 0.1}}}, "training.layer_lr"),
        ({"strategy": {"name": "fednova"}, "training": {"optimizer_state": "keep"}}, "how often each gradient"),
        ({"strategy": {"name": "median"}, "training": {"optimizer_state": "average"}}, "plain mean"),
        ({"strategy": {"name": "fedbuff", "buffer_size": 2}, "training": {"optimizer_state": "average"}}, "plain mean"),
        ({"strategy": {"name": "median"}, "training": {"optimizer_state": "keep"}}, None),
        (
            {"privacy": {"epsilon": 1.0, "delta": 1e-5}, "training": {"optimizer_state": "average"}},
            "the noise of privacy does not cover",
        ),
        (
            {"personalization": {"private": ["fc2*"]}, "training": {"optimizer_state": "average"}},
            "personalization.private keeps on the clients",
        ),
    ],
)
def test_what_does_not_go_together_says_so_once(sections: dict, objection: str | None) -> None:
    found = list(objections(experiment(**sections)))
    assert len(found) == (objection is not None)
    if objection:
        assert objection in found[0]
