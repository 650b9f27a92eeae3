"""Files that are either the old ones or the whole new ones, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write", "put_in_place", "sha256_of"]

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # of file systems that have none


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file all or nothing; of several writers at once, each writes the whole of it.

    Args:
        path: the file; its folder must exist.
        write: is given the open temporary file beside it.

    Raises:
        OSError: from the file system; the old file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _opened_alone(temporary) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            put_in_place(temporary, path)
        except BaseException:
            if _is_at(file, temporary):  # else it has its name, and what is there is another writer's
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _opened_alone(path: Path) -> Iterator[BinaryIO]:
    """Open a file, emptied of what a kill may have left, while no other thread or process has it open in this way."""
    while True:
        with open(path, "wb", opener=_without_emptying) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if _is_at(file, path):  # it is not, where another writer had the lock and has given the file its name
                file.truncate()
                try:
                    yield file
                finally:  # a child that was forked meanwhile has the file open, too, and the lock with it
                    with contextlib.suppress(OSError):
                        fcntl.flock(file, fcntl.LOCK_UN)
                return


def _without_emptying(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def put_in_place(finished: Path, target: Path) -> None:
    """Give a finished, synced file its name, durably."""
    finished.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
