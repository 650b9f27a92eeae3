import pytest
import torch

from fedtrain.experiment.optimizers import SgdSection
from fedtrain.experiment.training import TrainingSection
from fedtrain.params import Params
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.fednova import fednova
from fedtrain.training.optimizer import LocalOptimizer
from fedtrain.training.rules import LocalEnd, LocalStart
from fedtrain.wire import Update


def build(momentum: float = 0.0, nesterov: bool = False, **training: int) -> FederatedStrategy:
    return fednova(TrainingSection(optimizer=SgdSection(momentum=momentum, nesterov=nesterov), **training))


def extra(normalizer: float) -> Params:
    return {"normalizer": torch.tensor(normalizer, dtype=torch.float64)}


def sent(strategy: FederatedStrategy, steps: int) -> Params:
    rule = strategy.local_rule
    start = LocalStart(["w"], [torch.zeros(2)], {}, {}, 0.1, lambda: 0.0)
    of_update, kept = rule.finish(rule.begin(start), LocalEnd([torch.ones(2)], steps))
    assert kept == {}
    return of_update


def normalizer(strategy: FederatedStrategy, steps: int) -> float:
    return float(sent(strategy, steps)["normalizer"])


def test_an_update_brings_one_number() -> None:
    [(name, like)] = build().algorithm.extra({"w": torch.zeros(2), "b": torch.zeros(3)}).items()
    number = sent(build(), 3)[name]
    assert (number.shape, number.dtype) == (like.shape, like.dtype) == (torch.Size(()), torch.float64)


def test_the_server_by_hand() -> None:
    algorithm = build().algorithm
    params = {"w": torch.tensor([1.0, 0.0])}
    updates = [
        Update("a", 1, {"w": torch.tensor([2.0, 0.0])}, 1, extra=extra(2)),
        Update("b", 1, {"w": torch.tensor([0.0, 16.0])}, 3, extra=extra(4)),
    ]
    new, _ = algorithm.apply(algorithm.init(params), params, iter(updates))
    # tau_eff = (1*2 + 3*4)/4 = 3.5; mean d = ((1*1 + 0)/4, (0 + 3*4)/4) = (0.25, 3)
    assert new["w"].tolist() == [1.875, 10.5]


@pytest.mark.parametrize(("nesterov", "two", "three"), [(False, 2.5, 4.25), (True, 3.25, 5.125)])
def test_the_normalizer_by_hand(nesterov: bool, two: float, three: float) -> None:
    # Momentum 0.5 takes in gradients 1.5 + 1 times in two steps, 1.75 + 1.5 + 1 in three; Nesterov 1 + half of each.
    strategy = build(0.5, nesterov)
    assert normalizer(strategy, 2) == two
    assert normalizer(strategy, 3) == three


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_the_papers_closed_form(momentum: float) -> None:
    tau, rho = 17, momentum
    closed = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    assert normalizer(build(momentum), tau) == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_the_normalizer_reproduces_the_delta_of_a_constant_gradient(momentum: float, nesterov: bool) -> None:
    sgd = SgdSection(lr=0.1, momentum=momentum, nesterov=nesterov)
    w, gradient = torch.zeros(2), torch.tensor([1.0, -3.0])
    optimizer = LocalOptimizer(TrainingSection(optimizer=sgd), {"w": w})
    for _ in range(7):
        optimizer.step([gradient], 0.5)
    torch.testing.assert_close(w, -0.05 * normalizer(build(momentum, nesterov), 7) * gradient)


def rounds(strategy: FederatedStrategy) -> float:
    """Clients with (w - b)^2 / 2, b = 0 and 10, that take 1 and 20 small steps."""
    params = {"w": torch.tensor(0.0)}
    state = strategy.algorithm.init(params)
    for _ in range(1000):
        updates = []
        for optimum, steps in ((0.0, 1), (10.0, 20)):
            w = optimum + (params["w"] - optimum) * (1 - 0.001) ** steps
            also = sent(strategy, steps) if strategy.local_rule else {}
            updates.append(Update("c", 1, {"w": w - params["w"]}, 1, extra=also))
        params, state = strategy.algorithm.apply(state, params, updates)
    return float(params["w"])


def test_who_steps_more_does_not_pull_the_optimum_over() -> None:
    # They rest where the pulls cancel, (1 - 0.999) w and (1 - 0.999^20) (10 - w): the latter by twentieths in FedNova.
    far = 1 - 0.999**20
    assert rounds(FederatedStrategy(fedavg().algorithm)) == pytest.approx(10 * far / (far + 0.001), abs=1e-2)
    fixed = 10 * (far / 20) / (far / 20 + 0.001)
    assert fixed == pytest.approx(5.0, abs=0.03)  # the true optimum, but for the drift within 20 small steps
    assert rounds(build()) == pytest.approx(fixed, abs=1e-2)


@pytest.mark.parametrize("bad", [0.0, -1.0, 0.5, 60.1, 1e30, float("nan"), float("inf")])
def test_impossible_normalizers_are_objected_to(bad: float) -> None:
    objection = build(momentum=0.5, local_epochs=3, batch_size=10).algorithm.objection  # 95 examples: 30 steps
    assert [objection(Update("c", 1, {}, 95, extra=extra(good))) for good in (1, 60)] == [None, None]
    assert objection(Update("c", 1, {}, 95, extra=extra(bad))) == f"normalizer: got {bad:g}; expected 1 to 60"


@pytest.mark.parametrize("nesterov", [False, True])
def test_honest_normalizers_are_not_objected_to(nesterov: bool) -> None:
    strategy = build(0.9, nesterov, local_epochs=10, batch_size=1)
    for steps in (1, 7, 400):  # 400 are all; who has less time takes fewer
        update = Update("c", 1, {}, 40, extra=sent(strategy, steps))
        assert strategy.algorithm.objection(update) is None


def test_no_update_changes_nothing() -> None:
    algorithm = build().algorithm
    params = {"w": torch.tensor([-0.0])}
    state = algorithm.init(params)
    new, after = algorithm.apply(state, params, iter(()))
    assert torch.signbit(new["w"]).all()
    assert after == state
