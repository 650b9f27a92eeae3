"""Clients of a deployment that are killed at named points, and come back."""

import re
import signal
from typing import Any

import pytest

LARGE = ("task.name=mlp", "task.options.hidden=[4096]")  # an update takes more than one chunk
COMPRESSED = ('compression={up=["topk:0.1", "int8", "zstd"], down=["fp16"]}',)


def kept(deployment: Any, name: str, round_number: int) -> list[tuple[int, int]]:
    """The files of a client's finished updates of a round; another number is another file."""
    found = (deployment.folder / "homes" / name).glob(f"runs/*/outbox/{round_number:07d}-*.update")
    return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in found]


def everybody_counted_once(deployment: Any) -> None:
    for record in deployment.rounds():
        assert record["participants"] == ["client-0", "client-1", "client-2"]
        assert not record["quarantined"]


# In the second of three steps of round 2; after the last, and after it has saved what compression has lost.
@pytest.mark.parametrize(("point", "overrides"), [("step_5", ()), ("keep_2", ()), ("keep_2", COMPRESSED)])
def test_killed_before_its_update_was_finished(deployment: Any, point: str, overrides: Any) -> None:
    server, _ = deployment.server(*overrides), deployment.clients("client-1")
    deployment.client("client-1", **{point: "die"}).ends(-signal.SIGKILL)
    assert not kept(deployment, "client-1", 2)
    again = deployment.client("client-1")
    deployment.ends_well(server, *overrides)
    again.ends(0)
    assert [point for point in again.points() if "asked" in point] == ["asked 1", "asked 2"]
    everybody_counted_once(deployment)


@pytest.mark.parametrize(("point", "overrides"), [("kept_2", ()), ("kept_2", COMPRESSED), ("part_2_3", LARGE)])
def test_a_finished_update_is_sent_and_not_trained_again(deployment: Any, point: str, overrides: Any) -> None:
    server, _ = deployment.server(*overrides), deployment.clients("client-1")
    deployment.client("client-1", **{point: "die"}).ends(-signal.SIGKILL)
    assert kept(deployment, "client-1", 2)
    again = deployment.client("client-1", asked_1="hold")
    again.reaches("asked 1")
    assert re.search(r"round 2: sends.*round 3: trains", again.said(), re.DOTALL)
    again.go_on("asked 1")
    deployment.ends_well(server, *overrides)
    again.ends(0)
    assert [point for point in again.points() if "asked" in point] == ["asked 1"]
    everybody_counted_once(deployment)


def test_killed_before_the_acknowledgement_it_is_counted_once(deployment: Any) -> None:
    server = deployment.server(took_6="hold")
    _, client = deployment.clients("client-1"), deployment.client("client-1", step_4="hold")
    client.reaches("step 4")
    client.go_on("step 4")
    server.reaches("took 6")
    client.kill()
    server.go_on("took 6")
    again = deployment.client("client-1")
    deployment.ends_well(server)
    again.ends(0)
    everybody_counted_once(deployment)


def test_a_second_process_of_one_name_is_refused(deployment: Any, tmp_path: Any) -> None:
    server = deployment.server()
    deployment.clients("client-1")
    client = deployment.client("client-1", step_4="hold")
    client.reaches("step 4")
    second = deployment.client("client-1")
    second.says("waiting: the server says: its name is in use by another process")
    server.says("client-1 at")
    client.go_on("step 4")
    deployment.ends_well(server)
    client.ends(0)
    assert "asked 1" not in second.points()
    everybody_counted_once(deployment)
