"""Forks processes that run fedtrain's commands, stopped or killed at named points: python deployment.py FOLDER

Importing torch takes seconds and forking takes milliseconds. Each line on standard input, as JSON, starts one process
of its name; its pid is printed. In FOLDER lie its output (NAME.log), the points that it came by (NAME.points), files
for the points at which it is held (NAME.POINT.go lets it go on), and at its end the exit code (NAME.exit).
"""

# ruff: noqa: E402 - the heartbeat is set before other modules take it as a default
import ctypes
import errno
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import opacus.grad_sample  # noqa: F401
import sklearn.datasets  # noqa: F401 - so that no process has to
from opacus.accountants.analysis import rdp  # noqa: F401

import fedtrain.link.transport

fedtrain.link.transport.HEARTBEAT = 1.0  # before the defaults are taken from it: what hangs is noticed sooner

import fedtrain.deployment.session as session
import fedtrain.link.channel as channel
import fedtrain.report.html
import fedtrain.simulations.run
from fedtrain.cli import main
from fedtrain.cli.server import serve_experiment  # noqa: F401 - so that no process has to
from fedtrain.deployment.outbox import Outbox
from fedtrain.link.board import Board
from fedtrain.link.transfers import Transfers
from fedtrain.rundir import RunFolder
from fedtrain.server.rounds import Server

_NO_MOUNT = 77  # exit code
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_NEW_NAMESPACE, _PRIVATE = 0x20000, 0x44000  # CLONE_NEWNS; MS_REC | MS_PRIVATE
_READ_ONLY, _REMOUNT, _BIND = 1, 32, 4096


class Points:
    """What happens where: {"POINT NUMBER": "die", "hold" or an error's name}; all that is passed is written down."""

    def __init__(self, stem: Path, plan: dict[str, str]) -> None:
        self._stem, self._plan = stem, plan
        self._counts: dict[str, int] = {}

    def reach(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        point = f"{name} {self._counts[name]}"
        with self._stem.with_suffix(".points").open("a") as file:
            file.write(f"{point}\n")
        match self._plan.get(point):
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hold":
                while not self._stem.with_suffix(f".{point}.go").exists():
                    time.sleep(0.01)
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "read-only":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def before(self, owner: Any, method: str, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, method)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.reach(name)
            return real(*arguments, **named)

        setattr(owner, method, wrapped)

    def after(self, owner: Any, method: str, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, method)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            result = real(*arguments, **named)
            self.reach(name)
            return result

        setattr(owner, method, wrapped)

    def each(self, owner: Any, method: str, name: str) -> None:
        """Before each thing that an iterator yields: NAME CALL THING."""
        real: Callable[..., Iterator[Any]] = getattr(owner, method)
        calls = itertools.count(1)

        def wrapped(*arguments: Any) -> Iterator[Any]:
            call = next(calls)
            for item in real(*arguments):
                self.reach(f"{name} {call}")
                yield item

        setattr(owner, method, wrapped)

    def checkpoints(self) -> None:
        """Between the writing of a checkpoint and its renaming."""
        real = Path.replace

        def wrapped(path: Path, target: Path) -> Path:
            if target.parent.name == "checkpoints":
                self.reach("checkpoint")
            return real(path, target)

        Path.replace = wrapped  # type: ignore[assignment,method-assign]

    def install(self) -> None:
        fedtrain.report.html.write_report = lambda _, path: path  # a second for each run, and no part of it
        # The server's.
        self.before(Server, "_record_untrained", "begin")
        self.each(Transfers, "fetch", "fetched")
        self.after(Board, "answer", "took")
        self.each(Server, "_noted", "added")
        self.checkpoints()
        self.before(RunFolder, "write_model", "model")
        # A client's.
        self.before(session, "answer", "asked")
        self.after(session.Client, "_stepped", "step")
        self.before(Outbox, "keep", "keep")
        self.after(Outbox, "keep", "kept")
        self.each(channel, "_parts", "part")
        self.after(channel.Link, "submit", "acknowledged")


def run(stem: Path, wanted: dict[str, Any]) -> None:
    """Be the process."""
    log = os.open(stem.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if limit := wanted["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if folder := wanted["read_only"]:
        mount_read_only(folder)
    Points(stem, wanted["points"]).install()
    os.chdir(stem.parent)
    sys.argv = ["fedtrain", *wanted["arguments"]]
    main()


def mount_read_only(folder: str) -> None:
    """Make a folder read-only for this process, root or not."""
    libc, place = ctypes.CDLL(None, use_errno=True), folder.encode()
    steps: list[Callable[[], int]] = [
        lambda: libc.unshare(_NEW_NAMESPACE),
        lambda: libc.mount(b"none", b"/", None, _PRIVATE, None),
        lambda: libc.mount(place, place, None, _BIND, None),
        lambda: libc.mount(b"none", place, None, _BIND | _REMOUNT | _READ_ONLY, None),
    ]
    for step in steps:
        if step():
            print(f"no mount: {os.strerror(ctypes.get_errno())}")
            raise SystemExit(_NO_MOUNT)


def keep(stem: Path, wanted: dict[str, Any]) -> None:
    """Start the process, wait for its end, and write down how it ended."""
    pid = fork(lambda: run(stem, wanted))
    print(pid, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    draft = stem.with_suffix(".draft")
    draft.write_text(str(code))
    draft.replace(stem.with_suffix(".exit"))


def fork(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    code = 1
    try:
        body()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    print("ready", flush=True)
    while line := sys.stdin.readline():
        asked = json.loads(line)
        place = Path(sys.argv[1]) / asked["name"]
        fork(lambda: keep(place, asked))  # noqa: B023 - called at once
