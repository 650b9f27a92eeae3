import pytest
import torch

from fedtrain.errors import RunError
from fedtrain.experiment.strategies import BulyanStrategy, KrumStrategy, MultiKrumStrategy
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.bulyan import bulyan
from fedtrain.strategies.krum import krum, krum_scores, multi_krum, squared_distances
from fedtrain.wire import Update

DELTAS = [7.0, 1.0, 0.0, 3.0, 100.0]  # the sums over their two nearest: 52, 5, 10, 13, 18058


def krum_of(byzantine: int = 1) -> FederatedStrategy:
    return krum(KrumStrategy(name="krum", byzantine=byzantine))


def multi_krum_of(keep: int | None, byzantine: int = 1) -> FederatedStrategy:
    return multi_krum(MultiKrumStrategy(name="multi-krum", byzantine=byzantine, keep=keep))


def bulyan_of(byzantine: int = 1) -> FederatedStrategy:
    return bulyan(BulyanStrategy(name="bulyan", byzantine=byzantine))


def applied(strategy: FederatedStrategy, deltas: list[float]) -> float:
    updates = [Update(str(i), 1, {"w": torch.tensor([d])}, num_examples=1 + i) for i, d in enumerate(deltas)]
    algorithm, params = strategy.algorithm, {"w": torch.tensor([0.0])}
    new, _ = algorithm.apply(algorithm.init(params), params, iter(updates))
    return new["w"].item()


def test_scores_by_hand() -> None:
    distances = squared_distances([{"w": torch.tensor([d])} for d in DELTAS])
    assert distances[0].tolist() == pytest.approx([0, 36, 49, 16, 8649])
    assert krum_scores(distances, byzantine=1) == pytest.approx([52, 5, 10, 13, 18058])


def test_krum_takes_the_least_score() -> None:
    assert applied(krum_of(), DELTAS) == 1.0


def test_of_equal_scores_the_first_client_wins() -> None:
    assert applied(krum_of(byzantine=0), [0.0, 1.0, 9.0]) == 0.0
    assert applied(krum_of(byzantine=0), [1.0, 0.0, 9.0]) == 1.0


def test_multi_krum_averages_the_least_scores_unweighted() -> None:
    assert applied(multi_krum_of(keep=2), DELTAS) == 0.5  # of 1 and 0
    assert applied(multi_krum_of(keep=None), DELTAS) == 2.75  # n - f: all but 100


def test_bulyan_by_hand() -> None:
    """Krum takes 5, 7, 4, 15 and 8, computing the scores anew each time; nearest to their median 7: 7, 8 and 5.

    In a single pass 3, 4, 5, 7 and 8 would have the least scores, and 4 come out.
    """
    deltas = [8.0, 7.0, 19.0, 3.0, 5.0, 15.0, 4.0]
    assert applied(bulyan_of(), deltas) == applied(bulyan_of(), deltas[::-1]) == pytest.approx(20 / 3)


def test_distances_survive_what_a_gram_matrix_does_not() -> None:
    far = [1e6, 1e6 + 0.25, 1e6 + 1, 1e6]
    deltas = [{"w": torch.tensor([value]), "scalar": torch.tensor(1e30), "empty": torch.zeros(0, 2)} for value in far]
    distances = squared_distances([*deltas, {**deltas[0], "scalar": torch.tensor(-1e30)}])
    assert distances[:3, :3].tolist() == [[0, 0.0625, 1], [0.0625, 0, 0.5625], [1, 0.5625, 0]]
    assert distances[0, 3] == 0
    assert distances[0, 4] == pytest.approx(4e60)


def test_distances_add_up_over_tensors_and_blocks() -> None:
    rng = torch.Generator().manual_seed(1)
    deltas = [{"a": torch.randn(300, 500, generator=rng), "b": torch.randn(7, generator=rng)} for _ in range(4)]
    flat = torch.stack([torch.cat([d["a"].flatten(), d["b"]]).double() for d in deltas])
    expected = (flat[:, None] - flat[None]).square().sum(dim=2)
    assert torch.allclose(squared_distances(deltas), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("strategy", "needed", "message"),
    [
        (krum_of(), 5, "krum has too few updates: got 4; expected at least 2 byzantine + 3 = 5. Lower strategy.byz"),
        (multi_krum_of(keep=None), 5, "multi-krum has too few updates: got 4; expected at least 2 byzantine + 3 = 5"),
        (multi_krum_of(keep=7), 7, "expected at least keep = 7. Lower strategy.keep or ask more clients"),
        (bulyan_of(), 7, "bulyan has too few updates: got 6; expected at least 4 byzantine + 3 = 7"),
    ],
)
def test_too_few_updates_are_refused(strategy: FederatedStrategy, needed: int, message: str) -> None:
    assert applied(strategy, [1.0] * needed) == 1.0
    with pytest.raises(RunError) as error:
        applied(strategy, [1.0] * (needed - 1))
    assert message in str(error.value)
