from collections.abc import Iterator

import pytest
import torch

from fedtrain.experiment.strategies import CenteredClippingStrategy, NormBoundingStrategy
from fedtrain.params import Params
from fedtrain.strategies.base import Algorithm, State
from fedtrain.strategies.clipping import centered_clipping, norm_bounding
from fedtrain.wire import Update


def centered(radius: float) -> Algorithm:
    return centered_clipping(CenteredClippingStrategy(name="centered-clipping", radius=radius)).algorithm


def bounding(max_norm: float) -> Algorithm:
    return norm_bounding(NormBoundingStrategy(name="norm-bounding", max_norm=max_norm)).algorithm


def applied(
    algorithm: Algorithm, state: State, deltas: list[list[float]], num_examples: list[int]
) -> tuple[Params, State]:
    updates = [Update("a", 1, {"w": torch.tensor(delta)}, n) for delta, n in zip(deltas, num_examples)]
    return algorithm.apply(state, {"w": torch.tensor([100.0, 200.0])}, iter(updates))


def test_centered_clipping_by_hand() -> None:
    algorithm = centered(radius=5.0)
    state = algorithm.init({"w": torch.zeros(2)})
    # From 0: (3, 4) is whole, (6, -8) is halved. The examples do not count.
    new, state = applied(algorithm, state, [[3.0, 4.0], [6.0, -8.0]], [1, 99])
    assert new["w"].tolist() == [103.0, 200.0]
    assert state["center"]["w"].tolist() == pytest.approx([3.0, 0.0], abs=1e-6)
    # From (3, 0): (3, 1) is whole, (13, 0) comes to (8, 0).
    new, state = applied(algorithm, state, [[3.0, 1.0], [13.0, 0.0]], [1, 1])
    assert new["w"].tolist() == pytest.approx([105.5, 200.5])
    assert state["center"]["w"].tolist() == pytest.approx([5.5, 0.5])


def test_an_update_that_counts_whole_comes_back_unrounded() -> None:
    algorithm = centered(radius=1e9)
    center = {"w": torch.tensor([1e8, 1.0])}
    _, state = applied(algorithm, {"center": center}, [[0.1, 0.7]], [1])
    assert torch.equal(state["center"]["w"], torch.tensor([0.1, 0.7]))


def test_norm_bounding_by_hand() -> None:
    # (0, 1) is whole with 1 example, (6, 8) comes to (3, 4) with 3.
    new, state = applied(bounding(max_norm=5.0), {}, [[0.0, 1.0], [6.0, 8.0]], [1, 3])
    assert new["w"].tolist() == pytest.approx([102.25, 203.25])
    assert state == {}


def test_a_huge_update_moves_the_result_by_no_more_than_its_bound() -> None:
    deltas = [[0.0, 0.0]] * 9 + [[3e38, -3e38]]
    for algorithm in (centered(radius=2.0), bounding(max_norm=2.0)):
        new, _ = applied(algorithm, algorithm.init({"w": torch.zeros(2)}), deltas, [1] * 10)
        moved = new["w"] - torch.tensor([100.0, 200.0])
        assert torch.linalg.vector_norm(moved).item() == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("algorithm", [centered(1.0), bounding(1.0)])
def test_updates_are_used_as_they_come(algorithm: Algorithm) -> None:
    """Each arrives where the last one was: holding on to it would spoil the sum."""
    place = torch.zeros(2)

    def arriving() -> Iterator[Update]:
        for value in (0.5, -0.25):
            yield Update("a", 1, {"w": place.fill_(value)}, 1)

    new, _ = algorithm.apply(algorithm.init({"w": place}), {"w": torch.zeros(2)}, arriving())
    assert new["w"].tolist() == [0.125, 0.125]


def test_large_tensors_are_summed_and_measured_whole() -> None:
    rng = torch.Generator().manual_seed(1)
    params = {"w": torch.zeros(700, 300)}
    deltas = [torch.randn(300, 700, generator=rng).T, torch.randn(700, 300, generator=rng)]
    expected = sum(weight * d / torch.linalg.vector_norm(d) for weight, d in zip((0.75, 0.25), deltas))
    updates = [Update("a", 1, {"w": d}, weight) for weight, d in zip((3, 1), deltas)]
    new, _ = bounding(max_norm=1.0).apply({}, params, iter(updates))
    assert torch.allclose(new["w"], expected, rtol=1e-5, atol=1e-8)
