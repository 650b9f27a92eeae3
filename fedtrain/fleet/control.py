"""A SuperLink's Control API: submit a run, read its log, learn how it ended, stop it. It asks nobody who they are."""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import httpx
import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest, StreamLogsRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

import fedtrain
from fedtrain.errors import InputError, RunError

__all__ = ["Control", "Outcome", "stub_fab"]

_TRIES = 5  # in a row, a second apart, before a SuperLink counts as gone


class Outcome(NamedTuple):
    """How a run ended."""

    status: str  # "completed", "failed" or "stopped"; "" while it goes on
    details: str


def stub_fab(config: Mapping[str, bool | float | str]) -> bytes:
    """Build a FAB that holds a run's config and points at our apps, which are installed on each machine.

    Args:
        config: of the run.
    """
    components = {"serverapp": "fedtrain.fleet.server_app:app", "clientapp": "fedtrain.fleet.client_app:app"}
    app = {"publisher": "fedtrain", "components": components, "config": dict(config)}
    project = {"name": "fedtrain", "version": fedtrain.__version__, "license": "Apache-2.0"}
    files = {"pyproject.toml": tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}).encode()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # flwr's own, of a library that it uses
        content, _ = build_fab_from_files(files)
    return content


class Control:
    """A client of the Control API; close it, or use it as a context manager.

    Args:
        address: HOST:PORT of the SuperLink.
        authority: certificate of the authority that signed the SuperLink's, in PEM; None: those that the system trusts.
        plain: without TLS.
    """

    def __init__(self, address: str, authority: bytes | None, *, plain: bool) -> None:
        self._address = address
        self._client = ControlHttpClient.from_server_address(
            address, plain, authority, [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def is_up(self) -> bool:
        """Whether the SuperLink answers."""
        with contextlib.suppress(httpx.TransportError):
            self._client.ListRuns(ListRunsRequest(limit=1))
            return True
        return False

    def start(self, config: Mapping[str, bool | float | str]) -> int:
        """Submit a run and return its id.

        Raises:
            InputError: nobody answers at this address.
            RunError: the SuperLink refuses.
        """
        fab = stub_fab(config)
        request = StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})))
        try:
            run_id = self._client.StartRun(request).run_id
        except httpx.TransportError as error:
            raise InputError("no SuperLink answers", got=f"{self._address}: {error}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise RunError("the SuperLink does not take the run", got=error) from error
        if not run_id:
            raise RunError("the SuperLink does not take the run", hint="Its own log says why")
        return run_id

    def log(self, run_id: int) -> Iterator[str]:
        """Yield the log of a run, in pieces cut anywhere, until the run ends.

        Raises:
            RunError: the SuperLink is gone.
        """
        latest, tries = 0.0, _TRIES
        while tries:
            try:
                for piece in self._client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=latest)):
                    latest, tries = max(latest, piece.latest_timestamp), _TRIES
                    yield piece.log_output
                return
            except httpx.HTTPError:
                tries -= 1
                time.sleep(1)
        raise self._gone()

    def outcome(self, run_id: int) -> Outcome:
        """Tell how a run ended.

        Raises:
            RunError: the SuperLink is gone.
        """
        try:
            status = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
        except httpx.HTTPError as error:
            raise self._gone() from error
        return Outcome(status.sub_status, status.details)

    def stop(self, run_id: int) -> None:
        """End a run; it does not matter if it has ended."""
        with contextlib.suppress(httpx.HTTPError):
            self._client.StopRun(StopRunRequest(run_id=run_id))

    def _gone(self) -> RunError:
        return RunError(
            "the SuperLink does not answer any more",
            got=self._address,
            hint="When it is there again, the same command goes on with the run",
        )
