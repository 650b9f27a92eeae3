import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtrain.errors import BudgetError, InputError, PrivacyError
from fedtrain.experiment.privacy import AdaptiveClipping, ClientPrivacy
from fedtrain.experiment.strategies import (
    FedAdagradStrategy,
    FedAdamStrategy,
    FedAvgMStrategy,
    FedOptStrategy,
    FedProxStrategy,
    FedYogiStrategy,
    QFedAvgStrategy,
    ScaffoldStrategy,
)
from fedtrain.experiment.training import TrainingSection
from fedtrain.params import Params
from fedtrain.privacy.rng import NoiseSource
from fedtrain.statefile import read_state, write_state
from fedtrain.strategies.adapter import AlgorithmRunner
from fedtrain.strategies.base import Algorithm, FederatedStrategy
from fedtrain.strategies.central_dp import central_dp, noise_split
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.fedavgm import fedavgm
from fedtrain.strategies.fednova import fednova
from fedtrain.strategies.fedopt import fedadagrad, fedadam, fedopt, fedyogi
from fedtrain.strategies.fedprox import fedprox
from fedtrain.strategies.qfedavg import qfedavg
from fedtrain.strategies.scaffold import scaffold
from fedtrain.wire import Update

stats = pytest.importorskip("scipy.stats")

P = 1e-6  # the chance of the statistical test to fail when nothing is wrong


@dataclass
class Book:
    """A release without noise that writes down what happens, and when."""

    events: list[Any] = field(default_factory=list)
    refuses: bool = False

    @property
    def noise(self) -> "Book":
        return self

    def charge(self) -> None:
        if self.refuses:
            raise BudgetError("spent")
        self.events.append("charge")

    def add_noise(self, values: Tensor, std: float) -> Tensor:
        self.events.append(pytest.approx(std))
        return values.clone()


class Noisy:
    def __init__(self) -> None:
        self.noise = NoiseSource()

    def charge(self) -> None:
        pass


def section(bound: float = 1.0, **adaptive: float) -> ClientPrivacy:
    clipping = AdaptiveClipping(**adaptive) if adaptive else None
    return ClientPrivacy(
        unit="client", noise_multiplier=1.0, delta=1e-5, max_delta_norm=bound, adaptive_clipping=clipping
    )


def private(
    bound: float, expected: float = 1.0, z: float = 1.0, release: Any = None, strategy: FederatedStrategy | None = None
) -> Algorithm:
    return central_dp(strategy or fedavg(), section(bound), z, expected, release or Book()).algorithm


def updates(*deltas: list[float], dtype: torch.dtype = torch.float32) -> Iterator[Update]:
    for i, delta in enumerate(deltas):
        yield Update("c", 1, {"w": torch.tensor(delta, dtype=dtype)}, num_examples=1 + 98 * i)


def clipped_sum(bound: float, deltas: list[list[float]]) -> Tensor:
    algorithm, params = private(bound), {"w": torch.zeros(len(deltas[0]), dtype=torch.float64)}
    new, _ = algorithm.apply(algorithm.init(params), params, updates(*deltas, dtype=torch.float64))
    return new["w"]


def test_a_round_by_hand() -> None:
    book = Book()
    algorithm, params = private(2.5, expected=4.0, z=3.0, release=book), {"w": torch.tensor([100.0, 200.0])}
    # (3, 4) comes to (1.5, 2), (0.6, -0.8) is whole: (2.1, 1.2) / 4. The examples do not count.
    new, _ = algorithm.apply(algorithm.init(params), params, updates([3.0, 4.0], [0.6, -0.8]))
    assert new["w"].tolist() == pytest.approx([100.525, 200.3])
    assert book.events == ["charge", 7.5]


def test_one_norm_over_all_tensors_matched_by_name() -> None:
    params = {"matrix": torch.zeros(1, 2), "scalar": torch.zeros((), dtype=torch.float64)}
    delta = {"scalar": torch.tensor(6.0, dtype=torch.float64), "matrix": torch.tensor([[2.0, 3.0]])}  # norm 7
    algorithm = private(3.5)
    new, _ = algorithm.apply(algorithm.init(params), params, [Update("c", 1, delta, 1)])
    assert new["matrix"].flatten().tolist() == pytest.approx([1.0, 1.5])
    assert float(new["scalar"]) == pytest.approx(3.0)
    assert [t.dtype for t in new.values()] == [torch.float32, torch.float64]


