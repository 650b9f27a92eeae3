"""Signals and full disks on both sides of a deployment."""

import signal
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fedtrain.link.authority import Authority
from fedtrain.rundir import RunFolder

LARGE = ("task.name=mlp", "task.options.hidden=[4096]")  # an update of 1.2 MB


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_is_told_to_stop_in_mid_round(deployment: Any, number: signal.Signals) -> None:
    clients = [*deployment.clients("client-1"), deployment.client("client-1", step_4="hold")]
    server = deployment.server()
    clients[2].reaches("step 4")
    server.signal(number)
    said = server.ends(130)
    assert "Run the same command again to resume" in said
    assert "Traceback" not in said
    again = deployment.server()
    clients[2].go_on("step 4")
    deployment.ends_well(again)
    for client in clients:
        assert sum(point.startswith("asked") for point in client.points()) == 3
        assert "Traceback" not in client.ends(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_client_is_told_to_stop_in_mid_round(deployment: Any, number: signal.Signals) -> None:
    server, _ = deployment.server(), deployment.clients("client-1")
    client = deployment.client("client-1", step_4="hold")
    client.reaches("step 4")
    client.signal(number)
    said = client.ends(130)
    assert "Run the same command again to take part again" in said
    assert "Traceback" not in said
    again = deployment.client("client-1")
    deployment.ends_well(server)
    again.ends(0)


def test_a_client_is_told_to_stop_while_it_waits(deployment: Any) -> None:
    client = deployment.client("client-1")
    client.says("waiting for")
    client.signal(signal.SIGTERM)
    assert "Traceback" not in client.ends(130)


def test_a_client_whose_disk_is_full(deployment: Any) -> None:
    server, _ = deployment.server(*LARGE), deployment.clients("client-1")
    client = deployment.client("client-1", file_size=600_000)
    said = deployment.ends_well(server, *LARGE)
    assert "Traceback" not in said
    said = client.ends(0)
    assert "round 2: an update cannot be kept" in said
    assert "Free some space" in said
    assert not list((deployment.folder / "homes" / "client-1").rglob("*.tmp"))


def test_a_server_whose_disk_is_full(deployment: Any) -> None:
    deployment.clients(flags=())
    said = deployment.server(*LARGE, file_size=600_000).ends(1)
    assert "File too large" in said
    assert "Traceback" not in said
    deployment.ends_well(deployment.server(*LARGE), *LARGE)


@pytest.mark.parametrize("ahead", [timedelta(minutes=10), timedelta(minutes=-10)])
def test_sites_whose_clocks_are_ten_minutes_off_that_of_the_authority(deployment: Any, ahead: timedelta) -> None:
    deployment.authority = Authority(deployment.authority.folder, lambda: datetime.now(UTC) + ahead)
    server = deployment.server()  # asks for its certificate by its own clock
    clients = deployment.clients()
    deployment.ends_well(server)
    for client in clients:
        client.ends(0)


def cannot_write(said: str) -> bool:
    return "Read-only file system" in said and "Traceback" not in said


def test_a_server_whose_disk_is_read_only(deployment: Any) -> None:
    deployment.clients()
    (deployment.folder / "run").mkdir()
    assert cannot_write(deployment.server(read_only=deployment.folder / "run").ends(2))
    deployment.ends_well(deployment.server())


def test_a_client_whose_disk_is_read_only_takes_part_and_says_what_it_cannot_keep(deployment: Any) -> None:
    server, _ = deployment.server(), deployment.clients("client-1")
    home = deployment.folder / "homes" / "client-1"
    home.mkdir(parents=True)
    client = deployment.client("client-1", read_only=home)
    deployment.ends_well(server)
    said = client.ends(0)
    assert cannot_write(said)
    assert "round 1: an update cannot be kept" in said


def test_a_server_whose_disk_becomes_read_only(deployment: Any) -> None:
    deployment.clients(flags=())
    assert cannot_write(deployment.server(checkpoint_3="read-only").ends(1))
    deployment.ends_well(deployment.server())


def test_stopped_after_its_round_it_goes_on_by_the_same_command(deployment: Any) -> None:
    server = deployment.server(added_2_1="hold")
    clients = deployment.clients(flags=())
    server.reaches("added 2 1")
    RunFolder(deployment.folder / "run").ask_to_stop()
    server.go_on("added 2 1")
    assert "interrupted; 2 of 3 rounds are kept" in server.ends(130)
    again = deployment.server()
    deployment.ends_well(again)
    for client in clients:
        client.signal(signal.SIGTERM)
        client.ends(130)


def test_a_server_that_waits_for_clients_can_be_stopped_and_holds_its_folder(deployment: Any) -> None:
    server = deployment.server()
    server.says("waiting for 3 clients")
    folder = RunFolder(deployment.folder / "run")
    assert folder.holder() == server.pid
    assert "another process is running in this folder" in deployment.server().ends(2)
    folder.ask_to_stop()
    assert "interrupted" in server.ends(130)
    again = deployment.server()
    deployment.clients()
    deployment.ends_well(again)
