import contextlib
import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtrain import flower
from fedtrain.errors import LinkError
from fedtrain.link.frames import CHUNK, Packed, Payload, pack, unpack
from fedtrain.link.headers import HEADER_LIMIT
from fedtrain.link.spool import load, save

LIMIT = 1 << 26
TENSORS = {
    "weight": torch.randn(3, 5),
    "steps": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "half": torch.randn(9).to(torch.bfloat16),
    "mask": torch.tensor([True, False, True]),
}


@dataclass
class Claimed:
    """What a peer may claim."""

    header: Any
    nbytes: int
    checksum: str


def some_records() -> RecordDict:
    return RecordDict(
        {
            "arrays": flower.array_record(TENSORS),
            "metrics": MetricRecord({"loss": math.inf, "n": 3, "many": [0.5, -0.0]}),
            "config": ConfigRecord({"a": 1, "b": 1.0, "c": True, "d": "ü", "e": b"\x00\xff", "f": [b"x"], "g": []}),
        }
    )


def sent(packed: Packed, folder: Path | None = None, limit: int = LIMIT) -> Any:
    """Pass a message through JSON and chunks, as the wire does."""
    claim = Claimed(json.loads(json.dumps(packed.header)), packed.nbytes, packed.checksum)
    receiver = unpack(claim, limit, folder)
    for chunk in packed.payload.chunks():
        receiver.write(chunk)
    return receiver.finish()


def claim_of(packed: Packed) -> Claimed:
    return Claimed(copy.deepcopy(packed.header), packed.nbytes, packed.checksum)


def test_records_come_back_as_they_were() -> None:
    content = sent(pack(some_records()))
    assert list(content) == ["arrays", "metrics", "config"]
    back = flower.tensors(content["arrays"])
    assert list(back) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor)
    assert repr(dict(content["metrics"])) == repr(dict(some_records()["metrics"]))
    assert repr(dict(content["config"])) == repr(dict(some_records()["config"]))


SCALARS = (
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.booleans(),
    st.binary(),
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.one_of(*SCALARS, *map(st.lists, SCALARS))))
def test_every_value_keeps_its_type(values: dict[str, Any]) -> None:
    content = sent(pack(RecordDict({"config": ConfigRecord(values)})))
    assert repr(dict(content["config"])) == repr(values)


def test_an_error_travels() -> None:
    assert sent(pack(Error(3, "no such\ntumour"))) == Error(3, "no such\ntumour")
    assert sent(pack(Error(0))) == Error(0)
    assert len(sent(pack(Error(0, "x" * 1_000_000))).reason) == 10_000


def test_arrays_of_other_flwr_code_travel() -> None:
    theirs = ArrayRecord({"w": Array(TENSORS["weight"].numpy())})
    assert torch.equal(flower.tensors(sent(pack(RecordDict({"a": theirs})))["a"])["w"], TENSORS["weight"])


def test_what_cannot_travel_is_refused_where_it_starts() -> None:
    with pytest.raises(LinkError, match="dtype"):
        pack(RecordDict({"a": flower.array_record({"z": torch.zeros(1, dtype=torch.complex64)})}))
    with pytest.raises(LinkError, match="beside its arrays"):
        pack(RecordDict({"c": ConfigRecord({"text": "x" * HEADER_LIMIT})}))


def test_chunks_are_bounded_and_start_anywhere() -> None:
    packed = pack(RecordDict({"a": flower.array_record({str(n): torch.randn(1000, n) for n in (3, 500, 0, 300)})}))
    whole = b"".join(packed.payload.chunks())
    assert len(whole) == packed.nbytes
    assert {len(chunk) for chunk in list(packed.payload.chunks())[:-1]} == {CHUNK}
    for offset in (1, 11_999, 12_000, 12_032, CHUNK, packed.nbytes - 1, packed.nbytes, packed.nbytes + 1):
        assert b"".join(packed.payload.chunks(offset)) == whole[offset:]


def test_tensors_are_not_copied() -> None:
    tensor = torch.zeros(4)
    packed = pack(RecordDict({"a": flower.array_record({"w": tensor})}))
    tensor += 1
    assert torch.equal(flower.tensors(sent(packed)["a"])["w"], torch.ones(4))


def test_messages_share_the_payload_of_shared_records() -> None:
    known: dict[tuple[int, ...], Payload] = {}
    shared, own = flower.array_record(TENSORS), flower.array_record(TENSORS)
    one, two, other = (
        pack(RecordDict({"a": record, "c": ConfigRecord({"for": name})}), known)
        for record, name in ((shared, "x"), (shared, "y"), (own, "z"))
    )
    assert one.payload is two.payload
    assert one.header != two.header
    assert other.payload is not one.payload
    assert len(pack(RecordDict({"a": shared, "b": shared})).header["records"]) == 2
    assert sent(pack(RecordDict({"a": shared, "b": shared})))["b"]["weight"].shape == (3, 5)


def test_large_payloads_go_to_a_file_without_a_name(tmp_path: Path) -> None:
    tensor = torch.randn(1 << 19)
    receiver_of = pack(RecordDict({"a": flower.array_record({"w": tensor})}))
    content = sent(receiver_of, tmp_path)
    back = flower.tensors(content["a"])["w"]
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(back, tensor)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 1
    del content, back
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def receive(claim: Claimed, chunks: list[bytes]) -> Any:
    receiver = unpack(claim, LIMIT)
    for chunk in chunks:
        receiver.write(chunk)
    return receiver.finish()


