"""A message on the wire: a small JSON header, and the raw bytes of its tensors in order.

Nothing is pickled and no tensor is copied as a whole. The checksum is Poly1305 under a fixed key: 128 bits
against damage, at a twentieth of the price of SHA-256 where a processor has no instructions for that. Who sent the
bytes is for TLS to say.
"""

from __future__ import annotations

import functools
import mmap
import tempfile
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from cryptography.hazmat.primitives.poly1305 import Poly1305
from flwr.app import ArrayRecord, Error
from torch import Tensor

from fedtrain import flower
from fedtrain.errors import LinkError
from fedtrain.link.headers import Content, Plan, error_header, padded, records_header

__all__ = ["CHUNK", "Claim", "Packed", "Payload", "Receiver", "Sum", "pack", "unpack"]

CHUNK = 1 << 18
"""Bytes that travel at once: more gains little, and on a slow line each is a sign of progress."""

_IN_MEMORY = 1 << 20  # smaller payloads are not worth a file
_SUM_KEY = b"fedtrain finds damage; no secret"


class Sum:
    """The checksum of bytes that come in pieces."""

    def __init__(self) -> None:
        self._state = Poly1305(_SUM_KEY)

    def update(self, data: bytes | memoryview) -> None:
        """Take in the next bytes."""
        self._state.update(data)

    def hex(self) -> str:
        """The sum of all bytes, as 32 digits; ends the sum."""
        return self._state.finalize().hex()


class Payload:
    """The bytes of some tensors, one after the other, each at a multiple of 64 bytes.

    Args:
        parts: flat views of bytes that nobody writes to any more.
    """

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = parts
        self.nbytes = sum(padded(len(part)) for part in parts)

    @functools.cached_property
    def checksum(self) -> str:
        """Computed when first asked for."""
        total = Sum()
        for piece in self._pieces(0):
            for start in range(0, len(piece), CHUNK):  # holds the interpreter's lock for a moment only
                total.update(piece[start : start + CHUNK])
        return total.hex()

    def chunks(self, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `offset` on, `CHUNK` at a time."""
        waiting: list[memoryview] = []
        size = 0
        for piece in self._pieces(offset):
            start = 0
            while start < len(piece):
                taken = piece[start : start + CHUNK - size]
                waiting.append(taken)
                start += len(taken)
                size += len(taken)
                if size == CHUNK:
                    yield b"".join(waiting)
                    waiting, size = [], 0
        if size:
            yield b"".join(waiting)

    def _pieces(self, offset: int) -> Iterator[memoryview]:
        padding = memoryview(bytes(padded(1)))
        for part in self._parts:
            for piece in (part, padding[: padded(len(part)) - len(part)]):
                if offset < len(piece):
                    yield piece[offset:]
                offset = max(0, offset - len(piece))


@dataclass(frozen=True)
class Packed:
    """A message ready to travel, or to wait on disk: see `spool`.

    Attributes:
        header: what JSON can hold: the records, and an index of the arrays.
        payload: the arrays' bytes; messages that share their arrays share it.
    """

    header: dict[str, Any]
    payload: Payload

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self.payload.nbytes

    @property
    def checksum(self) -> str:
        """Of the payload; computed when first asked for."""
        return self.payload.checksum


def pack(content: Content, known: MutableMapping[tuple[int, ...], Payload] | None = None) -> Packed:
    """Prepare records, or an error, to travel; the tensors are not copied.

    Args:
        content: what to send.
        known: payloads made so far, by the identity of their array records; lets messages share them.

    Raises:
        LinkError: too much for a header, or a dtype that does not travel.
    """
    if isinstance(content, Error):
        return Packed(error_header(content), Payload([]))
    known = {} if known is None else known
    header = records_header(content)
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    identity = tuple(map(id, records))
    if identity not in known:
        known[identity] = Payload([_bytes_of(t) for record in records for t in flower.tensors(record).values()])
    return Packed(header, known[identity])


class Claim(Protocol):
    """What a peer says that it will send."""

    @property
    def header(self) -> dict[str, Any]:
        """Parsed JSON, unchecked."""

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""

    @property
    def checksum(self) -> str:
        """Of the payload."""


def unpack(claim: Claim, limit: int, folder: Path | None = None) -> Receiver:
    """Check a header wholly, and only then make room for its payload.

    Args:
        claim: header, length and checksum as the peer gave them.
        limit: most bytes of the payload.
        folder: where an unlinked file holds a large payload; None keeps it in memory.

    Raises:
        LinkError: the header is wrong, or the payload too large.
        OSError: the file cannot be made.
    """
    if claim.nbytes > limit:
        raise LinkError("a message is too large", got=f"{claim.nbytes} bytes", expected=f"at most {limit}")
    plan = Plan(claim.header)
    if plan.nbytes != claim.nbytes:
        raise LinkError("a message's length is not that of its arrays", got=claim.nbytes, expected=str(plan.nbytes))
    return Receiver(plan, claim.checksum, folder if claim.nbytes > _IN_MEMORY else None)


class Receiver:
    """Takes a payload chunk by chunk, straight to where it stays; made by `unpack`."""

    def __init__(self, plan: Plan, checksum: str, folder: Path | None) -> None:
        self._plan, self._expected, self._sum = plan, checksum, Sum()
        self.received = 0
        self._file = tempfile.TemporaryFile(dir=folder) if folder else None  # noqa: SIM115 - closed by `close`
        self._memory = torch.empty(0 if folder else plan.nbytes, dtype=torch.uint8)
        self._view = _bytes_of(self._memory)

    def write(self, chunk: bytes) -> None:
        """Take the next bytes, at least one.

        Raises:
            LinkError: there are too many, or none.
            OSError: the file cannot take them.
        """
        end = self.received + len(chunk)
        if not chunk or end > self._plan.nbytes:
            raise LinkError("a chunk is empty, or more than was declared", got=end, expected=str(self._plan.nbytes))
        if self._file:
            self._file.write(chunk)
        else:
            self._view[self.received : end] = chunk
        self._sum.update(chunk)
        self.received = end

    def finish(self) -> Content:
        """Give what was received: tensors are views of the memory, or of the mapped file.

        Raises:
            LinkError: bytes are missing or damaged.
            OSError: the file cannot be written or mapped.
        """
        if self.received != self._plan.nbytes:
            raise LinkError("a message is cut off", got=self.received, expected=f"{self._plan.nbytes} bytes")
        if self._sum.hex() != self._expected:
            raise LinkError("a message is damaged: its checksum does not match")
        if self._file:
            self._file.flush()
            mapped = mmap.mmap(self._file.fileno(), self._plan.nbytes)
            self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self.close()
        return self._plan.content(self._memory)

    def close(self) -> None:
        """Let go of the file; what was finished stays mapped."""
        if self._file:
            self._file.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
