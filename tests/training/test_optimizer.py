from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from fedtrain.errors import InputError
from fedtrain.experiment.optimizers import AdamSection, OptimizerSection, SgdSection
from fedtrain.experiment.training import TrainingSection
from fedtrain.statefile import read_state, write_state
from fedtrain.training.adabound import AdaBound
from fedtrain.training.optimizer import LocalOptimizer, check_optimizer, torch_optimizers

NAMES = ["adabound", "adadelta", "adafactor", "adagrad", "adamax", "asgd", "muon", "nadam", "radam", "rmsprop", "rprop"]
KINDS = {name.lower(): kind for name, kind in torch_optimizers().items()} | {"adabound": AdaBound}
EVERY = [*NAMES, "adam", "adamw", "sgd"]
OWN = """
import torch

class Odd(torch.optim.SGD):
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = {1, 2}

def fails(params, lr, depth=1):
    return torch.optim.SGD(params, lr, momentum="much")

def nested(params, lr, momentum=0.9):
    return torch.optim.SGD(params, lr, momentum)

number = 3
"""


def section(**settings) -> OptimizerSection:
    return TypeAdapter(OptimizerSection).validate_python(settings)


def training(optimizer, **settings) -> TrainingSection:
    return TrainingSection(optimizer=section(**optimizer) if isinstance(optimizer, dict) else optimizer, **settings)


def start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(3, 2, generator=generator), "b.weight": torch.randn(2, 2, generator=generator)}


def gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(3, 2, generator=generator), torch.randn(2, 2, generator=generator)]


def steps(optimizer: LocalOptimizer, *counts: int, factor: float = 1.0) -> None:
    for count in counts:
        optimizer.step(gradients(count), factor)


def torchs(kind, *counts: int, groups=None, **settings) -> list[torch.Tensor]:
    """What an optimiser of torch makes of the same start, with or without groups of its own."""
    params = [p.requires_grad_() for p in start().values()]
    given = params if groups is None else [{"params": [p], **group} for p, group in zip(params, groups, strict=True)]
    optimizer = kind(given, **settings)
    for count in counts:
        for param, gradient in zip(params, gradients(count), strict=True):
            param.grad = gradient
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_sgd_is_torchs_own(settings: dict) -> None:
    params = start()
    steps(LocalOptimizer(training(SgdSection(lr=0.2, **settings)), params), 1, 2, 3, 4, factor=0.5)
    for mine, reference in zip(params.values(), torchs(torch.optim.SGD, 1, 2, 3, 4, lr=0.1, **settings), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_is_torchs_own(name: str, kind: type[torch.optim.Optimizer]) -> None:
    params = start()
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.5}
    steps(LocalOptimizer(training(AdamSection(name=name, **settings)), params), 1, 2, 3)
    assert all(map(torch.equal, params.values(), torchs(kind, 1, 2, 3, **settings)))


@pytest.mark.parametrize("name", NAMES)
def test_every_other_one_is_its_class_with_its_options(name: str) -> None:
    params, options = start(), {} if name == "rprop" else {"weight_decay": 0.25}
    steps(LocalOptimizer(training({"name": name, "lr": 0.1, "options": options}), params), 1, 2, 3)
    assert all(map(torch.equal, params.values(), torchs(KINDS[name], 1, 2, 3, lr=0.1, **options)))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "sgd"])
