from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

import pytest

from fedtrain.cli.progress import RunObserver
from fedtrain.deployment.metrics import Metrics
from fedtrain.errors import InputError, MissingExtraError
from fedtrain.link.roster import Member
from fedtrain.records import RoundRecord


class Noting(RunObserver):
    def __init__(self) -> None:
        self.events: list[object] = []

    def round_started(self, round_number: int, clients: int) -> None:
        self.events.append((round_number, clients))

    def client_finished(self, round_number: int) -> None:
        self.events.append(round_number)

    def round_finished(self, record: RoundRecord) -> None:
        self.events.append(record)

    def notice(self, text: str) -> None:
        self.events.append(text)


def member(name: str, *, connected: bool = True, up: int = 0, down: int = 0) -> Member:
    return Member(name, connected, "", "", {}, 0.0, up, down)


def scraped(metrics: Metrics, members: Callable[[], Sequence[Member]]) -> dict[str, float]:
    with metrics.serving(members, 0) as url, urllib.request.urlopen(url, timeout=60) as answer:
        assert url.startswith("http://127.0.0.1:")
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_what_prometheus_reads() -> None:
    pytest.importorskip("prometheus_client")
    metrics = Metrics(RunObserver())
    metrics.round_finished(RoundRecord(round_number=1, late=["b"], quarantined={"c": "it holds NaN"}))
    metrics.round_finished(RoundRecord(round_number=2, late=["b", "c"], seconds_train=1.5, seconds_evaluate=0.25))
    assert scraped(metrics, lambda: [member("a", up=10, down=20), member('b"\n', connected=False)]) == {
        "fedtrain_clients_connected": 1,
        "fedtrain_round": 2,
        "fedtrain_round_seconds": 1.75,
        "fedtrain_updates_late_total": 3,
        "fedtrain_updates_quarantined_total": 1,
        'fedtrain_client_bytes_up_total{client="a"}': 10,
        'fedtrain_client_bytes_up_total{client="b\\"\\n"}': 0,
        'fedtrain_client_bytes_down_total{client="a"}': 20,
        'fedtrain_client_bytes_down_total{client="b\\"\\n"}': 0,
    }


def test_before_the_first_round_there_is_none() -> None:
    pytest.importorskip("prometheus_client")
    assert scraped(Metrics(RunObserver()), list) == {
        "fedtrain_clients_connected": 0,
        "fedtrain_updates_late_total": 0,
        "fedtrain_updates_quarantined_total": 0,
    }


def test_it_is_read_only_and_its_port_its_own() -> None:
    pytest.importorskip("prometheus_client")
    with Metrics(RunObserver()).serving(list, 0) as url:
        with pytest.raises(urllib.error.HTTPError, match="405") as refused:
            urllib.request.urlopen(url, data=json.dumps({}).encode(), timeout=60)
        refused.value.close()
        port = int(url.removesuffix("/metrics").rpartition(":")[2])
        with pytest.raises(InputError, match=f"cannot be served there: got 127.0.0.1:{port}"):
            Metrics(RunObserver()).serving(list, port).__enter__()
    with Metrics(RunObserver()).serving(list, port):  # it is free again
        pass


def test_all_that_it_is_told_is_passed_on() -> None:
    noting = Noting()
    metrics, record = Metrics(noting), RoundRecord(round_number=1)
    metrics.round_started(1, 3)
    metrics.client_finished(1)
    metrics.round_finished(record)
    metrics.notice("so it is")
    assert noting.events == [(1, 3), 1, record, "so it is"]


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"--metrics needs .*fedtrain\[metrics\]"):
        Metrics(RunObserver()).serving(list, 0).__enter__()
