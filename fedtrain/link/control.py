"""The small typed messages of a session, as JSON with caps."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedtrain.errors import LinkError, shorten
from fedtrain.link.headers import HEADER_LIMIT

__all__ = [
    "PROTOCOL",
    "Accepted",
    "Ack",
    "Beat",
    "Cancel",
    "ClientMessage",
    "Decline",
    "Farewell",
    "Hello",
    "Offer",
    "Ready",
    "Refused",
    "ServerMessage",
    "Status",
    "SubmitHead",
    "TaskNotice",
    "Wanted",
    "encode",
    "read_ack",
    "read_client",
    "read_json",
    "read_server",
    "read_submit",
    "read_wanted",
]

PROTOCOL = 1
"""Raised when an end of another version would not be understood."""

_SMALL = 1 << 16  # bytes of what a client says
_LARGE = HEADER_LIMIT + _SMALL  # of what holds a header, or the experiment
_DEEPEST = 32  # of values within values: more could not be shown, copied or checked

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
_Id = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
_Run = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # becomes the name of a folder
_Word = Annotated[str, Field(max_length=64)]
_Sentence = Annotated[str, Field(max_length=1000)]
_Size = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Hello(_Message):
    """Client: who it is. `instance` is random, one per process."""

    type: Literal["hello"] = "hello"
    protocol: int = PROTOCOL
    version: _Word
    name: _Name
    instance: _Id


class Ready(_Message):
    """Client: it takes part in this run; `facts` are for the server's doorman."""

    type: Literal["ready"] = "ready"
    run: _Run
    facts: dict[str, Any]


class Decline(_Message):
    """Client: it takes no part in this run."""

    type: Literal["decline"] = "decline"
    reason: _Sentence


class Status(_Message):
    """Client: it lives. A larger `progress` than before keeps the server patient."""

    type: Literal["status"] = "status"
    text: _Sentence
    progress: _Size


class Offer(_Message):
    """Server: the run that a client may take part in."""

    type: Literal["offer"] = "offer"
    run: _Run
    experiment_hash: _Word
    facts: dict[str, Any]


class Accepted(_Message):
    """Server: the client takes part; `session` goes with each fetch and submit."""

    type: Literal["accepted"] = "accepted"
    session: _Id


class TaskNotice(_Message):
    """Server: a message waits to be fetched and answered."""

    type: Literal["task"] = "task"
    id: _Id
    kind: _Word
    group: _Word
    header: dict[str, Any]
    nbytes: _Size
    checksum: _Id


class Cancel(_Message):
    """Server: an answer is not wanted any more."""

    type: Literal["cancel"] = "cancel"
    id: _Id


class Beat(_Message):
    """Server: it lives."""

    type: Literal["beat"] = "beat"


class Refused(_Message):
    """Server: the client cannot take part; trying again helps unless it is final."""

    type: Literal["refused"] = "refused"
    reason: _Sentence
    final: bool


class Farewell(_Message):
    """Server: it goes, and says whether it will be back."""

    type: Literal["farewell"] = "farewell"
    reason: _Sentence
    back: bool


class Wanted(_Message):
    """Client: the bytes of a task from `offset` on."""

    session: _Id
    task: _Id
    offset: _Size


class SubmitHead(_Message):
    """Client: the answer to a task, whose bytes follow."""

    session: _Id
    task: _Id
    header: dict[str, Any]
    nbytes: _Size
    checksum: _Id


class Ack(_Message):
    """Server: what became of an answer. `already`: it had come before; `late`: it is not wanted any more."""

    verdict: Literal["accepted", "already", "late", "refused"]
    reason: _Sentence = ""


ClientMessage = Hello | Ready | Decline | Status
ServerMessage = Offer | Accepted | TaskNotice | Cancel | Beat | Refused | Farewell

_M = TypeVar("_M")
_FROM_CLIENT: TypeAdapter[ClientMessage] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])
_FROM_SERVER: TypeAdapter[ServerMessage] = TypeAdapter(Annotated[ServerMessage, Field(discriminator="type")])
_WANTED = TypeAdapter(Wanted)
_SUBMIT = TypeAdapter(SubmitHead)
_ACK = TypeAdapter(Ack)


def encode(message: BaseModel) -> bytes:
    """Write a message.

    Raises:
        LinkError: it is larger than the other end takes.
    """
    limit = _SMALL if isinstance(message, ClientMessage) else _LARGE
    data = json.dumps(message.model_dump()).encode()
    if len(data) > limit:
        what = f"a {type(message).__name__} message is too large"
        raise LinkError(what, got=f"{len(data)} bytes", expected=f"at most {limit}")
    return data


def read_client(data: bytes) -> ClientMessage:
    """Read what a client says in its session.

    Raises:
        LinkError: it is no message, or too large; so for all that read.
    """
    return _read(data, _FROM_CLIENT, _SMALL)


def read_server(data: bytes) -> ServerMessage:
    """Read what a server says in its session."""
    return _read(data, _FROM_SERVER, _LARGE)


def read_ack(data: bytes) -> Ack:
    """Read what became of an answer."""
    return _read(data, _ACK, _SMALL)


def read_wanted(data: bytes) -> Wanted:
    """Read the request of a fetch."""
    return _read(data, _WANTED, _SMALL)


def read_submit(data: bytes) -> SubmitHead:
    """Read the head of an answer."""
    return _read(data, _SUBMIT, _LARGE)


def read_json(data: bytes, limit: int) -> Any:
    """Read JSON from a peer: capped in size and depth, without names that come twice.

    Raises:
        LinkError: it is too large or too deep, or no such JSON.
    """
    if len(data) > limit:
        raise LinkError("a message is too large", got=f"{len(data)} bytes", expected=f"at most {limit}")
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise LinkError("a message is no JSON", got=str(error)) from error
    inside = [value]
    for _ in range(_DEEPEST):
        inside = [child for one in inside for child in _children(one)]
        if not inside:
            return value
    raise LinkError("a message is nested too deep", expected=f"at most {_DEEPEST} levels")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _read(data: bytes, adapter: TypeAdapter[_M], limit: int) -> _M:
    try:
        return adapter.validate_python(read_json(data, limit))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LinkError("a message is wrong", got=f"{shorten(place)}: {shorten(first['msg'])}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found
