from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fedtrain.experiment.strategies import ScaffoldStrategy
from fedtrain.params import Params
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.scaffold import scaffold
from fedtrain.training.rules import LocalEnd, LocalRule, LocalStart
from fedtrain.wire import Update

PLAIN = LocalRule(lambda _: None, lambda _, __, gradients: gradients, lambda _, __: ({}, {}))
LR = 0.1
# Curvature, optimum and local steps of f_i(w) = a (w - b)^2 / 2; together they are least at (1*0 + 4*10) / 5 = 8.
CLIENTS = {"flat": (1.0, 0.0, 5), "steep": (4.0, 10.0, 5)}


def build(server_lr: float = 1.0, num_clients: int = 2) -> FederatedStrategy:
    return scaffold(ScaffoldStrategy(name="scaffold", server_lr=server_lr), num_clients)


def train(strategy: FederatedStrategy, client: str, params: Params, shared: Params, kept: dict[str, Any]) -> Update:
    curvature, optimum, steps = CLIENTS[client]
    rule = strategy.local_rule or PLAIN
    w = params["w"].clone()
    local = rule.begin(LocalStart(["w"], [params["w"]], shared, kept.get(client, {}), LR, lambda: 0.0))
    for _ in range(steps):
        w -= LR * rule.correct_gradient(local, [w], [curvature * (w - optimum)])[0]
    extra, kept[client] = rule.finish(local, LocalEnd([w], steps))
    return Update(client, 1, {"w": w - params["w"]}, 1, extra=extra)


def run(strategy: FederatedStrategy, params: Params, rounds: int) -> tuple[Params, Mapping[str, Any], dict[str, Any]]:
    algorithm, kept = strategy.algorithm, {}
    state = algorithm.init(params)
    for _ in range(rounds):
        shared = algorithm.share(state)
        params, state = algorithm.apply(state, params, (train(strategy, c, params, shared, kept) for c in CLIENTS))
    return params, state, kept


def test_the_second_round_of_a_client_by_hand() -> None:
    rule = build().local_rule
    shared, kept = {"w": torch.tensor([1.0])}, {"c_i": {"w": torch.tensor([4.0])}}
    start = LocalStart(["w"], [torch.tensor([2.0])], shared, kept, 0.5, lambda: 0.0)
    local = rule.begin(start)
    gradient = torch.tensor([10.0])
    assert rule.correct_gradient(local, [], [gradient])[0].tolist() == [7.0]  # g - c_i + c
    extra, kept = rule.finish(local, LocalEnd([torch.tensor([-4.0])], steps=3))
    assert kept["c_i"]["w"].tolist() == [7.0]  # c_i - c + (x - y) / (K lr) = 4 - 1 + (2 + 4) / (3 * 0.5)
    assert extra == {"w": torch.tensor([3.0])}
    assert gradient.tolist() == [10.0]


def test_the_server_by_hand() -> None:
    algorithm = build(server_lr=0.5, num_clients=8).algorithm
    params = {"w": torch.tensor([1.0])}
    updates = [  # the numbers of examples differ, and do not count
        Update("a", 1, {"w": torch.tensor([2.0])}, 1, extra={"w": torch.tensor([4.0])}),
        Update("b", 1, {"w": torch.tensor([6.0])}, 9, extra={"w": torch.tensor([12.0])}),
    ]
    new, state = algorithm.apply({"c": {"w": torch.tensor([3.0])}}, params, iter(updates))
    assert new["w"].tolist() == [3.0]  # 1 + 0.5 * (2 + 6)/2
    assert state["c"]["w"].tolist() == [5.0]  # 3 + 2/8 * (4 + 12)/2
    assert algorithm.share(state) is state["c"]
    assert algorithm.extra(params) == {"w": torch.tensor([0.0])}


def test_it_finds_the_optimum_that_fedavg_misses() -> None:
    start = {"w": torch.tensor(0.0)}
    assert float(run(build(), start, 60)[0]["w"]) == pytest.approx(8.0, abs=1e-3)
    # FedAvg rests where the deltas cancel: (1 - 0.9^5) w = (1 - 0.6^5) (10 - w).
    fixed = 10 * (1 - 0.6**5) / ((1 - 0.9**5) + (1 - 0.6**5))
    assert fixed < 7
    assert float(run(FederatedStrategy(fedavg().algorithm), start, 60)[0]["w"]) == pytest.approx(fixed, abs=1e-3)


def test_the_server_keeps_the_mean_of_the_clients_variates() -> None:
    _, state, kept = run(build(), {"w": torch.tensor(0.0)}, 3)
    mean = sum(float(k["c_i"]["w"]) for k in kept.values()) / 2
    assert float(state["c"]["w"]) == pytest.approx(mean, abs=1e-5)


def test_no_update_changes_nothing() -> None:
    algorithm = build().algorithm
    params, state = {"w": torch.tensor([-0.0])}, {"c": {"w": torch.tensor([-0.0])}}
    new, after = algorithm.apply(state, params, iter(()))
    assert torch.signbit(new["w"]).all()
    assert torch.signbit(after["c"]["w"]).all()
