"""What the library warns of, as notices of a server's run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from fedtrain.cli.progress import RunObserver

__all__ = ["Sparing", "logged"]

_MOST, _SECONDS = 20, 60.0


class Sparing(logging.Filter):
    """Lets at most 20 lines of a kind through in a minute: peers cause them, and could fill a disk.

    A kind is what was written in the code, before names are filled in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[str, tuple[float, int]] = {}  # kind -> when its minute began, lines since

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now = str(record.msg), time.monotonic()
        began, count = self._kinds.get(kind, (now, 0))
        if now - began >= _SECONDS:
            began, left_out = now, max(0, count - _MOST)
            count = 0
            if left_out:
                record.msg, record.args = f"{record.getMessage()} ({left_out:,} more such lines were left out)", None
        self._kinds[kind] = began, count + 1
        if count == _MOST - 1:
            record.msg, record.args = f"{record.getMessage()} (more such lines are left out for a minute)", None
        return count < _MOST


@contextlib.contextmanager
def logged(observer: RunObserver) -> Iterator[None]:
    """Show what the library warns of: who is refused, and why."""

    class Notices(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            observer.notice(self.format(record))

    logger, handler = logging.getLogger("fedtrain"), Notices(logging.WARNING)
    handler.addFilter(Sparing())
    logger.addHandler(handler)
    logger.propagate = False  # libraries set up the root logger, and it would be told twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
