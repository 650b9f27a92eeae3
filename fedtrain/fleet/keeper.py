"""Runs a command and ends with it, and ends it and all that it started when its own parent dies or says so (SIGTERM).

flwr's commands start others in sessions of their own, which outlive them by seconds; on Linux they come to this process
when their parents end. Run: python -m fedtrain.fleet.keeper PARENT COMMAND ARGUMENTS...
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["keep"]

_GRACE_SECONDS = 3.0  # for processes to end by themselves
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class _Stop(BaseException):
    """SIGTERM has come."""


def keep(parent: int, command: list[str]) -> int:
    """Run a command to its end.

    Args:
        parent: process id; when it dies, so does the command.
        command: what to run.

    Returns:
        Its exit code; 1 if it was ended.
    """
    signal.signal(signal.SIGTERM, _stop)
    if sys.platform == "linux":
        system = ctypes.CDLL(None)
        system.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        system.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        if os.getppid() != parent:  # it died before it could be watched
            return 1
        return subprocess.Popen(command).wait()  # noqa: S603 - given by who starts this process
    except _Stop:
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_all()


def _end_all() -> None:
    """End what the command has started, and what that has."""
    end = time.monotonic() + _GRACE_SECONDS
    _signal_all(signal.SIGTERM)
    while _some_are_left():
        if time.monotonic() > end:
            _signal_all(signal.SIGKILL)
        time.sleep(0.02)


def _some_are_left() -> bool:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False


def _signal_all(number: int) -> None:
    for process in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _descendants(process: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for child in map(int, children.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _stop(_signal: int, _frame: object) -> None:
    raise _Stop


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
