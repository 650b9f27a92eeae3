from typing import Any

import pytest
import torch

from fedtrain.experiment.strategies import FedDynStrategy
from fedtrain.params import Params
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.feddyn import feddyn
from fedtrain.training.rules import LocalEnd, LocalRule, LocalStart
from fedtrain.wire import Update

PLAIN = LocalRule(lambda _: None, lambda _, __, gradients: gradients, lambda _, __: ({}, {}))
LR = 0.1
# Curvature, optimum and local steps of f_i(w) = a (w - b)^2 / 2; together they are least at (1*0 + 4*10) / 5 = 8.
CLIENTS = {"flat": (1.0, 0.0, 50), "steep": (4.0, 10.0, 50)}


def build(alpha: float = 1.0, num_clients: int = 2) -> FederatedStrategy:
    return feddyn(FedDynStrategy(name="feddyn", alpha=alpha), num_clients)


def train(strategy: FederatedStrategy, client: str, params: Params, shared: Params, kept: dict[str, Any]) -> Update:
    curvature, optimum, steps = CLIENTS[client]
    rule = strategy.local_rule or PLAIN
    w = params["w"].clone()
    local = rule.begin(LocalStart(["w"], [params["w"]], shared, kept.get(client, {}), LR, lambda: 0.0))
    for _ in range(steps):
        w -= LR * rule.correct_gradient(local, [w], [curvature * (w - optimum)])[0]
    extra, kept[client] = rule.finish(local, LocalEnd([w], steps))
    return Update(client, 1, {"w": w - params["w"]}, 1, extra=extra)


def run(strategy: FederatedStrategy, params: Params, rounds: int) -> tuple[Params, Any, dict[str, Any]]:
    algorithm, kept = strategy.algorithm, {}
    state = algorithm.init(params)
    for _ in range(rounds):
        shared = algorithm.share(state)
        params, state = algorithm.apply(state, params, (train(strategy, c, params, shared, kept) for c in CLIENTS))
    return params, state, kept


def test_the_second_round_of_a_client_by_hand() -> None:
    rule = build(alpha=0.5).local_rule
    kept = {"lambda": {"w": torch.tensor([3.0])}}
    local = rule.begin(LocalStart(["w"], [torch.tensor([2.0])], {}, kept, LR, lambda: 0.0))
    gradient = torch.tensor([10.0])
    corrected = rule.correct_gradient(local, [torch.tensor([4.0])], [gradient])
    assert corrected[0].tolist() == [8.0]  # 10 - 3 + 0.5 * (4 - 2)
    extra, kept = rule.finish(local, LocalEnd([torch.tensor([-4.0])], steps=3))
    assert kept["lambda"]["w"].tolist() == [6.0]  # 3 - 0.5 * (-4 - 2)
    assert extra == {}
    assert gradient.tolist() == [10.0]


def test_the_server_by_hand() -> None:
    algorithm = build(alpha=0.5, num_clients=8).algorithm
    params, state = {"w": torch.tensor([1.0])}, {"h": {"w": torch.tensor([3.0])}}
    # The numbers of examples differ, and do not count.
    updates = [Update("a", 1, {"w": torch.tensor([2.0])}, 1), Update("b", 1, {"w": torch.tensor([6.0])}, 9)]
    new, state = algorithm.apply(state, params, iter(updates))
    assert state["h"]["w"].tolist() == [2.5]  # 3 - 0.5/8 * (2 + 6)
    assert new["w"].tolist() == [0.0]  # 1 + (2 + 6)/2 - 2.5/0.5


def test_it_finds_the_optimum_that_fedavg_misses() -> None:
    start = {"w": torch.tensor(0.0)}
    assert float(run(build(), start, 60)[0]["w"]) == pytest.approx(8.0, abs=1e-3)
    # In 50 steps each client reaches its own optimum: FedAvg rests in the middle.
    assert float(run(FederatedStrategy(fedavg().algorithm), start, 60)[0]["w"]) == pytest.approx(5.0, abs=0.05)


def test_the_server_keeps_the_mean_of_the_clients_multipliers() -> None:
    _, state, kept = run(build(), {"w": torch.tensor(0.0)}, 3)
    mean = sum(float(k["lambda"]["w"]) for k in kept.values()) / 2
    assert float(state["h"]["w"]) == pytest.approx(mean, abs=1e-5)


def test_no_update_changes_nothing() -> None:
    algorithm = build().algorithm
    params, state = {"w": torch.tensor([-0.0])}, {"h": {"w": torch.tensor([3.0])}}
    new, after = algorithm.apply(state, params, iter(()))
    assert torch.signbit(new["w"]).all()
    assert after is state
