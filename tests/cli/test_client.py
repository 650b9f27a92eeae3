"""`fedtrain client`: what it refuses at once, and how it comes to a new certificate while it takes part."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fedtrain.link.enrolment
from fedtrain.cli import client
from fedtrain.cli.app import app
from fedtrain.deployment.session import Client, Dial
from fedtrain.deployment.site import Owner
from fedtrain.deployment.terms import offer_for
from fedtrain.errors import InputError, RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.link.authority import Authority
from fedtrain.link.certificates import load_certificate
from fedtrain.link.enrolment import add_renewal, renew, server_credentials
from fedtrain.link.hub import Door, Hub
from fedtrain.link.identity import adopt, pending_request

NAME = "client-1"


class Doorman:
    """Lets everybody in, and counts."""

    def __init__(self) -> None:
        self.came = threading.Semaphore(0)

    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        self.came.release()
        return None

    def left(self, name: str) -> None:
        pass


class Shown:
    """The serial numbers of the certificates that clients show, in order."""

    def __init__(self) -> None:
        self.serials: list[int] = []

    def verify(self, certificate: bytes) -> None:
        serial = load_certificate(certificate).serial_number
        if serial not in self.serials:
            self.serials.append(serial)


@pytest.fixture
def shown() -> Shown:
    return Shown()


@pytest.fixture
def doorman() -> Doorman:
    return Doorman()


@pytest.fixture
def hub(tmp_path: Path, shown: Shown, doorman: Doorman) -> Iterator[Hub]:
    """A server with mutual TLS, of whose client's 90 days 70 are over."""
    then = datetime.now(UTC) - timedelta(days=70)
    past = Authority.init(tmp_path / "ca", lambda: then)
    (tmp_path / "identity").mkdir()
    certificate = past.issue(pending_request(tmp_path / "identity", NAME), NAME)
    adopt(tmp_path / "identity", certificate, past.certificate, then)
    authority = Authority.open(tmp_path / "ca")
    offer = offer_for(
        Experiment.model_validate({"task": {"name": "logistic"}, "data": {"name": "digits", "clients": 3}}), "0" * 32
    )
    door = Door(server_credentials(authority, mutual=True), shown.verify)
    hub = Hub("127.0.0.1:0", offer, doorman, tmp_path, door)
    add_renewal(hub.server, authority)
    with hub:
        yield hub


def test_a_renewed_certificate_is_shown_also_without_a_lost_connection(
    hub: Hub,
    doorman: Doorman,
    shown: Shown,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    may = threading.Event()

    def renew_when_it_may(folder: Path, server: str) -> Any:
        if not may.is_set():
            raise RunError("the server does not answer")
        return renew(folder, server)

    monkeypatch.setattr(fedtrain.link.enrolment, "renew", renew_when_it_may)
    monkeypatch.setattr(client, "_RENEWAL_SECONDS", 0.05)
    certificate = client._Certificate(tmp_path / "identity", hub.address)
    said: list[str] = []
    owner = Owner(NAME, tmp_path, tmp_path / "home", device="cpu")
    site = Client(owner, Dial(hub.address, certificate.credentials, once=True), said.append)
    running = threading.Thread(target=site.run)
    running.start()
    assert doorman.came.acquire(timeout=30)
    assert len(shown.serials) == 1
    threading.Thread(target=certificate.watch, args=(site.reconnect,), daemon=True).start()
    may.set()
    assert doorman.came.acquire(timeout=30)
    assert len(shown.serials) == 2
    hub.close()
    running.join(30)
    assert not running.is_alive()
    assert not [text for text in said if text.startswith("waiting for")]
    (warning,) = {record.getMessage() for record in caplog.records if record.name == "fedtrain.client"}
    assert "is not renewed: the server does not answer" in warning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nothing"), "there is no such file or folder: got nothing"),
        (("--data", ".", "--policy", "no.toml"), "there is no such policy file: got no.toml"),
        (("--data", ".", "--policy", "."), "there is no such policy file: got ."),
        (("--data", ".", "--code", "nowhere"), "there is no such folder of code: got nowhere"),
    ],
)
def test_what_is_not_there_is_refused_at_the_start(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        app(["client", "--server", "127.0.0.1:1", "--insecure", "a", "--check", *arguments], standalone_mode=False)
    assert caught.value.exit_code == 2
