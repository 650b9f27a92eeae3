import pytest
import torch

from fedtrain.experiment.strategies import QFedAvgStrategy
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.qfedavg import qfedavg
from fedtrain.training.rules import LocalEnd, LocalStart
from fedtrain.wire import Update

PARAMS = {"w": torch.tensor([10.0, 0.0])}


def with_q(q: float, lr: float = 0.5) -> FederatedStrategy:
    return qfedavg(QFedAvgStrategy(name="qfedavg", q=q), lr)


def update(loss: float, *delta: float) -> Update:
    return Update("a", 1, {"w": torch.tensor(delta)}, 7, extra={"loss": torch.tensor(loss, dtype=torch.float64)})


def after(strategy: FederatedStrategy, *updates: Update) -> list[float]:
    new, state = strategy.algorithm.apply({}, PARAMS, iter(updates))
    assert state == {}
    return new["w"].tolist()


def test_algorithm_2_by_hand() -> None:
    # q = 2, L = 2, so Delta w_k is -2 delta:
    #   F = 1: Delta = 1 * (-6, -8), h = 2 * 1 * 10^2 + 2 * 1 = 202
    #   F = 3: Delta = 9 * (-2, 0), h = 2 * 3 * 2^2 + 2 * 9 = 42
    assert after(with_q(2.0), update(1.0, 3.0, 4.0), update(3.0, 1.0, 0.0)) == pytest.approx([10 + 24 / 244, 8 / 244])


def test_q_of_0_is_the_mean_of_clients() -> None:
    assert after(with_q(0.0), update(0.0, 1.0, 4.0), update(9.0, 2.0, 0.0)) == [11.5, 2.0]


def test_a_client_with_no_loss_left_is_no_division_by_zero() -> None:
    strategy, other = with_q(0.5, lr=1.0), update(1.0, 2.0, 0.0)
    assert after(strategy, update(0.0, 0.0, 0.0), other) == pytest.approx([10 + 2 / (0.5 * 2**2 + 1), 0], abs=1e-5)
    # If it moves all the same, its h is 0.5 * 1e5 * 30^2: the round makes next to no step.
    assert after(strategy, update(0.0, 0.0, 30.0), other) == pytest.approx([10, 0], abs=1e-6)


def test_losses_whose_power_vanishes_leave_the_model() -> None:
    assert after(with_q(200.0), update(1e-3, 1.0, 1.0)) == [10.0, 0.0]


@pytest.mark.parametrize("loss", [-0.1, float("nan"), float("inf"), 1e60])
def test_a_loss_that_cannot_be_weighed_is_refused(loss: float) -> None:
    objection = with_q(2.0).algorithm.objection(update(loss, 1.0, 1.0))
    assert objection is not None
    assert objection.startswith(f"its loss is {loss}")


@pytest.mark.parametrize("loss", [0.0, 0.3, 1e40])
def test_other_losses_pass_and_stay_finite(loss: float) -> None:
    assert with_q(2.0).algorithm.objection(update(loss, 1.0, 1.0)) is None
    assert all(map(torch.isfinite, map(torch.tensor, after(with_q(2.0), update(loss, 1e19, 1e19)))))


def test_clients_send_the_loss_of_the_model_they_received() -> None:
    losses = iter([0.25])  # only once, and before training
    algorithm, rule, *_ = with_q(1.0)
    assert rule is not None
    assert rule.finish is not None
    assert rule.correct_gradient is None
    start = LocalStart(["w"], [PARAMS["w"]], {}, {}, lr=0.5, mean_loss=lambda: next(losses))
    begun = rule.begin(start)
    assert list(losses) == []
    extra, kept = rule.finish(begun, LocalEnd([PARAMS["w"] + 1], steps=3))
    assert extra["loss"].item() == 0.25
    assert {n: (t.shape, t.dtype) for n, t in extra.items()} == {
        n: (t.shape, t.dtype) for n, t in algorithm.extra(PARAMS).items()
    }
    assert kept == {}
