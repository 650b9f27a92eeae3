"""The header of a message: what JSON can hold, checked wholly before memory is taken."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from torch import Tensor

from fedtrain import flower
from fedtrain.errors import LinkError, shorten

__all__ = ["HEADER_LIMIT", "Content", "Plan", "error_header", "padded", "records_header"]

HEADER_LIMIT = 1 << 20
"""Bytes of a header as JSON."""

Content = RecordDict | Error
"""What a message carries: records, or why there are none."""

_ALIGNMENT = 64
_MOST_ARRAYS = 20_000
_MOST_DIMENSIONS = 16
_LONGEST_NAME = 512
_LONGEST_REASON = 10_000
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_FLOATS, *_INTEGERS)}


def error_header(error: Error) -> dict[str, Any]:
    """Write an error, its reason cut where it is too long."""
    return {"error": {"code": error.code, "reason": error.reason and error.reason[:_LONGEST_REASON]}}


def records_header(content: RecordDict) -> dict[str, Any]:
    """Write records, of arrays only the index.

    Raises:
        LinkError: too much for a header, or a dtype that does not travel.
    """
    records: dict[str, Any] = {}
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            params = flower.tensors(record)
            records[key] = {"arrays": [[name, _dtype_name(t), list(t.shape)] for name, t in params.items()]}
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            records[key] = {kind: {name: _told(value) for name, value in record.items()}}
    header = {"records": records}
    if (size := len(json.dumps(header))) > HEADER_LIMIT:
        raise LinkError("a message has too much beside its arrays", got=f"{size} bytes", expected=f"{HEADER_LIMIT}")
    return header


def padded(size: int) -> int:
    """Bytes that an array takes in the payload: each begins at a multiple of 64."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class _Slot:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Plan:
    """A checked header: what the message will be once its payload is there.

    Args:
        header: parsed JSON of a peer.

    Attributes:
        nbytes: of the payload.

    Raises:
        LinkError: the header is wrong in any way.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self.nbytes = 0
        self._count = 0
        self._error: Error | None = None
        self._records: dict[str, list[_Slot] | MetricRecord | ConfigRecord] = {}
        match header:
            case {"error": {"code": int(code), "reason": str() | None as reason, **more}, **rest} if type(
                code
            ) is int and not (more or rest):
                self._error = Error(code, None if reason is None else _text(reason, _LONGEST_REASON))
            case {"records": dict(records), **rest} if not rest:
                for key, record in records.items():
                    self._records[_text(key)] = self._record(record)
            case _:
                raise LinkError("a header is wrong", got=header, expected="records or an error")

    def content(self, memory: Tensor) -> Content:
        """Put records together around the payload."""
        if self._error:
            return self._error
        content = RecordDict()
        for key, record in self._records.items():
            if isinstance(record, list):
                content[key] = flower.array_record({slot.name: _view(memory, slot) for slot in record})
            else:
                content[key] = record
        return content

    def _record(self, record: object) -> list[_Slot] | MetricRecord | ConfigRecord:
        match record:
            case {"arrays": list(entries), **rest} if not rest:
                slots = [self._slot(entry) for entry in entries]
                if len({slot.name for slot in slots}) < len(slots):
                    raise LinkError("a header names an array twice")
                return slots
            case {"metrics": dict(values), **rest} if not rest:
                kind: type[MetricRecord] | type[ConfigRecord] = MetricRecord
            case {"config": dict(values), **rest} if not rest:
                kind = ConfigRecord
            case _:
                raise LinkError("a record is wrong", got=record, expected="arrays, metrics or config")
        try:
            return kind({_text(name): _meant(value) for name, value in values.items()})
        except TypeError as error:  # flwr's own check of the values
            raise LinkError("a record is wrong", got=error) from error

    def _slot(self, entry: object) -> _Slot:
        match entry:
            case [str(name), str(dtype), list(shape)] if dtype in _DTYPES:
                pass
            case _:
                raise LinkError("an array's entry is wrong", got=entry, expected="name, dtype and shape")
        self._count += 1
        if self._count > _MOST_ARRAYS:
            raise LinkError("a header has too many arrays", expected=f"at most {_MOST_ARRAYS}")
        fits = len(shape) <= _MOST_DIMENSIONS and all(type(d) is int and d >= 0 for d in shape)
        if not fits or math.prod(max(d, 1) for d in shape) >= 1 << 60:  # beyond that torch's own sizes overflow
            raise LinkError(f"the shape of {shorten(name)} is wrong", got=shape)
        size = math.prod(shape) * _DTYPES[dtype].itemsize
        slot = _Slot(_text(name), _DTYPES[dtype], tuple(shape), self.nbytes, size)
        self.nbytes += padded(size)
        return slot


def _view(memory: Tensor, slot: _Slot) -> Tensor:
    data = memory[slot.start : slot.start + slot.nbytes]
    if slot.dtype is torch.bool and bool((data > 1).any()):
        raise LinkError(f"{shorten(slot.name)} holds what is neither true nor false")
    return data.view(slot.dtype).view(slot.shape)


def _dtype_name(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise LinkError("arrays of this dtype do not travel", got=name, expected=", ".join(_DTYPES))
    return name


def _told(value: object) -> object:
    """A record's value as JSON; only bytes need another form."""
    if isinstance(value, list):
        return [_told(item) for item in value]
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _meant(value: object) -> Any:
    match value:
        case list(items):
            return [_scalar(item) for item in items]
        case _:
            return _scalar(value)


def _scalar(value: object) -> object:
    match value:
        case bool() | int() | float():
            return value
        case str(text):
            return _text(text, HEADER_LIMIT)
        case {"bytes": str(text), **rest} if not rest:
            try:
                return base64.b64decode(text, validate=True)
            except ValueError as error:
                raise LinkError("a value is wrong", got=text, expected="base64") from error
        case _:
            raise LinkError("a value is wrong", got=value, expected="a number, a text, bytes, or a list of those")


def _text(text: str, limit: int = _LONGEST_NAME) -> str:
    if len(text) > limit or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise LinkError("a text is wrong", got=text, expected=f"at most {limit} characters of Unicode")
    return text
