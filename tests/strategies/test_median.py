import pytest
import torch

from fedtrain.experiment.strategies import TrimmedMeanStrategy
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.median import median, trimmed_mean
from fedtrain.wire import Update


def trimmed(trim: float) -> FederatedStrategy:
    return trimmed_mean(TrimmedMeanStrategy(name="trimmed-mean", trim=trim))


def applied(strategy: FederatedStrategy, deltas: list[float]) -> float:
    """One number per client; the first has by far the most examples."""
    updates = [Update(str(i), 1, {"w": torch.tensor([d])}, 1000 if i == 0 else 1) for i, d in enumerate(deltas)]
    algorithm, params = strategy.algorithm, {"w": torch.tensor([100.0])}
    new, _ = algorithm.apply(algorithm.init(params), params, iter(updates))
    return new["w"].item()


@pytest.mark.parametrize(
    ("deltas", "expected"), [([7.0], 107.0), ([9.0, 1.0, 2.0], 102.0), ([10.0, 3.0, 1.0, 2.0], 102.5)]
)
def test_the_median_by_hand(deltas: list[float], expected: float) -> None:
    assert applied(median(), deltas) == expected


def test_the_trimmed_mean_by_hand() -> None:
    deltas = [50.0, 1.0, -70.0, 2.0, 6.0]
    assert applied(trimmed(0.2), deltas) == 103.0  # one off either end: (1 + 2 + 6) / 3
    assert applied(trimmed(0.4), deltas) == 102.0  # two off either end
    assert applied(trimmed(0.19), [5.0, 1.0, -7.0, 2.0, 9.0]) == 102.0  # floor(0.95) is none: 10 / 5


def test_one_is_left_of_any_number_of_updates() -> None:
    assert [applied(trimmed(0.4999), [3.0] * n) for n in (1, 2, 5)] == [103.0] * 3


def test_the_fraction_is_taken_as_it_is_written() -> None:
    assert int(0.29 * 100) == 28
    assert applied(trimmed(0.29), [1e9] * 29 + [0.0] * 71) == 100.0


def test_large_tensors_are_ordered_whole() -> None:
    rng = torch.Generator().manual_seed(1)
    deltas = [torch.randn(700, 300, generator=rng) for _ in range(5)]
    updates = [Update("a", 1, {"w": delta}, 1) for delta in deltas]
    new, _ = median().algorithm.apply({}, {"w": torch.zeros(700, 300)}, iter(updates))
    assert torch.equal(new["w"], torch.stack(deltas).median(dim=0).values)
