"""Numbers for Prometheus, on this machine alone and read-only: how a run goes on, and who takes part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedtrain.errors import InputError, MissingExtraError
from fedtrain.link.roster import Member
from fedtrain.records import RoundRecord
from fedtrain.server.observer import Observer

__all__ = ["Metrics"]

_HOST = "127.0.0.1"


class Metrics:
    """An observer that counts what it is told, and tells another.

    What it counts begins with this process.

    Args:
        observer: is told everything.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._last: RoundRecord | None = None
        self._late = self._quarantined = 0

    def round_started(self, round_number: int, clients: int) -> None:
        """See `Observer`; so for the others."""
        self._observer.round_started(round_number, clients)

    def client_finished(self, round_number: int) -> None:
        self._observer.client_finished(round_number)

    def round_finished(self, record: RoundRecord) -> None:
        self._last = record
        self._late += len(record.late)
        self._quarantined += len(record.quarantined)
        self._observer.round_finished(record)

    def notice(self, text: str) -> None:
        self._observer.notice(text)

    @contextlib.contextmanager
    def serving(self, members: Callable[[], Sequence[Member]], port: int) -> Iterator[str]:
        """Answer Prometheus while the block runs.

        Args:
            members: tells who takes part, such as `Hub.members`.
            port: on loopback; 0 takes a free one.

        Yields:
            The URL.

        Raises:
            MissingExtraError: prometheus-client is not installed.
            InputError: the port is taken.
        """
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise MissingExtraError("prometheus_client", "metrics", "--metrics") from error
        registry = CollectorRegistry()
        registry.register(_Collector(lambda: self._families(members())))
        try:
            server, thread = start_http_server(port, _HOST, registry)
        except (OSError, OverflowError) as error:
            raise InputError(
                "metrics cannot be served there", got=f"{_HOST}:{port}", expected="a port that no other process uses"
            ) from error
        try:
            yield f"http://{_HOST}:{server.server_port}/metrics"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _families(self, members: Sequence[Member]) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        here = sum(member.connected for member in members)
        yield GaugeMetricFamily("fedtrain_clients_connected", "Clients that take part now.", here)
        if last := self._last:
            seconds = last.seconds_train + last.seconds_evaluate
            yield GaugeMetricFamily("fedtrain_round", "Last round that was finished.", last.round_number)
            yield GaugeMetricFamily("fedtrain_round_seconds", "How long the last round took.", seconds)
        yield CounterMetricFamily("fedtrain_updates_late", "Clients asked and not waited for.", self._late)
        yield CounterMetricFamily("fedtrain_updates_quarantined", "Updates that were not used.", self._quarantined)
        up = CounterMetricFamily("fedtrain_client_bytes_up", "Payload from a client.", labels=["client"])
        down = CounterMetricFamily("fedtrain_client_bytes_down", "Payload to a client.", labels=["client"])
        for member in members:
            up.add_metric([member.name], member.bytes_up)
            down.add_metric([member.name], member.bytes_down)
        yield up
        yield down


class _Collector:
    """What a registry asks at each request."""

    def __init__(self, collect: Callable[[], Iterator[Any]]) -> None:
        self.collect = collect

    def describe(self) -> list[Any]:
        """Nothing beforehand, so that registering does not ask."""
        return []
