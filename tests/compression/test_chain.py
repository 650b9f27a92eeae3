"""What every chain of codecs owes client and server, whichever its stages are."""

import contextlib
import math
import tracemalloc
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtrain.compression import entropy
from fedtrain.compression.chain import Chain, make_chain
from fedtrain.compression.entropy import Deflate, Zstd
from fedtrain.compression.schema import nbytes, schema_of
from fedtrain.errors import CodecError
from fedtrain.statefile import read_state, write_state

LOSSY = [
    ("fp16",),
    ("bf16",),
    ("int8",),
    ("int8:7",),
    ("int4",),
    ("qsgd:2",),
    ("qsgd:5",),
    ("sign",),
    ("topk:0.1",),
    ("topk:0.9", "fp16"),
    ("topk:0.1", "int4"),
    ("randk:0.3",),
    ("randk:0.3", "qsgd:7"),
    ("stc:0.05",),
    ("powersgd:2",),
    ("powersgd:2", "int8"),
]
UNBIASED = [("int8",), ("int4",), ("qsgd:2",), ("qsgd:5", "deflate"), ("randk:0.3",), ("randk:0.3", "int4")]
FEEDBACK = [stages for stages in LOSSY if stages[0].partition(":")[0] in ("topk", "randk", "stc", "powersgd", "sign")]
CODERS = ["deflate", "zstd"]
CODED = [(), ("int8",), ("int4",), ("qsgd:5",), ("topk:0.1",), ("stc:0.05",), ("powersgd:2", "int8")]
CHAINS = [(), *LOSSY, *((*stages, coder) for coder in CODERS for stages in CODED)]
LOSSLESS = ("running_mean",)


