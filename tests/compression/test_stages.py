"""Each stage beside numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtrain.compression.bits import EliasFano, Gaps, IndexCode, pack, packed_size, unpack
from fedtrain.compression.chain import Chain, make_chain
from fedtrain.compression.schema import schema_of
from fedtrain.errors import CodecError


def round_trip(values: Tensor, *stages: str, feedback: bool = False) -> tuple[Tensor, Chain]:
    params = {"w": values}
    chain = make_chain(stages, schema_of(params))
    encoded, _ = chain.encode(params, {}, np.random.Generator(np.random.PCG64(0)), feedback=feedback)
    return chain.decode(encoded)["w"], chain


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_half_precisions_round_to_nearest_and_saturate() -> None:
    values = torch.tensor([1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 1e6, -1e6, 1e-9])
    assert torch.equal(round_trip(values, "fp16")[0], torch.tensor([1, 1, 1 + 2**-9, 65504, 65504, -65504, 0]))
    most = torch.finfo(torch.bfloat16).max
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.4028234e38])
    assert torch.equal(round_trip(values, "bf16")[0], torch.tensor([1, 1, 1 + 2**-6, -most]))


@pytest.mark.parametrize(("stage", "levels", "bucket"), [("int8:50", 127, 50), ("int4:64", 7, 64), ("qsgd:3", 3, 256)])
def test_uniform_errs_by_less_than_a_step_and_keeps_levels(stage: str, levels: int, bucket: int) -> None:
    values = normal(500) * 10 ** torch.linspace(-3, 3, 500)
    decoded, _ = round_trip(values, stage)
    for part, result in zip(values.split(bucket), decoded.split(bucket)):
        step = float(part.abs().max()) / levels
        assert (part - result).abs().max() <= step * 1.0001
        assert torch.allclose(result / step, (result / step).round(), atol=1e-3)
    exact = torch.arange(500.0) % (2 * levels + 1) - levels
    exact[::bucket] = levels
    assert torch.equal(round_trip(exact, stage)[0], exact)


def test_sign_sends_the_mean_magnitude_of_each_tensor() -> None:
    params = {"a": torch.tensor([1.0, -2.0, 0.0]), "b": torch.tensor([[-10.0]])}
    chain = make_chain(["sign"], schema_of(params))
    decoded = chain.decode(chain.encode(params, {}, np.random.Generator(np.random.PCG64(0)))[0])
    assert decoded["a"].tolist() == [1, -1, 1]
    assert decoded["b"].tolist() == [[-10]]
    assert chain.largest() == 2 * 4 + 1


def test_topk_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    values = torch.tensor([0.5, -3.0, 1.0, 1.0, -1.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    for coder in ([], ["deflate"]):
        assert round_trip(values, "topk:0.4", *coder)[0].tolist() == [0, -3, 1, 1, 0, 2, 0, 0, 0, 0]
    assert round_trip(torch.zeros(3), "topk:0.5")[0].tolist() == [0, 0, 0]


def test_stc_is_the_sign_of_the_largest_times_their_mean() -> None:
    values = torch.tensor([0.5, -3.0, 1.0, 0.0, 0.0, 2.0])
    assert round_trip(values, "stc:0.33")[0].tolist() == [0, -2.5, 0, 0, 0, 2.5]


@pytest.mark.parametrize("feedback", [True, False])
def test_randk_enlarges_what_it_keeps_unless_the_rest_is_kept_for_later(feedback: bool) -> None:
    values = torch.arange(1.0, 101.0)
    decoded, chain = round_trip(values, "randk:0.25", feedback=feedback)
    kept = decoded != 0
    assert int(kept.sum()) == 25
    assert torch.equal(decoded[kept], values[kept] * (1 if feedback else 4))
    assert chain.largest() == 25 * 4 + 8


def test_powersgd_is_exact_on_matrices_of_its_rank_and_sends_the_rest_as_it_is() -> None:
    params = {
        "low": normal(40, 2) @ normal(30, 2).T,
        "conv": normal(8, 1, 3, 3),
        "bias": normal(7),
        "thin": normal(9, 2),
    }
    chain = make_chain(["powersgd:2"], schema_of(params))
    decoded = chain.decode(chain.encode(params, {}, np.random.Generator(np.random.PCG64(0)))[0])
    for name in ("low", "bias", "thin"):
        assert torch.allclose(decoded[name], params[name], atol=1e-5)
    assert chain.largest() == 4 * ((40 + 30) * 2 + (8 + 9) * 2 + 7 + 18)


def test_powersgd_comes_nearer_to_the_best_rank_from_update_to_update() -> None:
    matrix = torch.diag(torch.tensor([10.0, 9.0, 8.0, 7.0, 6.0, 5.0])) @ normal(6, 40)
    chain = make_chain(["powersgd:2"], schema_of({"w": matrix}))
    best = torch.linalg.svdvals(matrix)[2:].norm()
    state, rng, errors = {}, np.random.Generator(np.random.PCG64(0)), []
    for _ in range(30):
        encoded, state = chain.encode({"w": matrix}, state, rng, feedback=False)
        errors.append(float((chain.decode(encoded)["w"] - matrix).norm()))
    assert errors[0] > 1.02 * best
    assert errors[-1] == pytest.approx(float(best), rel=1e-2)


@pytest.mark.parametrize(
    ("stages", "size"),
    [
        (["fp16"], 2000),
        (["int8"], 1000 + 4 * 4),
        (["int8:1000"], 1000 + 4),
        (["int4"], 500 + 4 * 4),
        (["qsgd:3"], 375 + 4 * 4),
        (["sign"], 125 + 4),
        (["topk:0.01"], 10 * 4 + 8 + 4),  # 6 low bits of 10 indices; 10 + 1000 // 64 places
        (["topk:0.01", "int8"], 10 + 4 + 8 + 4),
        (["stc:0.01"], 2 + 4 + 8 + 4),
        (["randk:0.01", "fp16"], 10 * 2 + 8),
    ],
)
def test_bytes_of_a_thousand_numbers(stages: list[str], size: int) -> None:
    assert round_trip(normal(1000), *stages)[1].largest() == size


@given(st.integers(1, 32), st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_packed_integers_come_back(bits: int, values: list[int]) -> None:
    array = np.array(values, np.uint32) & np.uint32(2**bits - 1)
    packed = pack(array, bits)
    assert len(packed) == packed_size(len(values), bits)
    assert unpack(packed, len(values), bits).tolist() == array.tolist()


@given(st.integers(1, 3000), st.data())
def test_indices_come_back_in_the_size_foretold(size: int, data: st.DataObject) -> None:
    indices = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1)))), np.int64)
    for kind in (Gaps, EliasFano):
        code: IndexCode = kind(size, len(indices))
        arrays = code.write(indices)
        assert [(a.dtype, len(a)) for a in arrays] == list(code.fields)
        assert code.read(arrays).tolist() == indices.tolist()
    least = math.log2(math.comb(size, len(indices)))
    assert sum(len(a) for a in arrays) * 8 <= least + 1.1 * len(indices) + 2 * math.log2(size) + 20


@pytest.mark.parametrize("indices", [[0, 5, 5], [0, 9, 8], [1, 2, 64]])
def test_elias_fano_refuses_indices_that_are_repeated_unsorted_or_out_of_range(indices: list[int]) -> None:
    code = EliasFano(64, 3)
    with pytest.raises(CodecError, match="repeated, unsorted or out of range"):
        code.read(code.write(np.array(indices)))


def test_elias_fano_refuses_too_few_indices() -> None:
    code = EliasFano(64, 3)
    low, places = code.write(np.array([1, 2, 3]))
    with pytest.raises(CodecError, match="number of indices"):
        code.read([low, np.zeros_like(places)])


def test_gaps_refuse_an_index_out_of_range() -> None:
    code = Gaps(64, 3)
    assert code.read([np.array([0, 0, 61], np.uint32)]).tolist() == [0, 1, 63]
    with pytest.raises(CodecError, match="out of range"):
        code.read([np.array([2**32 - 1, 0, 62], np.uint32)])
