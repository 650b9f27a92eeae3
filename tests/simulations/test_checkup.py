"""Each check finds what it is for, in models that are wrong on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec, Examples
from fedtrain.experiment.model import ModelSection
from fedtrain.experiment.sections import Experiment
from fedtrain.simulations.checkup import check_up, layers
from fedtrain.tasks.adapted import experiment_task
from fedtrain.tasks.dense import Regressor
from fedtrain.tasks.objectives import Classification

SPEC = DataSpec((8,), "class", 4)
EXPERIMENT = Experiment.model_validate({"data": {"name": "digits", "clients": 2}, "training": {"batch_size": 8}})


def examples(scale: float = 1.0) -> Examples:
    rng = torch.Generator().manual_seed(0)
    return Examples(scale * torch.randn(64, 8, generator=rng), torch.randint(4, (64,), generator=rng))


class Own(Classification):
    """A perceptron with something done to it."""

    def __init__(self, change: Any = None) -> None:
        self.spec, self._change = SPEC, change

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        return (self._change(model) if self._change else None) or model


def verdicts(
    task: Any, data: Examples | None = None, experiment: Experiment = EXPERIMENT
) -> dict[str, tuple[str, str]]:
    return {one.name: (one.verdict, one.text) for one in check_up(experiment, task, SPEC, data or examples())}


def verdict_of(
    check: str, task: Any, data: Examples | None = None, experiment: Experiment = EXPERIMENT
) -> tuple[str, str]:
    """As far as that check, and no further."""
    found = check_up(experiment, task, SPEC, data or examples())
    return next((one.verdict, one.text) for one in found if one.name == check)


def test_nothing_is_found_wrong_with_a_good_model() -> None:
    found = verdicts(Own())
    assert {name: verdict for name, (verdict, _) in found.items() if verdict != "ok"} == {}
    assert list(found) == [
        "inputs",
        "targets",
        "first loss",
        "gradient",
        "reach",
        "units",
        "gradient norms",
        "learning rate",
        "DP-SGD",
        "one batch",
    ]


class Detached(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return self[2](self[1](self[0](inputs)).detach()) + 0 * self[0](inputs).sum()


class Unused(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return self[1](self[0](inputs))[:, :4]


class Constant(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(torch.zeros_like(inputs))


def dead(model: nn.Sequential) -> None:
    nn.init.constant_(model[0].bias, -100.0)


def immense(model: nn.Sequential) -> None:
    nn.init.normal_(model[2].weight, std=100.0)


def fading(model: nn.Sequential) -> None:
    nn.init.normal_(model[2].weight, std=1e-7)


def test_targets_far_from_what_the_model_puts_out_are_odd() -> None:
    spec, data = DataSpec((8,), "number"), examples()

    def told(targets: Tensor, **options: float) -> tuple[str, str]:
        task = Regressor(spec, **options)
        found = check_up(EXPERIMENT, task, spec, Examples(data.inputs, targets))
        return next((one.verdict, one.text) for one in found if one.name == "targets")

    standard = torch.linspace(-2, 2, 64)
    assert told(standard)[0] == told(29 + 10 * standard, target_mean=29.0, target_std=10.0)[0] == "ok"
    verdict, text = told(4e5 + 1e5 * standard)
    assert (verdict, "task.options.target_mean" in text) == ("odd", True)
    assert told(29 + standard)[0] == "odd"
    assert told(40 * standard)[0] == "odd"
    assert told(standard, target_mean=1e4)[0] == "odd"
    assert verdict_of("targets", Own()) == ("ok", "4 of 4 classes")
    found = check_up(EXPERIMENT, Own(), spec, Examples(data.inputs, 4e5 + standard))  # its outputs are no numbers
    assert next(one.verdict for one in found if one.name == "targets") == "ok"


@pytest.mark.parametrize(
    ("change", "check", "verdict", "told"),
    [
        (lambda m: Detached(*m), "gradient", "odd", "detached"),
        (lambda m: Unused(*m), "reach", "odd", "2.weight, 2.bias"),
        (dead, "units", "odd", "100% of 1"),
        (immense, "first loss", "odd", "far too large"),
        (fading, "gradient norms", "odd", "vanish"),
        (lambda m: Constant(8, 4), "one batch", "wrong", "does not learn"),
        (lambda m: nn.Sequential(m[0], nn.BatchNorm1d(64), *m[1:]), "DP-SGD", "odd", "mixes the examples"),
    ],
)
def test_each_check_finds_what_it_is_for(change: Any, check: str, verdict: str, told: str) -> None:
    found = verdict_of(check, Own(change))
    assert found[0] == verdict
    assert told in found[1]


@pytest.mark.parametrize(("lr", "verdict"), [(1e9, "wrong"), (5.0, "odd"), (1e-9, "odd"), (0.1, "ok")])
def test_a_rate_that_is_out_of_all_proportion_is_found(lr: float, verdict: str) -> None:
    training = EXPERIMENT.training.model_copy(
        update={"optimizer": EXPERIMENT.training.optimizer.model_copy(update={"lr": lr})}
    )
    experiment = EXPERIMENT.model_copy(update={"training": training})
    assert verdict_of("learning rate", Own(), experiment=experiment)[0] == verdict


def test_inputs_that_are_not_scaled_or_not_finite_are_found() -> None:
    assert verdict_of("inputs", Own(), examples(1000.0))[0] == "odd"
    odd = examples()
    odd.inputs[3, 2] = torch.nan
    assert verdict_of("inputs", Own(), odd) == ("wrong", "some are NaN or infinite; see data.missing")


def test_a_task_that_fails_in_one_check_does_not_end_the_others() -> None:
    class Failing(Own):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            if outputs.dtype == torch.float64:
                raise ValueError("no doubles here")
            return super().loss(outputs, targets)

    found = verdicts(Failing())
    assert found["gradient"][0] == "wrong"
    assert found["one batch"][0] == "ok"


def test_layers_are_told_with_shapes_and_dead_units() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 4))
    nn.init.zeros_(model[0].weight)
    model[0].bias.data = torch.tensor([1.0, -1.0, -1.0])
    model[2].weight.requires_grad_(False)
    found = layers(model, examples().inputs)
    assert [(one.name, one.kind, one.shape, one.parameters, one.trained) for one in found] == [
        ("0", "Linear", (3,), 27, 27),
        ("1", "ReLU", (3,), 0, 0),
        ("2", "Linear", (4,), 16, 4),
    ]
    assert found[1].dead == pytest.approx(2 / 3)
    assert found[0].dead is None


def test_a_built_in_task_passes() -> None:
    task = experiment_task(EXPERIMENT.model_copy(), SPEC, Path())
    assert all(verdict == "ok" for verdict, _ in verdicts(task).values())


def test_adapters_that_start_at_zero_are_no_fault() -> None:
    adapted = EXPERIMENT.model_copy(update={"model": ModelSection.model_validate({"lora": {"rank": 2}})})
    task = experiment_task(adapted, SPEC, Path())
    assert verdict_of("units", task, experiment=adapted)[0] == "ok"