def test_too_few_too_many_and_other_bytes_are_refused() -> None:
    packed = pack(some_records())
    data = b"".join(packed.payload.chunks())
    with pytest.raises(LinkError, match="cut off"):
        receive(claim_of(packed), [data[:-1]])
    with pytest.raises(LinkError, match="more than was declared"):
        receive(claim_of(packed), [data, b"x"])
    with pytest.raises(LinkError, match="empty"):
        receive(claim_of(packed), [b"", data])
    with pytest.raises(LinkError, match="checksum"):
        receive(claim_of(packed), [data[:5], bytes([data[5] ^ 1]), data[6:]])


def test_a_bool_that_is_neither_true_nor_false_is_refused() -> None:
    packed = pack(RecordDict({"a": flower.array_record({"m": torch.tensor([2], dtype=torch.uint8)})}))
    claim = claim_of(packed)
    claim.header["records"]["a"]["arrays"][0][1] = "bool"
    with pytest.raises(LinkError, match="neither true nor false"):
        receive(claim, list(packed.payload.chunks()))


def entry(name: Any = "w", dtype: Any = "float32", shape: Any = (16,)) -> dict[str, Any]:
    return {"records": {"a": {"arrays": [[name, dtype, list(shape) if isinstance(shape, tuple) else shape]]}}}


LIES: dict[str, Any] = {
    "no object": [],
    "nothing": {},
    "both": {"records": {}, "error": {"code": 1, "reason": ""}},
    "more": {"records": {}, "more": 1},
    "error without code": {"error": {"reason": ""}},
    "bool as code": {"error": {"code": True, "reason": ""}},
    "no record": {"records": {"a": 3}},
    "two kinds": {"records": {"a": {"metrics": {}, "config": {}}}},
    "unknown kind": {"records": {"a": {"pickle": {}}}},
    "metric is a text": {"records": {"a": {"metrics": {"m": "1"}}}},
    "mixed list": {"records": {"a": {"config": {"m": [1, "1"]}}}},
    "null": {"records": {"a": {"config": {"m": None}}}},
    "nested": {"records": {"a": {"config": {"m": [[1]]}}}},
    "no base64": {"records": {"a": {"config": {"m": {"bytes": "ü"}}}}},
    "half a character": {"records": {"a": {"config": {"m": "\ud800"}}}},
    "twice": {"records": {"a": {"arrays": [["w", "float32", [0]], ["w", "float32", [16]]]}}},
    "too many": {"records": {"a": {"arrays": [[str(n), "float32", [0]] for n in range(20_001)]}}},
    "long record name": {"records": {"a" * 513: {"metrics": {}}}},
    "name": entry(name=3),
    "long name": entry(name="w" * 513),
    "dtype": entry(dtype="object"),
    "dtype is a path": entry(dtype="torch.float32"),
    "negative": entry(shape=(-16, -1)),
    "real": entry(shape=(16.0,)),
    "bool as size": entry(shape=(16, True)),
    "no shape": entry(shape=16),
    "many dimensions": entry(shape=(1,) * 17),
    "overflow": entry(shape=(0, 1 << 40, 1 << 40)),
    "longer": entry(shape=(17,)),
    "shorter": entry(shape=(0,)),
}


@pytest.mark.parametrize("header", LIES.values(), ids=list(LIES))
def test_a_lying_header_takes_no_memory(header: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(LinkError):
        unpack(Claimed(header, 64, "0"), LIMIT)


def test_a_payload_beyond_the_limit_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(LinkError, match="too large"):
        unpack(Claimed(entry(shape=(1 << 50,)), 1 << 52, "0"), LIMIT)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


@settings(max_examples=400)
@given(st.data())
def test_lying_frames_give_our_error_and_no_memory_beyond_the_limit(data: st.DataObject) -> None:
    packed = pack(some_records())
    claim = claim_of(packed)
    if data.draw(st.booleans(), "lie in the header"):
        where = data.draw(st.sampled_from(places(claim.header)))
        claim.header = put(claim.header, where, data.draw(JSON))
    if data.draw(st.booleans(), "lie about the length"):
        claim.nbytes = data.draw(st.integers(0, 1 << 61))
    raw = bytearray(b"".join(packed.payload.chunks()))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(0, 255))
    chunks = [bytes(raw[: data.draw(st.integers(0, len(raw)))])]
    taken: list[int] = []
    empty: Callable[..., torch.Tensor] = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda size, **more: taken.append(size) or empty(size, **more))
        with contextlib.suppress(LinkError):
            receive(claim, chunks)
    assert all(size <= LIMIT for size in taken)


def kept(folder: Path) -> Path:
    save(pack(some_records()), folder / "reply")
    return folder / "reply"


def test_a_kept_message_comes_back(tmp_path: Path) -> None:
    packed = load(kept(tmp_path))
    assert packed.checksum == pack(some_records()).checksum
    assert torch.equal(flower.tensors(sent(packed)["arrays"])["weight"], TENSORS["weight"])
    save(pack(Error(1, "why")), tmp_path / "error")
    assert sent(load(tmp_path / "error")) == Error(1, "why")
    assert {path.name for path in tmp_path.iterdir()} == {"reply", "error"}


def test_a_damaged_kept_message_is_refused(tmp_path: Path) -> None:
    path = kept(tmp_path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(LinkError, match="damaged"):
            load(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(LinkError, match="damaged"):
            load(path)
    path.write_bytes(whole + b"\0" * 64)
    with pytest.raises(LinkError, match="damaged"):
        load(path)
