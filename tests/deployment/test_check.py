"""A preflight names what is wrong, with what to do, and goes on to what does not depend on it."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtrain.deployment.check import Finding, preflight
from fedtrain.deployment.session import Dial
from fedtrain.deployment.site import Owner
from fedtrain.deployment.terms import offer_for
from fedtrain.experiment.sections import Experiment
from fedtrain.link.hub import Hub

POLICY = "max_epsilon = 1.0\ndelta = 1e-5\n"
DIGITS = {"task": {"name": "logistic"}, "data": {"name": "digits", "clients": 3}}
DAY = timedelta(days=1)


class Doorman:
    def __init__(self) -> None:
        self.objection: str | None = None
        self.events: list[str] = []

    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        self.events.append(f"ready {name}")
        return self.objection

    def left(self, name: str) -> None:
        self.events.append(f"left {name}")


@pytest.fixture
def doorman() -> Doorman:
    return Doorman()


@pytest.fixture
def server(tmp_path: Path, doorman: Doorman) -> Iterator[str]:
    offer = offer_for(Experiment.model_validate(DIGITS), "0" * 32)
    with Hub("127.0.0.1:0", offer, doorman, tmp_path / "spool") as hub:
        yield hub.address


def findings(owner: Owner, server: str, **more: Any) -> dict[str, Finding]:
    return {finding.what: finding for finding in preflight(owner, Dial(server), **more)}


def client(tmp_path: Path, **more: Any) -> Owner:
    return Owner("client-1", tmp_path, **{"home": tmp_path / "home", "device": "cpu", **more})


def test_a_client_that_can_take_part(tmp_path: Path, server: str, doorman: Doorman) -> None:
    found = findings(client(tmp_path), server)
    assert list(found) == ["device", "disk", "policy", "server", "experiment", "place"]
    assert all(finding.ok for finding in found.values())
    assert found["policy"].text == "there is no policy: everything is allowed"
    assert "599 examples" in found["experiment"].text
    assert doorman.events[0] == "ready client-1"


def test_what_the_server_holds_against_a_client(tmp_path: Path, server: str, doorman: Doorman) -> None:
    doorman.objection = "its data are of another kind: input_shape [3] and not [4], feature_names ['a', 'b', 'c']"
    found = findings(client(tmp_path), server)
    assert not found["place"].ok
    assert found["place"].text.endswith(f"{doorman.objection}. Ask who runs the server")


def test_what_is_wrong_is_named_with_what_to_do(tmp_path: Path, server: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "policy.toml").write_text(POLICY)
    policy = tmp_path / "policy.toml"
    found = findings(client(tmp_path, home=tmp_path / "file" / "home", device="cuda:99", policy=policy), server)
    assert found["device"].text.endswith("Use --device cpu")
    assert "--home" in found["disk"].text
    assert found["server"].ok
    assert "allows private runs alone" in findings(client(tmp_path, policy=policy), server)["experiment"].text
    found = findings(Owner("x", tmp_path, tmp_path / "home"), server)
    assert "no share for this client" in found["experiment"].text
    assert "Check what --data" in found["experiment"].text


@pytest.mark.parametrize(("max_epsilon", "fits"), [(1000.0, True), (0.1, False)])
def test_a_budget_that_ends_before_the_run_does(tmp_path: Path, max_epsilon: float, fits: bool) -> None:
    pytest.importorskip("opacus")
    (tmp_path / "policy.toml").write_text(f"max_epsilon = {max_epsilon}\ndelta = 1e-5\n")
    privacy = {"unit": "sample", "noise_multiplier": 1.0, "delta": 1e-5, "accountant": "rdp"}
    offer = offer_for(Experiment.model_validate({**DIGITS, "privacy": privacy}), "0" * 32)
    with Hub("127.0.0.1:0", offer, Doorman(), tmp_path / "spool") as hub:
        found = findings(client(tmp_path, policy=tmp_path / "policy.toml"), hub.address)
    assert found["budget"].ok is fits
    assert ("ends before the run does" in found["budget"].text) is not fits
    assert found["place"].ok
    assert not (tmp_path / "home" / "ledgers").exists()


def test_a_clock_beside_the_certificates_dates(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    for begin, ok in ((now - DAY, True), (now + DAY / 2, False)):
        found = findings(client(tmp_path), "127.0.0.1:1", dates=(begin, now + DAY))
        assert found["clock"].ok is ok
    assert "Set the clock" in found["clock"].text


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    found = findings(client(tmp_path), "127.0.0.1:1")
    assert list(found) == ["device", "disk", "policy", "server"]
    assert "Check the address" in found["server"].text
