from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrain.errors import InputError
from fedtrain.experiment.strategies import (
    FedAdagradStrategy,
    FedAdamStrategy,
    FedAvgMStrategy,
    FedOptStrategy,
    FedYogiStrategy,
)
from fedtrain.params import Params
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.fedavgm import fedavgm
from fedtrain.strategies.fedopt import fedadagrad, fedadam, fedopt, fedyogi
from fedtrain.wire import Update


def averaging_to(delta: float) -> Iterator[Update]:
    """Two clients, whose mean by examples this is."""
    yield Update("a", 1, {"w": torch.tensor([delta - 3])}, num_examples=1)
    yield Update("b", 1, {"w": torch.tensor([delta + 1])}, num_examples=3)


def trajectory(strategy: FederatedStrategy, *deltas: float) -> list[float]:
    """The one parameter, 0 before the first round, after each."""
    algorithm, params = strategy.algorithm, {"w": torch.zeros(1)}
    state, values = algorithm.init(params), []
    for delta in deltas:
        params, state = algorithm.apply(state, params, averaging_to(delta))
        values.append(params["w"].item())
    return values


def torch_optim(name: str, **options: Any) -> FederatedStrategy:
    return fedopt(FedOptStrategy(name="fedopt", optimizer=name, options=options))


def test_fedavgm_by_hand() -> None:
    strategy = fedavgm(FedAvgMStrategy(name="fedavgm", server_lr=2.0, momentum=0.5))
    # v = 4, then 0.5 * 4 - 1 = 1; each step is 2 v
    assert trajectory(strategy, 4.0, -1.0) == [8.0, 10.0]


def test_fedadagrad_by_hand() -> None:
    strategy = fedadagrad(FedAdagradStrategy(name="fedadagrad", server_lr=2.0, tau=3.0))
    # v = 9 + 16 = 25: 2 * 4 / (5 + 3); v = 25 + 144 = 169: 2 * 12 / (13 + 3)
    assert trajectory(strategy, 4.0, 12.0) == [1.0, 2.5]


def test_fedadagrad_remembers_one_model() -> None:
    algorithm, params = fedadagrad(FedAdagradStrategy(name="fedadagrad")).algorithm, {"w": torch.zeros(1)}
    first = algorithm.init(params)
    _, second = algorithm.apply(first, params, averaging_to(4.0))
    assert first.keys() == second.keys() == {"v"}


def test_fedadam_by_hand() -> None:
    strategy = fedadam(FedAdamStrategy(name="fedadam", server_lr=12.0, betas=(0.5, 0.5), tau=1.0))
    # m = 3.5, v = (1 + 49) / 2 = 25: 12 * 3.5 / (5 + 1); m = 1.75 - 2.5, v = (25 + 25) / 2: 12 * -0.75 / (5 + 1)
    assert trajectory(strategy, 7.0, -5.0) == [7.0, 5.5]


def test_fedyogi_by_hand() -> None:
    strategy = fedyogi(FedYogiStrategy(name="fedyogi", server_lr=28.0, betas=(0.5, 0.5), tau=7.0))
    # m = 4, v = 49 + 64 / 2 = 81, for 64 > 49: 28 * 4 / (9 + 7)
    # m = 2 - 4, v = 81 - 64 / 2 = 49, for 64 < 81: 28 * -2 / (7 + 7)
    assert trajectory(strategy, 8.0, -8.0) == [7.0, 3.0]


def test_torch_sgd_by_hand() -> None:
    # velocity 4, then 0.5 * 4 + 4
    assert trajectory(torch_optim("SGD", lr=0.5, momentum=0.5), 4.0, 4.0) == [2.0, 5.0]


@pytest.mark.parametrize(
    "name",
    [
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    ],
)
def test_every_optimizer_goes_on_as_if_it_had_been_kept(name: str) -> None:
    shapes = {"matrix": (3, 2), "vector": (4,), "scalar": (), "empty": (0,)}
    params: Params = {n: torch.ones(shape) for n, shape in shapes.items()}
    kept = [t.clone() for t in params.values() if t.numel()]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(kept, **options)
    algorithm = torch_optim(name, **options).algorithm
    state = algorithm.init(params)
    rng = torch.Generator().manual_seed(0)
    for round_number in range(1, 4):
        delta = {n: torch.randn(shape, generator=rng) for n, shape in shapes.items()}
        params, state = algorithm.apply(state, params, [Update("a", round_number, delta, 5)])
        for t, d in zip(kept, delta.values()):
            t.grad = -d
        optimizer.step()
        assert all(map(torch.equal, kept, params.values()))
        assert all(isinstance(value, Tensor) for values in state.values() for value in values.values())
    assert all(state[n] for n in shapes if n != "empty")
    assert [t.grad for t in params.values()] == [None] * 4  # a gradient would hold one more model


@pytest.mark.parametrize("name", ["Adagrd", "lr_scheduler", "Optimizer", "__builtins__"])
def test_an_unknown_optimizer_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="no such optimizer") as error:
        torch_optim(name)
    assert (error.value.hint == "Did you mean Adagrad?") == (name == "Adagrd")


@pytest.mark.parametrize(("option", "meant"), [("momentun", "momentum"), ("params", None)])
def test_an_unknown_option_is_refused(option: str, meant: str | None) -> None:
    with pytest.raises(InputError, match=f"no such option: got {option}; expected one of lr, momentum") as error:
        torch_optim("SGD", **{option: 0.9})
    assert error.value.hint == (f"Did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("SGD", {"lr": -1.0}, "Invalid learning rate"),
        ("Adam", {"lr": "fast"}, "not supported between"),
        ("Adam", {"betas": 0.9}, "subscriptable"),
        ("LBFGS", {}, "closure"),
        ("SparseAdam", {}, "dense gradients"),
        ("Muon", {}, "2D parameters"),
    ],
)
def test_what_torch_refuses_is_refused_before_the_first_round(name: str, options: dict[str, Any], why: str) -> None:
    algorithm = torch_optim(name, **options).algorithm
    with pytest.raises(InputError, match=f"torch.optim.{name} cannot train this model.*{why}"):
        algorithm.init({"w": torch.ones(3)})