def test_layers_have_rates_of_their_own(name: str) -> None:
    params = start()
    optimizer = training({"name": name, "lr": 0.5}, layer_lr={"a.*": 0.5, "*": 1.0, "a.weight": 7.0})
    steps(LocalOptimizer(optimizer, params), 1, 2, factor=0.5)
    decay = {"weight_decay": 0.0} if name == "adamw" else {}  # torch's own default is another
    expected = torchs(KINDS[name], 1, 2, groups=[{"lr": 0.125}, {"lr": 0.25}], lr=0.5, **decay)
    for mine, reference in zip(params.values(), expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_layers_of_sgd_have_rates_of_their_own() -> None:
    params = start()
    sgd = SgdSection(lr=0.5, momentum=0.9)
    steps(LocalOptimizer(training(sgd, layer_lr={"b.*": 0.25}), params), 1, 2)
    expected = torchs(torch.optim.SGD, 1, 2, groups=[{"lr": 0.5}, {"lr": 0.125}], lr=0.5, momentum=0.9)
    for mine, reference in zip(params.values(), expected, strict=True):
        torch.testing.assert_close(mine, reference)
    still = start()
    steps(LocalOptimizer(training(SgdSection(), layer_lr={"*": 0.0}), still), 1)
    assert all(map(torch.equal, still.values(), start().values()))


@pytest.mark.parametrize("name", EVERY)
def test_what_is_kept_goes_on_to_the_byte(name: str, tmp_path: Path) -> None:
    settings = {"name": name, "lr": 0.1} | ({"momentum": 0.9} if name == "sgd" else {})
    through, before = start(), start()
    steps(LocalOptimizer(training(settings), through), 1, 2, 3, 4)
    first = LocalOptimizer(training(settings), before)
    steps(first, 1, 2)
    write_state(tmp_path / "kept", first.state())
    kept = read_state(tmp_path / "kept")
    again = {name: p.clone() for name, p in before.items()}
    steps(LocalOptimizer(training(settings), again, kept), 3, 4)
    assert all(map(torch.equal, again.values(), through.values()))
    steps(LocalOptimizer(training(settings), before), 3, 4)
    assert not all(map(torch.equal, before.values(), through.values())), "a reset would have told"


@pytest.mark.parametrize("settings", [{"name": "adam"}, {"name": "sgd", "momentum": 0.9}])
def test_parameters_come_and_go_between_rounds(settings: dict) -> None:
    whole = start()
    both = LocalOptimizer(training(settings, layer_lr={"a*": 0.5}), whole)
    steps(both, 1)
    kept = both.state()
    # Only b is trained now: it goes on with its own moments, whatever its place was.
    alone = {"b.weight": whole["b.weight"].clone()}
    one = LocalOptimizer(training(settings, layer_lr={"a*": 0.5}), alone, kept)
    one.step(gradients(2)[1:], 1.0)
    steps(both, 2)
    assert torch.equal(alone["b.weight"], whole["b.weight"])
    assert one.state().keys() == {"b.weight"}
    # And a comes back, fresh.
    back = start()
    steps(LocalOptimizer(training(settings, layer_lr={"a*": 0.5}), back, one.state()), 1)
    fresh = start()
    steps(LocalOptimizer(training(settings, layer_lr={"a*": 0.5}), fresh), 1)
    assert torch.equal(back["a.weight"], fresh["a.weight"])
    assert not torch.equal(back["b.weight"], fresh["b.weight"])


def test_nothing_is_kept_of_plain_sgd() -> None:
    optimizer = LocalOptimizer(training(SgdSection()), start())
    steps(optimizer, 1)
    assert optimizer.state() == {}


@pytest.mark.parametrize("name", [name for name in EVERY if name != "muon"])
def test_what_trains_the_model_passes_and_leaves_it(name: str) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    check_optimizer(training({"name": name}, optimizer_state="keep", layer_lr={"bias": 0.1}), Path(), model)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        ({"name": "muon"}, {}, '"muon" cannot train this model .*2D'),
        ({"name": "rmsprop", "options": {"alpah": 0.5}}, {}, "no such option: got alpah.*Did you mean alpha"),
        ({"name": "rmsprop", "options": {"lr": 0.5}}, {}, "no such option: got lr"),
        ({"name": "rmsprop", "options": {"alpha": -1.0}}, {}, "rmsprop.*got {'alpha': -1.0}.*Invalid alpha"),
        ({"name": "nadam", "options": {"betas": [0.9, "x"]}}, {}, "nadam.*cannot train this model"),
        ({"name": "sgd"}, {"layer_lr": {"head*": 0.1}}, "layer_lr = head.*; expected .* among weight, bias"),
        (
            {"name": "own", "path": "own.py:fails"},
            {},
            r"trying training\.optimizer\.path .*own\.py, line 12: TypeError",
        ),
        ({"name": "own", "path": "own.py:fails", "options": {"deep": 1}}, {}, "fails has no such option: got deep"),
        ({"name": "own", "path": "own.py:gone"}, {}, "defines no 'gone'"),
        ({"name": "own", "path": "own.py:number"}, {}, "names no class or function"),
        ({"name": "own", "path": "torch.optim:LBFGS"}, {}, "trying training.optimizer.path"),
        ({"name": "own", "path": "own.py:Odd"}, {"optimizer_state": "keep"}, "is not for an optimizer that keeps.*set"),
        ({"name": "own", "path": "own.py:Odd"}, {"optimizer_state": "average"}, "got seen = {1, 2}"),
    ],
)
def test_what_would_fail_in_the_first_round_is_refused_before(
    optimizer: dict, settings: dict, message: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(InputError, match=message):
        check_optimizer(training(optimizer, **settings), tmp_path, nn.Linear(3, 2))


def test_an_own_one_trains(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    own = {"name": "own", "path": f"{tmp_path}/own.py:nested", "lr": 0.2, "options": {"momentum": 0.5}}
    check_optimizer(training(own, optimizer_state="average"), tmp_path, nn.Linear(3, 2))
    params = start()
    steps(LocalOptimizer(training(own), params), 1, 2)
    assert all(map(torch.equal, params.values(), torchs(torch.optim.SGD, 1, 2, lr=0.2, momentum=0.5)))
