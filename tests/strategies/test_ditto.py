import pytest
import torch

from fedtrain.experiment.strategies import DittoStrategy
from fedtrain.strategies.ditto import ditto
from fedtrain.training.rules import LocalStart
from fedtrain.wire import Update


def test_the_global_half_is_fedavg() -> None:
    strategy = ditto(DittoStrategy(name="ditto", mu=1.0))
    assert strategy.local_rule is None
    updates = [Update("a", 1, {"w": torch.tensor([1.0])}, 1), Update("b", 1, {"w": torch.tensor([5.0])}, 3)]
    params, state = strategy.algorithm.apply({}, {"w": torch.tensor([10.0])}, updates)
    assert params["w"].tolist() == [14.0]  # 10 + (1*1 + 3*5)/4
    assert state == {}


def test_the_personal_model_follows_the_global_one_over_rounds() -> None:
    rule = ditto(DittoStrategy(name="ditto", mu=3.0)).personal_rule
    personal = torch.zeros(())
    for server, expected in ((4.0, 5.0), (0.0, 2.0)):  # (b + mu w) / (1 + mu), with b = 8
        local = rule.begin(LocalStart(["w"], [torch.tensor(server)], {}, {}, 0.1, lambda: 0.0))
        for _ in range(100):
            personal -= 0.1 * rule.correct_gradient(local, [personal], [personal - 8.0])[0]
        assert float(personal) == pytest.approx(expected, abs=1e-4)
