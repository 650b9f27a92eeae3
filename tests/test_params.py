import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedtrain import params as P


class Mixed(nn.Module):
    """One of each kind: trained, frozen, 0-d, float buffer, integer buffer, unsaved buffer, a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.tied = nn.Linear(2, 3)
        self.tied.weight = self.linear.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("cache", torch.zeros(1), persistent=False)


def test_exchanged_are_the_trained_parameters_and_saved_float_buffers() -> None:
    assert set(P.exchanged(Mixed())) == {"linear.weight", "linear.bias", "tied.bias", "scale", "mean"}


def test_load_writes_what_snapshot_read() -> None:
    source, target = Mixed(), Mixed()
    P.load(target, P.snapshot(P.exchanged(source)))
    for name, tensor in P.exchanged(target).items():
        assert torch.equal(tensor, P.exchanged(source)[name]), name


def test_snapshot_is_contiguous_and_independent() -> None:
    model = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    copy = P.snapshot(P.exchanged(model))
    assert copy["weight"].is_contiguous()
    before = copy["weight"].clone()
    nn.init.zeros_(model.weight)
    assert torch.equal(copy["weight"], before)


def test_l2_norm_by_hand() -> None:
    assert P.l2_norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0), "empty": torch.zeros(0)}) == 5.0
    assert not P.l2_norm({"a": torch.tensor([1.0, float("nan")])}) < float("inf")
    assert P.l2_norm({"a": torch.tensor([3e38, 3e38])}) < float("inf")  # no overflow in float32
    there, here = {"a": torch.ones(70_000), "b": torch.tensor(2.0)}, {"b": torch.tensor(-1.0), "a": torch.ones(70_000)}
    here["a"][-1] = -3.0
    assert P.l2_norm(there, here) == 5.0


def test_weighted_mean_by_hand() -> None:
    total = P.RunningMean({"a": torch.zeros(2), "s": torch.tensor(0.0)})
    total.add({"a": torch.tensor([1.0, 2.0]), "s": torch.tensor(1.0)}, 1)
    total.add({"a": torch.tensor([5.0, 2.0]), "s": torch.tensor(3.0)}, 3)
    assert total.mean()["a"].tolist() == [4.0, 2.0]
    assert total.mean()["s"].item() == 2.5


def test_equal_models_come_back_to_the_last_bit_whatever_their_weights() -> None:
    delta = {"a": torch.randn(1000), "half": torch.randn(10).half()}
    total = P.RunningMean(delta)
    for weight in (1, 10**6, 0, 0.3, 7):
        total.add(delta, weight)
    assert all(torch.equal(total.mean()[name], delta[name]) for name in delta)
    assert total.mean()["half"].dtype == torch.float16


def test_the_rounding_of_a_thousand_models_stays_near_that_of_float32() -> None:
    deltas = torch.randn(1000, 500, generator=torch.Generator().manual_seed(1))
    weights = torch.arange(1.0, 1001.0, dtype=torch.float64)
    total = P.RunningMean({"a": deltas[0]})
    for delta, weight in zip(deltas, weights.tolist()):
        total.add({"a": delta}, weight)
    exact = (weights @ deltas.double()) / weights.sum()
    assert (total.mean()["a"] - exact).abs().max() < 2e-7  # of values whose size is 1


def test_mean_of_nothing_is_zero() -> None:
    assert P.RunningMean({"a": torch.ones(2)}).mean()["a"].tolist() == [0.0, 0.0]


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5),
    st.integers(1, 10**6),
)
def test_one_update_comes_back_to_the_last_bit(values: list[float], weight: int) -> None:
    delta = {"a": torch.tensor(values)}
    total = P.RunningMean(delta)
    total.add(delta, weight)
    assert torch.equal(total.mean()["a"], delta["a"])
