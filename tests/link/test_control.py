import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtrain.errors import LinkError
from fedtrain.link.control import (
    Ack,
    Beat,
    Cancel,
    Decline,
    Farewell,
    Hello,
    Offer,
    Ready,
    Refused,
    Status,
    SubmitHead,
    TaskNotice,
    Wanted,
    encode,
    read_ack,
    read_client,
    read_json,
    read_server,
    read_submit,
    read_wanted,
)

RUN = "0" * 32
HELLO = Hello(version="0.1.0", name="berlin", instance="1f")
READERS: tuple[Callable[[bytes], object], ...] = (read_client, read_server, read_submit, read_wanted, read_ack)
MESSAGES = [
    (HELLO, read_client),
    (Ready(run=RUN, facts={"examples": 3, "list": [1.5, None, float("inf")]}), read_client),
    (Decline(reason="the policy says no"), read_client),
    (Status(text="training", progress=3), read_client),
    (Offer(run=RUN, experiment_hash="ab", facts={"experiment": {"seed": 7}}), read_server),
    (TaskNotice(id="a-1", kind="train", group="1", header={"records": {}}, nbytes=0, checksum="0"), read_server),
    (Cancel(id="a-1"), read_server),
    (Beat(), read_server),
    (Refused(reason="in use", final=False), read_server),
    (Farewell(reason="over", back=True), read_server),
    (Wanted(session="ab", task="a-1", offset=3), read_wanted),
    (SubmitHead(session="ab", task="a-1", header={}, nbytes=3, checksum="0"), read_submit),
    (Ack(verdict="late"), read_ack),
]


@pytest.mark.parametrize(("message", "read"), MESSAGES, ids=[type(m).__name__ for m, _ in MESSAGES])
def test_messages_come_back(message: Any, read: Callable[[bytes], object]) -> None:
    assert read(encode(message)) == message


@pytest.mark.parametrize(
    "change",
    [
        {"more": 1},
        {"name": "../berlin"},
        {"name": "b\x1b[31m"},
        {"name": "berlin\n"},
        {"name": ""},
        {"name": "b" * 65},
        {"protocol": "1"},
        {"protocol": True},
        {"instance": None},
        {"type": "farewell"},
    ],
)
def test_what_is_no_such_message_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LinkError, match="wrong"):
        read_client(json.dumps({**HELLO.model_dump(), **change}).encode())


def test_sizes_are_capped_at_both_ends() -> None:
    with pytest.raises(LinkError, match="too large"):
        encode(Ready(run=RUN, facts={"x": "y" * (1 << 16)}))
    with pytest.raises(LinkError, match="too large"):
        read_client(b" " * (1 << 17))
    with pytest.raises(LinkError, match="too large"):
        encode(Offer(run=RUN, experiment_hash="", facts={"x": "y" * (1 << 21)}))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 60_000, b'{"a": 1, "a": 2}', b"9" * 5000])
def test_what_is_no_json_of_ours_is_refused(data: bytes) -> None:
    with pytest.raises(LinkError, match="JSON"):
        read_json(data, 1 << 16)


@pytest.mark.parametrize("run", ["../../up", "/tmp/x", "a\0", "", "0" * 31, "0" * 32 + "\n", "A" * 32])
def test_a_run_has_a_name_that_can_name_a_folder(run: str) -> None:
    offer = {**Offer(run=RUN, experiment_hash="ab", facts={}).model_dump(), "run": run}
    ready = {**Ready(run=RUN, facts={}).model_dump(), "run": run}
    for message, read in ((offer, read_server), (ready, read_client)):
        with pytest.raises(LinkError, match=r"wrong: got \w+\.run"):
            read(json.dumps(message).encode())


@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"a":', "}")])
def test_values_within_values_are_bounded(before: str, after: str) -> None:
    def nested(depth: int) -> bytes:
        return (before * depth + "1" + after * depth).encode()

    read_json(nested(31), 1 << 16)
    for depth in (32, 500):
        with pytest.raises(LinkError, match="nested too deep"):
            read_json(nested(depth), 1 << 16)


@given(st.data())
def test_damaged_messages_give_our_error(data: st.DataObject) -> None:
    message, _ = data.draw(st.sampled_from(MESSAGES))
    raw = bytearray(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    for read in READERS:
        with contextlib.suppress(LinkError):
            read(damaged)
