"""A Flower fleet of our own on loopback: a SuperLink and SuperNodes, as processes that do not outlive this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedtrain.errors import InputError, RunError

__all__ = ["LocalFleet", "node_config"]

_HOST = "127.0.0.1"
_START_SECONDS = 60.0
_END_SECONDS = 10.0  # in which a keeper ends what it keeps


class LocalFleet:
    """Starts the processes, and ends them with all that they started: close it, or use it as a context manager.

    Args:
        folder: for their homes and logs; made if missing.
        nodes: the config of each SuperNode.

    Raises:
        RunError: a process cannot be started.
    """

    def __init__(self, folder: Path, nodes: Sequence[Mapping[str, bool | float | str]]) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        port = str(_free_port())
        self.address = f"{_HOST}:{port}"
        """HOST:PORT of the SuperLink."""
        try:
            # Else flwr calls a package installer in each run.
            off = "--disable-runtime-dependency-installation"
            self._start("superlink", "flower-superlink", "--insecure", "--host", _HOST, "--port", port, off)
            for number, config in enumerate(nodes):
                where = ("--superlink", self.address, "--host", _HOST, "--port", str(_free_port()))
                self._start(
                    f"supernode-{number}",
                    "flower-supernode",
                    "--insecure",
                    *where,
                    "--node-config",
                    node_config(config),
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalFleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_until(self, is_up: Callable[[], bool]) -> None:
        """Wait for the SuperLink.

        Raises:
            RunError: a process died, or it takes too long.
        """
        end = time.monotonic() + _START_SECONDS
        while not is_up():
            self.check()
            if time.monotonic() > end:
                raise RunError(
                    f"the SuperLink has not started within {_START_SECONDS:g} s", got=self._end_of("superlink")
                )
            time.sleep(0.1)

    def check(self) -> None:
        """Make sure that all processes live.

        Raises:
            RunError: one has died.
        """
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RunError(f"the {name} died", got=self._end_of(name), hint=f"Its log: {self._log_of(name)}")

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, name: str, command: str, *arguments: str) -> None:
        scripts = Path(sys.executable).parent
        home = self._folder / name
        environment = {
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",  # where flwr looks for its own commands
            "FLWR_HOME": str(home.absolute()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds; 1 unless given
        }
        keeper = [sys.executable, "-m", "fedtrain.fleet.keeper", str(os.getpid())]
        try:
            home.mkdir(parents=True, exist_ok=True)
            with self._log_of(name).open("wb") as log:
                self._processes[name] = subprocess.Popen(  # noqa: S603 - flwr's commands, with arguments of ours
                    [*keeper, str(scripts / command), *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise RunError(f"the {name} cannot be started", got=error) from error

    def _log_of(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _end_of(self, name: str) -> str:
        lines = self._log_of(name).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "an empty log"


def node_config(config: Mapping[str, bool | float | str]) -> str:
    """Write what `flower-supernode --node-config` reads: TOML on one line, in which a text ends at the next quote.

    Raises:
        InputError: a text cannot be written so.
    """
    return " ".join(f"{key}={_quoted(value)}" for key, value in config.items())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _quoted(value: bool | float | str) -> str:
    if not isinstance(value, str):
        return str(value).lower()
    if "'" in value or not value.isprintable():
        raise InputError("flwr cannot be given this path", got=value, expected="printable characters without '")
    return f"'{value}'"