@pytest.mark.parametrize("size", [1e-3, 0.99, 1.0, 1.01, 3.0, 1e38, 1e300, math.inf, math.nan])
def test_the_influence_of_one_client_never_exceeds_the_bound(size: float) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        others = rng.normal(size=(30, 7)).tolist()
        direction = rng.normal(size=7)
        one = (direction / np.linalg.norm(direction) * size).tolist()
        moved = clipped_sum(0.7, [*others[:9], one, *others[9:]]) - clipped_sum(0.7, others)
        assert math.sqrt(math.fsum(float(x) ** 2 for x in moved)) <= 0.7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_adds_nothing(bad: float) -> None:
    assert clipped_sum(1.0, [[0.5, 0.0], [bad, 0.1]]).tolist() == [0.5, 0.0]


def test_an_update_of_zeros_is_whole() -> None:
    assert clipped_sum(1.0, [[0.0, 0.0], [0.0, 0.5]]).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("came", [0, 1, 3, 5])
def test_dropouts_change_neither_the_noise_nor_the_denominator(came: int) -> None:
    book = Book()
    algorithm, params = private(1.0, expected=2.5, z=2.0, release=book), {"w": torch.zeros(1)}
    new, _ = algorithm.apply(algorithm.init(params), params, updates(*[[0.5]] * came))
    assert float(new["w"]) == pytest.approx(came * 0.5 / 2.5)
    assert book.events == ["charge", 2.0]


def test_the_noise_has_the_standard_deviation_that_was_paid_for() -> None:
    """Nobody came: what is left is noise."""
    n, params = 200_000, {"a": torch.zeros(400, 250), "b": torch.zeros(100_000)}
    algorithm = private(0.5, expected=8.0, z=1.5, release=Noisy())
    new, _ = algorithm.apply(algorithm.init(params), params, [])
    noise = torch.cat([t.flatten() for t in new.values()]).double()
    low, high = stats.chi2.ppf([P / 2, 1 - P / 2], n)
    assert low <= float((noise / (1.5 * 0.5 / 8)).square().sum()) <= high


def test_a_round_of_noise_alone_is_a_step_of_the_server() -> None:
    strategy = fedavgm(FedAvgMStrategy(name="fedavgm", server_lr=1.0, momentum=0.5))
    algorithm, params = private(10.0, strategy=strategy), {"w": torch.zeros(1)}
    new, state = algorithm.apply(algorithm.init(params), params, updates([4.0]))
    new, state = algorithm.apply(state, new, [])
    assert new["w"].tolist() == [6.0]  # v = 4, then 0.5 * 4


def test_a_round_that_would_overspend_draws_no_noise() -> None:
    book = Book(refuses=True)
    algorithm, params = private(1.0, release=book), {"w": torch.zeros(1)}
    with pytest.raises(BudgetError):
        algorithm.apply(algorithm.init(params), params, updates([1.0]))
    assert book.events == []


@pytest.mark.parametrize(
    "delta",
    [
        {"w": torch.ones(1)},  # would be broadcast
        {"w": torch.ones(4, dtype=torch.float64)},
        {"w": torch.ones(4), "more": torch.ones(1)},
        {"v": torch.ones(4)},
    ],
)
def test_an_update_that_does_not_fit_is_refused_before_the_release(delta: Params) -> None:
    book = Book()
    algorithm, params = private(1.0, release=book), {"w": torch.zeros(4)}
    with pytest.raises(PrivacyError, match="does not fit the model"):
        algorithm.apply(algorithm.init(params), params, [Update("c", 1, delta, 1)])
    assert book.events == []


def test_updates_are_used_as_they_come() -> None:
    """Each arrives where the last one was: holding on to it would spoil the sum."""
    place = torch.zeros(2)

    def arriving() -> Iterator[Update]:
        for value in (0.5, -0.25):
            yield Update("a", 1, {"w": place.fill_(value)}, 1)

    algorithm, params = private(1.0), {"w": torch.zeros(2)}
    new, _ = algorithm.apply(algorithm.init(params), params, arriving())
    assert new["w"].tolist() == [0.25, 0.25]