def tensors(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """A model's tensors of all kinds; those of the first line are trained."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "conv": (4, 3, 3, 3),
        "fc": (20, 30),
        "bias": (20,),
        "scalar": (),
        "one": (1,),
        "none": (0,),
        "no": (3, 0),
    }
    return {
        **{name: torch.randn(shape, generator=rng) * scale for name, shape in shapes.items()},
        "wide": torch.randn((2, 3), generator=rng, dtype=torch.float64) * scale,
        "half": torch.randn((5,), generator=rng).half(),
        "running_mean": torch.tensor([math.nan, -0.0, math.inf]),
        "batches": torch.tensor(2**40 + 1),
    }


def chain_of(stages: tuple[str, ...], params: Mapping[str, Tensor] | None = None) -> Chain:
    return make_chain(stages, schema_of(tensors() if params is None else params), LOSSLESS)


def rng_of(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def content(value: Any) -> Any:
    """Everything down to the bytes, to compare with ==."""
    if isinstance(value, Mapping):
        return {name: content(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [content(inner) for inner in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, Tensor) else value


def flat(params: Mapping[str, Tensor]) -> Tensor:
    """The trained tensors as one vector."""
    return torch.cat([t.double().reshape(-1) for name, t in params.items() if name not in (*LOSSLESS, "batches")])


def size(encoded: Mapping[str, Tensor]) -> int:
    return nbytes(schema_of(encoded))


def encoded_by(chain: Chain, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return chain.encode(params, {}, rng_of())[0]


@pytest.mark.parametrize("stages", CHAINS, ids=str)
def test_names_shapes_and_dtypes_come_back_and_lossless_tensors_bit_for_bit(stages: tuple[str, ...]) -> None:
    params = tensors()
    before = content(params)
    encoded, _ = chain_of(stages).encode(params, {}, rng_of())
    decoded = chain_of(stages).decode(encoded)
    assert content(params) == before
    assert list(decoded) == list(params)
    assert schema_of(decoded) == schema_of(params)
    assert flat(decoded).isfinite().all()
    exact = set(params) if stages in ((), ("zstd",), ("deflate",)) else {"running_mean", "batches"}
    assert all(content(decoded[name]) == before[name] for name in exact)


@pytest.mark.parametrize("stages", CHAINS, ids=str)
def test_equal_inputs_give_equal_bytes_of_the_foretold_size(stages: tuple[str, ...]) -> None:
    chain = chain_of(stages)
    encoded, state = chain.encode(tensors(), {}, rng_of())
    assert content(chain.encode(tensors(), {}, rng_of())[0]) == content(encoded)
    assert all(t.is_contiguous() for t in encoded.values())
    assert chain.fixed_size == (not stages or stages[-1] not in ("zstd", "deflate"))
    assert len(encoded) == 1 or chain.identity
    for seed in range(3):  # incompressible bytes too
        encoded, state = chain.encode(tensors(seed, 10.0**seed), state, rng_of(seed))
        assert (size(encoded) == chain.largest()) if chain.fixed_size else (size(encoded) <= chain.largest())
        if chain.fixed_size:
            assert schema_of(encoded) == chain.encoded_schema()
    assert chain.largest() == nbytes(chain.encoded_schema())


@pytest.mark.parametrize("stages", UNBIASED, ids=str)
def test_unbiased_chains_have_the_input_as_their_mean(stages: tuple[str, ...]) -> None:
    params = {"fc": tensors()["fc"], "bias": tensors()["bias"]}
    chain, rng, draws = chain_of(stages, params), rng_of(), 400
    seen = torch.stack([flat(chain.decode(chain.encode(params, {}, rng, feedback=False)[0])) for _ in range(draws)])
    spread = seen.std(0)  # that of a number near a level is too rarely seen to be measured
    score = (seen.mean(0) - flat(params)) / spread.clamp(min=float(spread.mean()) / 2) * math.sqrt(draws)
    assert score.abs().max() < 5
    assert 0.5 < score.square().mean() < 1.25


@pytest.mark.parametrize("stages", FEEDBACK, ids=str)
def test_what_is_lost_is_kept_and_added_to_the_next_update(stages: tuple[str, ...]) -> None:
    chain, rng = chain_of(stages), rng_of()
    assert chain.biased
    state: dict[str, Any] = {}
    given = received = torch.zeros(flat(tensors()).shape)
    for seed in range(5):
        params = {**tensors(seed), "half": torch.zeros(5, dtype=torch.float16)}  # rounded on decoding
        encoded, state = chain.encode(params, state, rng)
        given, received = given + flat(params), received + flat(chain.decode(encoded))
    assert torch.allclose(received + state["residual"].double(), given, rtol=0, atol=2e-5)
    assert state["residual"].norm() > 0.1


@pytest.mark.parametrize("stages", CHAINS, ids=str)
def test_without_feedback_or_bias_there_is_no_residual(stages: tuple[str, ...]) -> None:
    chain = chain_of(stages)
    assert "residual" not in chain.encode(tensors(), {}, rng_of(), feedback=False)[1]
    assert chain.biased == ("residual" in chain.encode(tensors(), {}, rng_of())[1]) == (stages[:1] in _firsts())


def _firsts() -> set[tuple[str, ...]]:
    return {stages[:1] for stages in FEEDBACK}


@pytest.mark.parametrize("stages", FEEDBACK, ids=str)
def test_the_state_goes_on_byte_equal_from_a_file(stages: tuple[str, ...], tmp_path: Path) -> None:
    chain = chain_of(stages)
    _, state = chain.encode(tensors(1), {}, rng_of())
    write_state(tmp_path / "state", state)
    saved = read_state(tmp_path / "state")
    after = [content(chain.encode(tensors(2), kept, rng_of())) for kept in (state, saved)]
    assert after[0] == after[1]
    assert after[0] != content(chain.encode(tensors(2), {}, rng_of()))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1e30, -3.4028234e38])
@pytest.mark.parametrize("stages", CHAINS, ids=str)
def test_extremes_stay_finite(stages: tuple[str, ...], value: float) -> None:
    params = {"fc": torch.full((20, 30), value), "bias": torch.linspace(-1, 1, 20) * value}
    chain = chain_of(stages, params)
    try:
        encoded, _ = chain.encode(params, {}, rng_of())
    except CodecError:
        assert abs(value) > 1e38
        return
    decoded = flat(chain.decode(encoded))
    assert decoded.isfinite().all()
    assert decoded.abs().max() <= max(1.1 * abs(value), 2e-38)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stages", [*LOSSY, ("int8", "deflate")], ids=str)
def test_no_lossy_stage_hides_what_is_not_finite(stages: tuple[str, ...], value: float) -> None:
    params = tensors()
    params["fc"][3, 4] = value
    with pytest.raises(CodecError, match="not finite"):
        chain_of(stages).encode(params, {}, rng_of())
    assert content(chain_of(("deflate",)).decode(encoded_by(chain_of(("deflate",)), params))) == content(params)


def test_a_number_too_large_for_float32_is_not_finite() -> None:
    with pytest.raises(CodecError, match="not finite"):
        chain_of(("int8",)).encode({**tensors(), "wide": torch.full((2, 3), 1e300, dtype=torch.float64)}, {}, rng_of())


@pytest.mark.parametrize("stages", CHAINS, ids=str)
def test_a_model_of_nothing_but_lossless_tensors(stages: tuple[str, ...]) -> None:
    for params in ({}, {"batches": torch.tensor(7)}, {"none": torch.zeros(0)}):
        chain = chain_of(stages, params)
        assert content(chain.decode(encoded_by(chain, params))) == content(params)


@pytest.mark.parametrize("stages", CHAINS, ids=str)
def test_other_tensors_are_refused(stages: tuple[str, ...]) -> None:
    chain = chain_of(stages)
    encoded = encoded_by(chain, tensors())
    name = next(iter(encoded))
    for wrong in (
        {},
        {**encoded, "more": torch.zeros(1)},
        {**encoded, name: encoded[name].double()},
        {**encoded, name: encoded[name].reshape(1, *encoded[name].shape)},
        {**encoded, name: torch.cat([encoded[name].reshape(-1), torch.zeros(10**5, dtype=encoded[name].dtype)])},
    ):
        with pytest.raises(CodecError):
            chain.decode(wrong)
    with pytest.raises(CodecError, match="missing or not known"):
        chain.encode({"fc": tensors()["fc"]}, {}, rng_of())
    with pytest.raises(CodecError, match="'fc' is wrong"):
        chain.encode({**tensors(), "fc": torch.zeros(3)}, {}, rng_of())


@pytest.mark.parametrize("stages", [("topk:0.1",), ("powersgd:2",)], ids=str)
def test_a_state_of_another_model_is_refused(stages: tuple[str, ...]) -> None:
    _, state = chain_of(stages).encode(tensors(), {}, rng_of())
    other = {"fc": torch.zeros(50, 60)}
    with pytest.raises(CodecError, match="of another model"):
        chain_of(stages, other).encode(other, state, rng_of())


VALID = {stages: encoded_by(chain_of(stages), tensors())["encoded"].numpy().tobytes() for stages in CHAINS if stages}


@pytest.mark.parametrize("stages", VALID, ids=str)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_bytes_are_an_error_or_finite_tensors(stages: tuple[str, ...], data: st.DataObject) -> None:
    octets = bytearray(VALID[stages])
    for _ in range(data.draw(st.integers(0, 4))):
        octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    whole = data.draw(st.booleans())
    octets = octets if whole else octets[: data.draw(st.integers(0, len(octets)))] + data.draw(st.binary(max_size=20))
    damaged = torch.frombuffer(octets, dtype=torch.uint8) if octets else torch.zeros(0, dtype=torch.uint8)
    with contextlib.suppress(CodecError):
        decoded = chain_of(stages).decode({"encoded": damaged})
        assert schema_of(decoded) == schema_of(tensors())
        assert (len(stages) == 1 and stages[0] in CODERS) or flat(decoded).isfinite().all()


def edited(stages: tuple[str, ...], start: int, octets: bytes) -> dict[str, Tensor]:
    """An encoded update of two hundred numbers, with some bytes replaced."""
    params = {"fc": torch.linspace(-1, 1, 200)}
    content = bytearray(encoded_by(chain_of(stages, params), params)["encoded"].numpy())
    content[start : start + len(octets)] = octets
    return chain_of(stages, params).decode({"encoded": torch.frombuffer(content, dtype=torch.uint8)})


@pytest.mark.parametrize("stages", [("int8",), ("int4",), ("sign",)], ids=str)
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_scale_that_is_none_is_refused(stages: tuple[str, ...], scale: float) -> None:
    with pytest.raises(CodecError, match="a scale is wrong"):
        edited(stages, 0, np.float32(scale).tobytes())


def test_numbers_that_would_be_infinite_are_refused() -> None:
    with pytest.raises(CodecError, match="not finite"):
        edited(("int8",), 0, np.float32(3e38).tobytes())
    for stages, octets in ((("fp16",), b"\x00\x7c"), (("bf16",), b"\x80\x7f")):
        with pytest.raises(CodecError, match="not finite"):
            edited(stages, 0, octets)
    with pytest.raises(CodecError, match="not finite"):
        edited(("randk:0.5",), 8, np.float32(math.nan).tobytes())


def test_codes_beyond_the_last_level_are_refused() -> None:
    for stages in (("int8",), ("int4",)):
        with pytest.raises(CodecError, match="a code is out of range"):
            edited(stages, 4, b"\xff")


def test_bits_after_the_last_number_are_refused() -> None:
    params = {"fc": torch.ones(3)}
    for stage in ("sign", "int4", "qsgd:5"):
        chain = chain_of((stage,), params)
        octets = encoded_by(chain, params)["encoded"].clone()
        octets[-1] |= 128
        with pytest.raises(CodecError, match="after the last number"):
            chain.decode({"encoded": octets})


@pytest.mark.parametrize("coder", CODERS)
def test_a_bomb_is_not_unpacked(coder: str) -> None:
    params = {"fc": torch.randn(300, 200, generator=torch.Generator().manual_seed(0))}
    chain = chain_of(("bf16", coder), params)
    zeros = bytes(100 << 20)
    if coder == "zstd":
        bomb = Zstd(3).compress(zeros)
    else:
        writer = zlib.compressobj(9, zlib.DEFLATED, -15)
        bomb = writer.compress(zeros) + writer.flush()
    encoded = {"encoded": torch.frombuffer(bytearray(bomb), dtype=torch.uint8)}
    assert len(bomb) < chain.largest()
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            chain.decode(encoded)
        assert tracemalloc.get_traced_memory()[1] < 6 * chain.largest() < len(zeros) / 100
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("coder", CODERS)
def test_coded_bytes_that_are_too_few_or_too_many_are_refused(coder: str) -> None:
    codec = Zstd() if coder == "zstd" else Deflate()
    written = codec.compress(bytes(1000))
    assert codec.decompress(written, 1000) == bytes(1000)
    for content, size in ((written[:-1], 1000), (written + b"\0", 1000), (written, 999), (written, 1001), (b"", 1000)):
        with pytest.raises(CodecError):
            codec.decompress(content, size)


def test_a_zstd_frame_that_asks_for_more_memory_than_its_content_is_refused() -> None:
    library = entropy.zstd
    options = {library.CompressionParameter.window_log: 27}
    writer = library.ZstdCompressor(options=options)
    frame = writer.compress(bytes(1000)) + writer.flush()  # no size in its header, so its window counts
    assert library.decompress(frame) == bytes(1000)
    with pytest.raises(CodecError, match="damaged"):
        Zstd().decompress(frame, 1000)
