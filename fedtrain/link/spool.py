"""A finished message on disk: kept until the other end has it."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import BinaryIO

from fedtrain.disk import atomic_write
from fedtrain.errors import LinkError
from fedtrain.link.control import read_json
from fedtrain.link.frames import Packed, Payload
from fedtrain.link.headers import HEADER_LIMIT

__all__ = ["load", "save"]

_MAGIC = b"fedtrain message 1\n"
_START = len(_MAGIC) + 32 + 8  # digest of the head, length of the head


def save(packed: Packed, path: Path) -> None:
    """Write a message all or nothing.

    Args:
        packed: what to keep.
        path: the file; its folder must exist.

    Raises:
        OSError: from the file system.
    """
    head = json.dumps({"header": packed.header, "nbytes": packed.nbytes, "checksum": packed.checksum}).encode()

    def write(file: BinaryIO) -> None:
        file.write(_MAGIC + hashlib.sha256(head).digest() + len(head).to_bytes(8, "big") + head)
        file.writelines(packed.payload.chunks())

    atomic_write(path, write)


def load(path: Path) -> Packed:
    """Map a message that `save` wrote, and verify it.

    Raises:
        LinkError: the file is not whole.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_START)
        length = int.from_bytes(start[-8:], "big")
        if len(start) < _START or not start.startswith(_MAGIC) or length > 2 * HEADER_LIMIT:
            raise LinkError("a kept message is damaged", got=path.name)
        head = file.read(length)
        if hashlib.sha256(head).digest() != start[len(_MAGIC) : -8]:
            raise LinkError("a kept message is damaged", got=path.name)
        content = read_json(head, 2 * HEADER_LIMIT)
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[_START + length :]
    packed = Packed(content["header"], Payload([mapped]))
    if len(mapped) != content["nbytes"] or packed.checksum != content["checksum"]:
        raise LinkError("a kept message is damaged", got=path.name)
    return packed
