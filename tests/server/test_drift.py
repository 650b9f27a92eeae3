import math

import pytest
import torch

from fedtrain.params import Params
from fedtrain.server.drift import Drift, Sketcher

SIZE = 300_000


def update(*numbers: float, seed: int = 0) -> Params:
    """Three orthogonal directions, in two tensors."""
    rng = torch.Generator().manual_seed(7)
    whole = torch.zeros(SIZE)
    for place, number in enumerate(numbers):
        third = torch.randn(SIZE // 3, generator=rng)
        whole[place * len(third) : (place + 1) * len(third)] = number * third / third.norm()
    return {"w": whole[:-1000].reshape(100, -1), "b": whole[-1000:]}


def drift(*updates: Params) -> Drift:
    found = Drift(Sketcher(updates[0]))
    for number, one in enumerate(updates):
        found.add(f"c{number}", one)
    return found


def test_cosines_and_norms_are_those_of_the_vectors() -> None:
    found = drift(update(1), update(0, 1), update(2, 0, 1)).clients()
    mean = [1.0, 1 / 3, 1 / 3]
    length = math.hypot(*mean)
    for client, vector in {"c0": [1, 0, 0], "c1": [0, 1, 0], "c2": [2, 0, 1]}.items():
        norm = math.hypot(*vector)
        cosine = sum(a * b for a, b in zip(vector, mean)) / (norm * length)
        assert found[client] == pytest.approx((cosine, norm / length), abs=0.06)


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([update(1), update(1), update(1), update(1)], 1 / 4),
        ([update(1), update(0, 1), update(0, 0, 1)], 1.0),
        ([update(1), update(-0.5)], 1.25 / 0.25),
    ],
)
def test_diversity(updates: list[Params], expected: float) -> None:
    assert drift(*updates).diversity() == pytest.approx(expected, rel=0.06)


def test_buffers_do_not_count() -> None:
    found = Drift(Sketcher(update(1)))
    for name in ("a", "b"):
        found.add(name, {**update(1), "num_batches_tracked": torch.tensor(60.0)})
    assert found.clients()["a"] == pytest.approx((1.0, 1.0))
    assert found.diversity() == pytest.approx(0.5)


def test_where_updates_cancel_nothing_is_told() -> None:
    found = drift(update(1), update(-1))
    assert (found.clients(), found.diversity()) == ({}, None)
    empty = Drift(Sketcher(update(1)))
    assert (empty.clients(), empty.diversity()) == ({}, None)


def test_a_zero_update_has_no_direction() -> None:
    assert list(drift(update(1), update(0)).clients()) == ["c0"]
