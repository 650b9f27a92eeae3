"""A preflight names what is wrong, and goes on to what does not depend on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtrain.deployment.check import preflight
from fedtrain.deployment.session import Dial
from fedtrain.deployment.site import Owner
from fedtrain.deployment.terms import offer_for
from fedtrain.experiment.sections import Experiment
from fedtrain.link.hub import Hub

POLICY = "max_epsilon = 1.0\ndelta = 1e-5\n"


class Doorman:
    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        raise AssertionError("a preflight takes no part")

    def left(self, name: str) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    experiment = Experiment.model_validate({"task": {"name": "logistic"}, "data": {"name": "digits", "clients": 3}})
    with Hub("127.0.0.1:0", offer_for(experiment, "0" * 32), Doorman(), tmp_path / "spool") as hub:
        yield hub.address


def findings(owner: Owner, server: str) -> dict[str, tuple[bool, str]]:
    return {what: (ok, text) for what, ok, text in preflight(owner, Dial(server))}


def test_a_client_that_can_take_part(tmp_path: Path, server: str) -> None:
    found = findings(Owner("client-1", tmp_path, tmp_path / "home", device="cpu"), server)
    assert [ok for ok, _ in found.values()] == [True] * 4
    assert "599 examples" in found["experiment"][1]


def test_what_is_wrong_is_named_with_what_to_do(tmp_path: Path, server: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "policy.toml").write_text(POLICY)
    owner = Owner("client-1", tmp_path, tmp_path / "file" / "home", device="cuda:99", policy=tmp_path / "policy.toml")
    found = findings(owner, server)
    assert not found["device"][0]
    assert "--home" in found["disk"][1]
    assert found["server"][0]
    owner = Owner("client-1", tmp_path, tmp_path / "home", device="cpu", policy=tmp_path / "policy.toml")
    assert "allows private runs alone" in findings(owner, server)["experiment"][1]
    assert "no share for this client" in findings(Owner("x", tmp_path, tmp_path / "home"), server)["experiment"][1]


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    found = findings(Owner("client-1", tmp_path, tmp_path / "home", device="cpu"), "127.0.0.1:1")
    assert list(found) == ["device", "disk", "server"]
    assert not found["server"][0]
