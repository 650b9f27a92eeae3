"""Lines between a server and its clients that fail in every way."""

import re
import signal
from typing import Any

import pytest

LARGE = ("task.name=mlp", "task.options.hidden=[4096]")  # 1.2 MB


def asked(client: Any) -> int:
    return sum(point.startswith("asked") for point in client.points())


def everybody_counted_once(deployment: Any) -> None:
    for record in deployment.rounds():
        assert record["participants"] == ["client-0", "client-1", "client-2"]
        assert not record["quarantined"]
        assert not record["late"]


@pytest.mark.parametrize(
    "way",
    [
        "drop",
        "deafen",
    ],
)
def test_a_connection_that_is_gone_or_half_open_while_a_client_trains(deployment: Any, proxy: Any, way: str) -> None:
    server = deployment.server(flags=("--patience", 15))
    deployment.clients("client-1")
    client = deployment.client("client-1", proxy.address, step_4="hold")
    client.reaches("step 4")
    getattr(proxy, way)()
    client.go_on("step 4")
    deployment.ends_well(server)
    client.ends(0)
    assert proxy.connections > 1
    assert asked(client) == 3
    assert client.said().count("round 2: sends") == 2
    assert f"waiting for {proxy.address}: " in client.said()
    everybody_counted_once(deployment)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_connection_that_breaks_in_mid_chunk(deployment: Any, proxy: Any, way: str) -> None:
    proxy.cut_after[way] = 2_300_000  # near the end of the second message of 1.2 MB
    server, _ = deployment.server(*LARGE), deployment.clients("client-1")
    client = deployment.client("client-1", proxy.address)
    deployment.ends_well(server, *LARGE)
    client.ends(0)
    assert proxy.connections > 1
    assert asked(client) == 3
    everybody_counted_once(deployment)


def test_a_slow_line_does_not_try_the_patience_of_the_server(deployment: Any, proxy: Any) -> None:
    proxy.rate = 300_000  # so a model takes twice as long as the server is patient
    overrides = (*LARGE, "rounds=1")
    server = deployment.server(*overrides, flags=("--patience", 2))
    deployment.clients("client-1")
    client = deployment.client("client-1", proxy.address)
    deployment.ends_well(server, *overrides)
    client.ends(0)
    assert proxy.connections == 1
    everybody_counted_once(deployment)


def test_a_model_over_a_line_of_ten_kilobytes_a_second(deployment: Any, proxy: Any) -> None:
    proxy.rate = 10_000  # 48 kB of parameters take 5 s in each direction
    overrides = ("task.name=mlp", "task.options.hidden=[160]", "rounds=1")
    server = deployment.server(*overrides)
    deployment.clients("client-1")
    client = deployment.client("client-1", proxy.address)
    deployment.ends_well(server, *overrides)
    client.ends(0)
    assert proxy.connections == 1
    everybody_counted_once(deployment)


def test_a_line_that_loses_a_hundredth_of_what_it_carries(deployment: Any, proxy: Any) -> None:
    proxy.loss = 0.01
    server = deployment.server(*LARGE, flags=("--patience", 4))
    deployment.clients("client-1")
    client = deployment.client("client-1", proxy.address)
    deployment.ends_well(server, *LARGE)
    client.ends(0)
    assert proxy.losses > 20  # of 5,000 segments
    assert proxy.connections == 1
    everybody_counted_once(deployment)


def test_bytes_in_the_records_are_those_on_the_line(deployment: Any, proxy: Any) -> None:
    server = deployment.server(*LARGE)
    deployment.clients("client-1")
    client = deployment.client("client-1", proxy.address)
    deployment.ends_well(server, *LARGE)
    client.ends(0)
    counted = [record["client_bytes"]["client-1"] for record in deployment.rounds()]
    for way, total in zip(("up", "down"), map(sum, zip(*counted))):
        assert 1.0 < proxy.passed[way] / total < 1.03  # TLS, HTTP/2, handshakes and signs of life


def test_a_server_that_is_not_there_yet(deployment: Any) -> None:
    clients = deployment.clients()
    for client in clients:
        client.says(f"waiting for {deployment.address}: ")
    deployment.ends_well(deployment.server())
    for client in clients:
        said = client.ends(0)
        assert len(re.findall("waiting for", said)) == 1


def test_a_client_that_stays_away_is_not_waited_for_until_it_is_back(deployment: Any) -> None:
    overrides = ("rounds=4",)
    server = deployment.server(*overrides, flags=("--patience", 4))
    deployment.clients("client-1")
    deployment.client("client-1", step_4="die").ends(-signal.SIGKILL)
    server.says("round 3/4")
    deployment.client("client-1")
    said = server.ends(0)
    assert "Traceback" not in said
    found = [record["participants"] for record in deployment.rounds()]
    assert found[0] == ["client-0", "client-1", "client-2"]
    assert found[1] == found[2] == ["client-0", "client-2"]
