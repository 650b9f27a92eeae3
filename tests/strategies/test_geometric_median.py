import pytest
import torch

from fedtrain.experiment.strategies import GeometricMedianStrategy
from fedtrain.strategies.geometric_median import geometric_median
from fedtrain.wire import Update


def applied(
    deltas: list[list[float]], num_examples: list[int], iterations: int, smoothing: float = 1e-6
) -> list[float]:
    section = GeometricMedianStrategy(name="geometric-median", iterations=iterations, smoothing=smoothing)
    algorithm, params = geometric_median(section).algorithm, {"w": torch.zeros(len(deltas[0]))}
    updates = [Update("a", 1, {"w": torch.tensor(delta)}, n) for delta, n in zip(deltas, num_examples)]
    new, _ = algorithm.apply(algorithm.init(params), params, iter(updates))
    values: list[float] = new["w"].tolist()
    return values


def test_the_first_step_by_hand() -> None:
    points = [[1.0], [2.0], [4.0]]
    assert applied(points, [1, 1, 1], iterations=1) == pytest.approx([12 / 7])  # (1 + 1 + 1) / (1 + 1/2 + 1/4)
    assert applied(points, [1, 2, 4], iterations=1) == pytest.approx([7 / 3])  # (1 + 2 + 4) / (1 + 1 + 1)


def test_the_second_step_by_hand() -> None:
    # From 3/2: distances 3/2 and 3/2 from 0 and 3 leave it there; 1 and 3 start at (1 + 1) / (1 + 1/3) = 3/2 and then
    # weigh 2 and 2/3: (2 + 2) / (8/3) = 3/2.
    assert applied([[1.0], [3.0]], [1, 1], iterations=2) == pytest.approx([1.5])
    # 1, 2, 4 from 12/7: distances 5/7, 2/7, 16/7; (7/5 + 2 * 7/2 + 4 * 7/16) / (7/5 + 7/2 + 7/16)
    expected = (7 / 5 + 7 + 7 / 4) / (7 / 5 + 7 / 2 + 7 / 16)
    assert applied([[1.0], [2.0], [4.0]], [1, 1, 1], iterations=2) == pytest.approx([expected])


def test_it_finds_the_centre_of_a_cross_and_the_heaviest_point() -> None:
    cross = [[4.0, 4.0], [2.0, 4.0], [3.0, 5.0], [3.0, 3.0]]
    assert applied(cross, [1] * 4, iterations=100) == pytest.approx([3.0, 4.0], abs=1e-2)
    assert applied([[0.0, 1.0], [5.0, 5.0], [1.0, 0.0]], [2, 5, 2], iterations=100) == pytest.approx(
        [5.0, 5.0], abs=1e-2
    )


def test_smoothing_counts_as_the_least_distance() -> None:
    # 0 is where it starts: it weighs 1 / smoothing there. (0 * 2 + 4 * 1/4) / (2 + 1/4)
    assert applied([[0.0], [4.0]], [1, 1], iterations=1, smoothing=0.5) == pytest.approx([4 / 9])


def test_a_single_update_comes_back_and_zeros_are_no_division_by_zero() -> None:
    assert applied([[0.1, -3e30]], [7], iterations=10) == torch.tensor([0.1, -3e30]).tolist()
    assert applied([[0.0], [0.0]], [7, 1], iterations=10) == [0.0]


def test_one_huge_update_is_harmless() -> None:
    (middle,) = applied([[1.0], [1.5], [2.0], [1e30]], [1, 1, 1, 1], iterations=10)
    assert 1.0 <= middle <= 2.0