def test_large_tensors_are_clipped_whole() -> None:
    params = {"w": torch.zeros(700, 300)}
    delta = torch.randn(300, 700, generator=torch.Generator().manual_seed(1)).T
    algorithm = private(1.0)
    new, _ = algorithm.apply(algorithm.init(params), params, [Update("c", 1, {"w": delta}, 1)])
    assert torch.allclose(new["w"], delta / torch.linalg.vector_norm(delta), rtol=1e-5, atol=1e-8)


def test_buffers_do_not_travel_beside_the_clip() -> None:
    params = {"w": torch.zeros(1), "running_mean": torch.zeros(1)}
    runner = AlgorithmRunner(private(1.0), params, buffers=["running_mean"])
    delta = {"w": torch.tensor([3.0]), "running_mean": torch.tensor([4.0])}
    new = runner.aggregate(1, params, [Update("c", 1, delta, 7)])
    assert [float(t) for t in new.values()] == pytest.approx([0.6, 0.8])


STRATEGIES = {
    "fedavg": fedavg(),
    "fedavgm": fedavgm(FedAvgMStrategy(name="fedavgm")),
    "fedadagrad": fedadagrad(FedAdagradStrategy(name="fedadagrad")),
    "fedadam": fedadam(FedAdamStrategy(name="fedadam")),
    "fedyogi": fedyogi(FedYogiStrategy(name="fedyogi")),
    "fedopt": fedopt(FedOptStrategy(name="fedopt", optimizer="AdamW", options={"lr": 0.1})),
    "fedprox": fedprox(FedProxStrategy(name="fedprox", mu=0.1)),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_steps_along_the_clipped_mean_and_goes_on_after_a_checkpoint(name: str, tmp_path: Path) -> None:
    strategy = STRATEGIES[name]
    wrapped = central_dp(strategy, section(1.0, lr=0.2), 1.0, 4.0, Book())
    assert wrapped.local_rule is strategy.local_rule
    algorithm, params = wrapped.algorithm, {"w": torch.tensor([1.0, -2.0])}
    plain, state = params, algorithm.init(params)
    inner = strategy.algorithm.init(params)
    for round_number in (1, 2):
        # (3, 4) comes to (0.6, 0.8) at a bound of 1. One of two is unclipped, and the bound stays.
        params, state = algorithm.apply(state, params, updates([3.0, 4.0], [0.2, 0.0]))
        mean = {"w": torch.tensor([0.2, 0.2])}
        plain, inner = strategy.algorithm.apply(inner, plain, [Update("all", round_number, mean, 1)])
        assert torch.allclose(params["w"], plain["w"], rtol=1e-5)
        write_state(tmp_path / "state", state)
        state = read_state(tmp_path / "state")
        assert state["bound"] == 1.0


def test_the_inner_algorithm_keeps_its_word_to_clients_and_learns_the_round() -> None:
    rounds = []

    def apply(state: Any, params: Params, updates: Any) -> Any:
        rounds.extend(update.round_number for update in updates)
        return params, {"c": state["c"] + 1}

    inner = Algorithm(lambda _: {"c": torch.ones(1)}, apply, share=lambda state: state, objection=lambda _: "never")
    algorithm, params = private(1.0, strategy=FederatedStrategy(inner)), {"w": torch.zeros(1)}
    state = algorithm.init(params)
    for _ in range(2):
        _, state = algorithm.apply(state, params, [])
    assert rounds == [1, 2]
    assert algorithm.share(state) == {"c": torch.tensor([3.0])}
    assert algorithm.objection(next(updates([1.0]))) == "never"


@pytest.mark.parametrize(
    ("strategy", "sent"),
    [
        (scaffold(ScaffoldStrategy(name="scaffold"), 10), "w"),
        (fednova(TrainingSection()), "normalizer"),
        (qfedavg(QFedAvgStrategy(name="qfedavg"), 0.1), "loss"),
    ],
)
def test_what_would_travel_unclipped_is_refused(strategy: FederatedStrategy, sent: str) -> None:
    with pytest.raises(InputError, match=f"send more than their update.*got {sent}; "):
        private(1.0, strategy=strategy).init({"w": torch.zeros(1)})


@pytest.mark.parametrize(
    ("z", "expected", "quantile", "given", "delta_multiplier", "count_std"),
    [
        (1.0, 20.0, 0.5, None, math.sqrt(4 / 3), 1.0),  # 1 - (1/2)^2 = 3/4
        (1.0, 200.0, 0.5, 2.5, 1 / math.sqrt(0.96), 2.5),  # 1 - (1/5)^2
        (1.0, 200.0, 0.2, 2.0, 1 / math.sqrt(0.84), 2.0),  # one client moves the count by 0.8: 1 - 0.4^2
        (2.0, 20.0, 0.5, None, 3.0, 3 / math.sqrt(5)),  # 1 would cost all of z; (3/2) z is the most
        (2.0, 20.0, 0.5, 0.1, 3.0, 3 / math.sqrt(5)),
    ],
)
def test_noise_is_split_by_theorem_1(
    z: float, expected: float, quantile: float, given: float | None, delta_multiplier: float, count_std: float
) -> None:
    split = noise_split(section(target_quantile=quantile, count_noise=given), z, expected)
    assert split == pytest.approx((delta_multiplier, count_std))
    sensitivity = max(quantile, 1 - quantile)
    assert split.delta_multiplier**-2 + (split.count_std / sensitivity) ** -2 == pytest.approx(z**-2)


def test_without_adaptive_clipping_all_noise_is_on_the_deltas() -> None:
    assert noise_split(section(), 1.3, 20.0) == (1.3, 0.0)


def bounds(start: float, norms: list[float], rounds: int, release: Any, **adaptive: float) -> list[float]:
    """The clipping norm after each round; of 20 expected clients those with these norms come."""
    algorithm = central_dp(fedavg(), section(start, **adaptive), 1.0, 20.0, release).algorithm
    params = {"w": torch.zeros(1)}
    state, values = algorithm.init(params), []
    for _ in range(rounds):
        _, state = algorithm.apply(state, params, updates(*[[norm] for norm in norms]))
        values.append(state["bound"])
    return values


def test_the_bound_moves_by_hand_and_noise_follows_the_one_that_clipped() -> None:
    book = Book()
    # All 20 are clipped at 2: up by exp(0.2 * 0.5). At 2.21 as well, at 2.44 none: down by as much.
    values = bounds(2.0, [2.3] * 20, 3, book, lr=0.2)
    assert values == pytest.approx([2 * math.exp(0.1), 2 * math.exp(0.2), 2 * math.exp(0.1)])
    z, count_std = math.sqrt(4 / 3), 1.0
    assert book.events[:3] == ["charge", 2 * z, count_std]
    assert book.events[4::3] == [2 * math.exp(0.1) * z, 2 * math.exp(0.2) * z]


def test_an_update_that_is_not_finite_counts_as_clipped() -> None:
    assert bounds(2.0, [math.nan] * 20, 1, Book(), lr=0.2) == pytest.approx([2 * math.exp(0.1)])


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("release", [Book(), Noisy()])
def test_the_bound_converges_to_1_when_every_norm_is_1(start: float, release: Any) -> None:
    values = bounds(start, [1.0] * 20, 100, release, lr=0.2)
    assert (values[9] - start) * (1 - start) > 0  # on its way up, or down
    assert all(0.8 < value < 1.25 for value in values[-50:])


@pytest.mark.parametrize(("quantile", "low", "high"), [(0.1, 1, 2), (0.5, 5, 6), (0.9, 9, 10)])
@pytest.mark.parametrize("came", [10, 20])
def test_the_bound_finds_the_quantile_of_those_who_come(quantile: float, low: float, high: float, came: int) -> None:
    norms = [float(norm) for norm in range(1, 11)] * (came // 10)
    last = bounds(3.0, norms, 150, Book(), target_quantile=quantile, lr=0.1)[-1]
    assert 0.97 * low < last < 1.03 * high
