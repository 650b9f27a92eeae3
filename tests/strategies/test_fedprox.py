import pytest
import torch

from fedtrain.experiment.strategies import FedProxStrategy
from fedtrain.strategies.fedprox import fedprox, proximal_rule
from fedtrain.training.rules import LocalRule, LocalStart
from fedtrain.wire import Update


def train(rule: LocalRule, server: torch.Tensor, target: float, steps: int, lr: float) -> torch.Tensor:
    """Descend (w - target)^2 / 2 from the server's value."""
    w = server.clone().requires_grad_()
    local = rule.begin(LocalStart(["w"], [server], {}, {}, lr, lambda: 0.0))
    for _ in range(steps):
        gradients = rule.correct_gradient(local, [w], torch.autograd.grad((w - target).square().sum() / 2, [w]))
        with torch.no_grad():
            w -= lr * gradients[0]
    return w.detach()


def test_the_gradient_of_the_proximal_term_by_hand() -> None:
    rule = proximal_rule(0.5)
    local = rule.begin(LocalStart(["w"], [torch.tensor([1.0, 2.0])], {}, {}, 0.1, lambda: 0.0))
    gradient = torch.tensor([10.0, 20.0])
    (corrected,) = rule.correct_gradient(local, [torch.tensor([3.0, -2.0])], [gradient])
    assert corrected.tolist() == [11.0, 18.0]  # 10 + (3 - 1)/2, 20 + (-2 - 2)/2
    assert gradient.tolist() == [10.0, 20.0]


@pytest.mark.parametrize(("mu", "end"), [(0.0, 4.0), (1.0, 2.0), (99.0, 0.04)])
def test_clients_stop_between_the_server_and_their_optimum(mu: float, end: float) -> None:
    w = train(proximal_rule(mu), torch.zeros(()), target=4.0, steps=2000, lr=0.01)
    assert float(w) == pytest.approx(end, rel=1e-4)  # 4 / (1 + mu)


def test_two_rounds_of_both_halves() -> None:
    strategy = fedprox(FedProxStrategy(name="fedprox", mu=1.0))
    params = {"w": torch.tensor(0.0)}
    for expected in (3.0, 4.5):  # halfway to 6, the mean of the targets by examples
        deltas = [train(strategy.local_rule, params["w"], b, 300, 0.1) - params["w"] for b in (0.0, 8.0)]
        updates = [Update("c", 1, {"w": d}, n) for d, n in zip(deltas, (1, 3))]
        params, state = strategy.algorithm.apply({}, params, updates)
        assert float(params["w"]) == pytest.approx(expected, abs=1e-4)
        assert state == {}


def test_without_pull_gradients_stay_as_they_are() -> None:
    gradients = [torch.tensor([0.1, 0.2])]
    rule = fedprox(FedProxStrategy(name="fedprox", mu=0.0)).local_rule
    local = rule.begin(LocalStart(["w"], [torch.tensor([1.0, 2.0])], {}, {}, 0.1, lambda: 0.0))
    assert torch.equal(rule.correct_gradient(local, [torch.tensor([3.0, 4.0])], gradients)[0], gradients[0])
