"""A whole deployment on loopback: a server and its clients as processes, with certificates of an authority."""

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtrain.link.authority import Authority
from fedtrain.link.identity import adopt, pending_request

FORKER = Path(__file__).with_name("deployment.py")
CLIENTS = ("client-0", "client-1", "client-2")
PATIENCE = 60.0  # seconds until what is waited for counts as a failure
NO_MOUNT = 77  # exit code of deployment.py where it cannot make a disk read-only
SEGMENT, RETRANSMISSION = (
    1460,
    0.2,
)  # bytes of a TCP segment on a real line; Linux's least seconds until it is sent again

EXPERIMENT = """
seed = 3
rounds = 3
[task]
name = "logistic"
[data]
name = "digits"
clients = 3
central_test = 0.2
[training]
batch_size = 16
local_steps = 3
[run]
workers = 0
device = "cpu"
checkpoint_seconds = 0
"""


def until(happened: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait for what shows only in a file or in another process."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if result := happened():
            return result
        time.sleep(0.01)
    raise AssertionError(f"never: {what}")


class Process:
    """A process that was forked; see deployment.py for its files."""

    def __init__(self, stem: Path, pid: int) -> None:
        self.stem, self.pid = stem, pid
        self.name = stem.name.partition("-")[2]

    def said(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.stem.with_suffix(".log").read_text()
        return ""

    def points(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return self.stem.with_suffix(".points").read_text().splitlines()
        return []

    def code(self) -> int | None:
        path = self.stem.with_suffix(".exit")
        return int(path.read_text()) if path.exists() else None

    def says(self, text: str, times: int = 1) -> None:
        """Wait until it has said this."""
        with self._told():
            until(lambda: self.said().count(text) >= times or self._over(text, times), f"{self.stem.name}: {text}")

    def reaches(self, point: str) -> None:
        with self._told():
            until(lambda: point in self.points(), f"{self.stem.name} at {point}")

    def go_on(self, point: str) -> None:
        self.stem.with_suffix(f".{point}.go").touch()

    def ends(self, code: int) -> str:
        """Wait for its end, and give all that it said."""
        with self._told():
            until(lambda: self.code() is not None, f"the end of {self.stem.name}")
            if self.code() == NO_MOUNT:
                pytest.skip("this machine lets nobody mount a disk")
            assert self.code() == code
        return self.said()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> str:
        self.signal(signal.SIGKILL)
        return self.ends(-signal.SIGKILL)

    def _over(self, text: str, times: int) -> bool:
        assert self.code() is None or self.said().count(text) >= times, f"it has ended without {text!r}"
        return False

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.stem.name} said:\n{self.said()}\n{self.points()}") from None


class Forker:
    """Starts processes without importing torch again."""

    def __init__(self, folder: Path) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(FORKER.parents[2]),
            "GRPC_VERBOSITY": "INFO",  # a server sets it for itself before gRPC is imported, which is too late here
        }
        self.folder, self._count = folder, 0
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(FORKER), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if self._line() != "ready":
            self.close()
            raise AssertionError(f"{FORKER.name} has ended")

    def start(
        self, name: str, *arguments: object, file_size: int = 0, read_only: Path | None = None, **points: str
    ) -> Process:
        """Start a fedtrain command; a point is POINT_NUMBER="die", "hold", "full" or "read-only"."""
        self._count += 1
        name = f"{self._count}-{name}"
        plan = {" ".join(point.split("_")): action for point, action in points.items()}
        wanted = {"name": name, "arguments": list(map(str, arguments)), "points": plan, "file_size": file_size}
        wanted["read_only"] = str(read_only or "")
        assert self._process.stdin
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return Process(self.folder / name, int(self._line()))

    def close(self) -> None:
        self._process.communicate(timeout=30)  # closes its standard input; its children end with it

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


def free_address() -> str:
    """A port that is still free later: not one of those that the system gives to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return f"127.0.0.1:{port}"


def issue(authority: Authority, name: str, folder: Path) -> Path:
    """Make an identity of this name."""
    folder.mkdir(mode=0o700, parents=True)
    adopt(folder, authority.issue(pending_request(folder, name), name), authority.certificate)
    return folder


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


class Deployment:
    """One server at one address, and its clients.

    Args:
        forker: starts processes.
        folder: for what they write.
        reference: experiment and overrides -> digest of the model by `fedtrain simulate`.
    """

    def __init__(self, forker: Forker, folder: Path, reference: Callable[[str, tuple[str, ...]], str]) -> None:
        self.folder, self.address = folder, free_address()
        self.authority = Authority.init(folder / "ca")
        self.experiment = EXPERIMENT
        self.identities: dict[str, Path] = {}
        self._forker, self.reference = forker, reference
        self._running: list[Process] = []

    def server(self, *overrides: str, flags: tuple[object, ...] = (), out: str = "run", **points: Any) -> Process:
        """Serve the experiment; the same call again is the same command again."""
        file = self.folder / "experiment.toml"
        file.write_text(self.experiment)
        sets = [part for override in overrides for part in ("--set", override)]
        where = ("--out", self.folder / out, "--listen", self.address, "--ca", self.authority.folder)
        return self._start("server", "server", file, *where, *sets, *flags, **points)

    def client(
        self,
        name: str,
        address: str | None = None,
        identity: Path | None = None,
        flags: tuple[object, ...] = ("--once",),
        **points: Any,
    ) -> Process:
        """Start a client; by the same name again it is the same client, at the same place, again."""
        home = self.folder / "homes" / name
        where = ("--server", address or self.address, "--data", self.folder, "--home", home)
        who = ("--identity", identity or self.identity(name))
        return self._start(name, "client", *where, *who, *flags, **points)

    def clients(self, *but: str, **more: Any) -> list[Process]:
        return [self.client(name, **more) for name in CLIENTS if name not in but]

    def identity(self, name: str) -> Path:
        if name not in self.identities:
            self.identities[name] = issue(self.authority, name, self.folder / "identities" / name)
        return self.identities[name]

    def ends_well(self, server: Process, *overrides: str, out: str = "run") -> str:
        """Wait for the end of a run, and see that nothing has changed a byte of its model."""
        said = server.ends(0)
        assert self.digest(out) == self.reference(self.experiment, overrides)
        return said

    def digest(self, out: str = "run") -> str:
        return digest(self.folder / out)

    def rounds(self, out: str = "run") -> list[dict[str, Any]]:
        """The records of the rounds, but for the untrained model."""
        lines = (self.folder / out / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines][1:]

    def close(self) -> None:
        for process in self._running:
            if process.code() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.signal(signal.SIGKILL)
                until(lambda: process.code() is not None, "its end")  # noqa: B023 - called at once

    def _start(self, name: str, *arguments: object, **points: Any) -> Process:
        process = self._forker.start(name, *arguments, **points)
        self._running.append(process)
        return process


class Proxy:
    """Forwards TCP between clients and a server, as badly as a test wants.

    Args:
        target: "host:port" of the server.
    """

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")[::2]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: dict[str, int] = {}  # "up" or "down" -> bytes, once
        self.rate = 0  # bytes a second in each direction; 0 is no limit
        self.loss = 0.0  # share of segments that are lost: TCP sends them again after a while, and in order
        self.passed = {"up": 0, "down": 0}
        self.connections = self.losses = 0
        self._chance = random.Random(1)
        self._sockets: list[socket.socket] = []
        self._deaf: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def drop(self) -> None:
        """Reset every connection."""
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def deafen(self) -> None:
        """Make the connections that there are half-open: they take bytes and forward none."""
        self._deaf += self._sockets

    def close(self) -> None:
        self._sockets.append(self._listener)
        self.drop()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection((self._target[0], int(self._target[1])))
                except OSError:
                    client.close()
                    continue
                self.connections += 1
                self._sockets += [client, server]
                for source, target, way in ((client, server, "up"), (server, client, "down")):
                    threading.Thread(target=self._forward, args=(source, target, way), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, way: str) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(self.rate // 20 or 1 << 16):
                if source in self._deaf:
                    continue
                passed += len(data)
                if passed > self.cut_after.get(way, 1 << 60):
                    del self.cut_after[way]
                    break
                if self.loss:
                    time.sleep(RETRANSMISSION * self._lost(len(data)))
                target.sendall(data)
                self.passed[way] += len(data)
                if self.rate:
                    time.sleep(len(data) / self.rate)
        for one in (source, target) if source not in self._deaf else ():
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _lost(self, size: int) -> int:
        lost = sum(self._chance.random() < self.loss for _ in range(-(-size // SEGMENT)))
        self.losses += lost
        return lost


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    forker = Forker(tmp_path_factory.mktemp("processes"))
    yield forker
    forker.close()


@pytest.fixture(scope="session")
def reference(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[str, ...]], str]:
    """Digests of the models by `fedtrain simulate`, each made once."""
    known: dict[tuple[str, tuple[str, ...]], str] = {}

    def find(experiment: str, overrides: tuple[str, ...]) -> str:
        if (experiment, overrides) not in known:
            folder = tmp_path_factory.mktemp("reference")
            (folder / "experiment.toml").write_text(experiment)
            sets = [part for override in overrides for part in ("--set", override)]
            place = ("--out", folder / "run")
            forker.start("simulate", "simulate", folder / "experiment.toml", *place, *sets).ends(0)
            known[experiment, overrides] = digest(folder / "run")
        return known[experiment, overrides]

    return find


@pytest.fixture
def deployment(forker: Forker, reference: Any, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment of which nothing runs yet."""
    deployment = Deployment(forker, tmp_path, reference)
    yield deployment
    deployment.close()


@pytest.fixture
def proxy(deployment: Deployment) -> Iterator[Proxy]:
    """A bad line to the server."""
    proxy = Proxy(deployment.address)
    yield proxy
    proxy.close()
