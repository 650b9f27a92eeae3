"""TLS handshakes that fail. gRPC tells nobody of them but its own log on standard error; here they are our warnings."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator

__all__ = ["watched"]

_LOG = logging.getLogger("fedtrain.link")

_STDERR = 2
_QUIET = 10.0  # seconds before the same reason is told again: somebody may try without end
_INFO = re.compile(rb"I\d{4} \d\d:\d\d:\d\d\.\d+ ")
_OF_THE_LEVEL = re.compile(rb"W\d{4} .*Log level INFO is not suitable")
_FAILED = re.compile(r"Handshake failed with error \S+ (?:error:\w+:SSL routines:OPENSSL_internal:)?(\w+)(?:: (.*))?")
_MEANING = {
    "WRONG_VERSION_NUMBER": "it speaks no TLS",
    "HTTP_REQUEST": "it speaks no TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
}


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Read what this process writes to standard error, take out what gRPC logs at level INFO, and pass on the rest.

    To be entered before gRPC is first used, which reads its level from the environment once.
    """
    os.environ["GRPC_VERBOSITY"] = "INFO"
    real, (reading, writing) = os.dup(_STDERR), os.pipe()
    os.dup2(writing, _STDERR)
    os.close(writing)
    reasons: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    sorting = threading.Thread(target=_sort, args=(reading, real, reasons), name="fedtrain-stderr", daemon=True)
    warning = threading.Thread(target=_warn, args=(reasons,), name="fedtrain-handshakes", daemon=True)
    sorting.start()
    warning.start()
    try:
        yield
    finally:
        os.dup2(real, _STDERR)  # the pipe has no other end now, unless a child process holds it
        sorting.join(1.0)
        reasons.put(None)
        warning.join(1.0)  # what was read is told before the process may end


def _sort(reading: int, real: int, reasons: queue.SimpleQueue[str | None]) -> None:
    """Empty the pipe, and never wait for anybody who writes to it."""
    with open(reading, "rb", closefd=True) as lines:
        for line in lines:
            if not _INFO.match(line):
                if not _OF_THE_LEVEL.match(line):
                    os.write(real, line)
                continue
            if why := _reason(line.decode(errors="replace")):
                reasons.put(why)


def _warn(reasons: queue.SimpleQueue[str | None]) -> None:
    told: dict[str, float] = {}
    while (why := reasons.get()) is not None:
        if told.get(why, -_QUIET) + _QUIET <= time.monotonic():
            told[why] = time.monotonic()
            _LOG.warning("a connection is refused in its TLS handshake: %s", why)


def _reason(line: str) -> str | None:
    """What was wrong with a handshake; None if the line tells of something else."""
    if not (failed := _FAILED.search(line)):
        return None
    code, detail = failed.groups()
    if code == "CERTIFICATE_VERIFY_FAILED":
        return f"its certificate is not trusted: {detail}"
    return _MEANING.get(code, code)
