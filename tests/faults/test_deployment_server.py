"""Servers of a deployment that are killed, and started again by the same command while their clients stay."""

import signal
from typing import Any

import pytest

LARGE = ("task.name=mlp", "task.options.hidden=[4096]")  # the model takes more than one chunk


@pytest.fixture
def fleet(deployment: Any) -> tuple[Any, list[Any]]:
    """A deployment whose three clients stay, whatever becomes of the server."""
    return deployment, deployment.clients(flags=())


# Three clients: the fourth to the sixth fetch and update are of round 2.
@pytest.mark.parametrize(
    ("point", "overrides"),
    [
        ("begin_1", ()),
        ("fetched_5_2", LARGE),  # one client has the model of round 2, another has a part of it
        ("took_4", ()),  # one of three updates of round 2 is here
        ("took_6", ()),
        ("added_2_2", ()),
        ("checkpoint_2", ()),
        ("model_1", ()),
        ("took_8", ("run.checkpoint_seconds=1000",)),  # all rounds begin anew
        ("took_8", ("run.checkpoint_seconds=1000", 'compression={up=["stc:0.1", "zstd"], down=["int8:64"]}')),
    ],
)
def test_killed_and_started_again(fleet: Any, point: str, overrides: tuple[str, ...]) -> None:
    deployment, clients = fleet
    deployment.server(*overrides, **{point: "die"}).ends(-signal.SIGKILL)
    deployment.ends_well(deployment.server(*overrides), *overrides)
    assert [len(record["participants"]) for record in deployment.rounds()] == [3, 3, 3]
    for client in clients:
        assert client.code() is None
        assert "Traceback" not in client.said()
