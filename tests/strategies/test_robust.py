"""What holds for every robust strategy, and parity with flwr's own on full weights."""

from collections.abc import Iterable

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flwr

from fedtrain import flower
from fedtrain.experiment.strategies import (
    BulyanStrategy,
    CenteredClippingStrategy,
    GeometricMedianStrategy,
    KrumStrategy,
    MultiKrumStrategy,
    NormBoundingStrategy,
    TrimmedMeanStrategy,
)
from fedtrain.params import Params, add, difference, l2_norm
from fedtrain.strategies.base import Algorithm, FederatedStrategy
from fedtrain.strategies.bulyan import bulyan
from fedtrain.strategies.clipping import centered_clipping, norm_bounding
from fedtrain.strategies.geometric_median import geometric_median
from fedtrain.strategies.krum import krum, krum_scores, multi_krum, squared_distances
from fedtrain.strategies.median import median, trimmed_mean
from fedtrain.wire import Update

N, F = 13, 2
START = {"matrix": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "scalar": torch.tensor(0.25), "empty": torch.zeros(0, 3)}
WITHIN_THE_GOOD_ONES = {
    "median": median(),
    "trimmed-mean": trimmed_mean(TrimmedMeanStrategy(name="trimmed-mean", trim=0.2)),
    "krum": krum(KrumStrategy(name="krum", byzantine=F)),
    "multi-krum": multi_krum(MultiKrumStrategy(name="multi-krum", byzantine=F)),
    "bulyan": bulyan(BulyanStrategy(name="bulyan", byzantine=F)),
    "geometric-median": geometric_median(GeometricMedianStrategy(name="geometric-median")),
}
ALL = WITHIN_THE_GOOD_ONES | {
    "centered-clipping": centered_clipping(CenteredClippingStrategy(name="centered-clipping", radius=0.5)),
    "norm-bounding": norm_bounding(NormBoundingStrategy(name="norm-bounding", max_norm=3.0)),
}


def drawn(seed: int, like: Params = START) -> list[Params]:
    """Updates around 1 of N clients."""
    rng = torch.Generator().manual_seed(seed)
    return [{n: (1 + 0.2 * torch.randn(t.shape, generator=rng)).to(t.dtype) for n, t in like.items()} for _ in range(N)]


def attacked(deltas: list[Params]) -> list[Params]:
    """The first F send -10 times their update."""
    return [{n: -10 * t for n, t in d.items()} if i < F else d for i, d in enumerate(deltas)]


def moved(algorithm: Algorithm, deltas: Iterable[Params], params: Params = START) -> Params:
    updates = [Update(str(i), 1, delta, num_examples=5) for i, delta in enumerate(deltas)]
    return algorithm.apply(algorithm.init(params), params, iter(updates))[0]


@pytest.mark.parametrize("name", ALL)
def test_no_update_leaves_parameters_and_state(name: str) -> None:
    params = {"w": torch.tensor([1.5, -0.0])}
    state = ALL[name].algorithm.init(params)
    new, after = ALL[name].algorithm.apply(state, params, iter(()))
    assert new["w"].numpy().tobytes() == params["w"].numpy().tobytes()
    assert after is state


@pytest.mark.parametrize("name", WITHIN_THE_GOOD_ONES)
def test_a_minority_that_sends_ten_times_the_opposite_stays_without_effect(name: str) -> None:
    deltas = attacked(drawn(seed=1))
    good = deltas[F:]
    change = difference(moved(ALL[name].algorithm, deltas), START)
    for key in ("matrix", "scalar"):
        values = torch.stack([delta[key] for delta in good])
        assert (change[key] >= values.amin(dim=0) - 1e-6).all(), key
        assert (change[key] <= values.amax(dim=0) + 1e-6).all(), key


def test_centered_clipping_finds_its_way_to_the_good_ones_over_the_rounds() -> None:
    algorithm = ALL["centered-clipping"].algorithm
    params, state = START, algorithm.init(START)
    for round_number in range(1, 13):
        before = params
        deltas = attacked(drawn(seed=round_number))
        params, state = algorithm.apply(state, params, (Update("a", round_number, d, 1) for d in deltas))
    ones = {name: torch.ones_like(t) for name, t in START.items()}
    assert l2_norm(difference(difference(params, before), ones)) < 0.5
    plain_mean = {name: torch.stack([d[name] for d in deltas]).mean(dim=0) for name in START}
    assert l2_norm(difference(plain_mean, ones)) > 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_dtypes_and_shapes_are_kept(name: str, dtype: torch.dtype) -> None:
    params = {key: t.to(dtype) for key, t in START.items()}
    new = moved(ALL[name].algorithm, drawn(1, params), params)
    assert {key: (t.shape, t.dtype) for key, t in new.items()} == {k: (t.shape, dtype) for k, t in params.items()}
    full = moved(ALL[name].algorithm, [{k: t.float() for k, t in d.items()} for d in drawn(1, params)])
    assert all(torch.allclose(t.float(), full[key], atol=0.05) for key, t in new.items())


def theirs(strategy: flwr.FedAvg, deltas: list[Params]) -> Params:
    """Let flwr aggregate the same clients, which return weights instead of deltas."""
    flower.enter_run(1)
    replies = []
    for node_id, delta in enumerate(deltas, start=1):
        content = RecordDict({"arrays": ArrayRecord(add(START, delta)), "metrics": MetricRecord({"num-examples": 5})})
        replies.append(Message(content, reply_to=Message(RecordDict({}), node_id, "train", group_id="1")))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return arrays.to_torch_state_dict()


def agree(one: Params, other: Params) -> bool:
    return all(torch.allclose(t.double(), other[name].double(), rtol=0, atol=1e-6) for name, t in one.items())


@pytest.mark.parametrize(
    ("ours", "flower_strategy", "n"),
    [
        (ALL["median"], flwr.FedMedian(), N),
        (ALL["median"], flwr.FedMedian(), N - 1),
        (ALL["trimmed-mean"], flwr.FedTrimmedAvg(beta=0.2), N),
        (ALL["krum"], flwr.Krum(num_malicious_nodes=F), N),
        (ALL["multi-krum"], flwr.MultiKrum(num_malicious_nodes=F, num_nodes_to_select=N - F), N),
    ],
    ids=["odd median", "even median", "trimmed mean", "krum", "multi-krum"],
)
@pytest.mark.parametrize("seed", range(5))
def test_parity_with_flwr(ours: FederatedStrategy, flower_strategy: flwr.FedAvg, n: int, seed: int) -> None:
    deltas = attacked(drawn(seed))[:n]
    assert agree(moved(ours.algorithm, deltas), theirs(flower_strategy, deltas))


def test_parity_with_flwrs_bulyan_but_for_the_repeated_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # flwr calls it once per reply, which takes most of the time

    def repeated(contents: list[RecordDict], byzantine: int, keep: int) -> list[RecordDict]:
        left, selected = list(contents), []
        while len(selected) < keep:
            weights = [content.array_records["arrays"].to_torch_state_dict() for content in left]
            distances = squared_distances(weights)
            scores = list(zip(krum_scores(distances, byzantine), distances.sum(dim=1).tolist()))
            selected.append(left.pop(scores.index(min(scores))))
        return selected

    plain, adjusted = (flwr.Bulyan(num_malicious_nodes=F, selection_rule=rule) for rule in (None, repeated))
    agreed = []
    for seed in range(5):
        deltas = attacked(drawn(seed))
        own = moved(ALL["bulyan"].algorithm, deltas)
        assert agree(own, theirs(adjusted, deltas))
        agreed.append(agree(own, theirs(plain, deltas)))
    assert not all(agreed)
