"""Who must not take part in a deployment, is refused in one line, and does not disturb the run."""

import contextlib
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtrain.link.authority import Authority
from fedtrain.link.channel import ConnectionLostError, connect
from fedtrain.link.control import Hello
from fedtrain.link.identity import Identity, adopt, pending_request


def held(deployment: Any) -> tuple[Any, Any]:
    """A run of which two clients wait for the third, which trains."""
    server = deployment.server()
    deployment.clients("client-1")
    client = deployment.client("client-1", step_4="hold")
    client.reaches("step 4")
    return server, client


def goes_on(deployment: Any, server: Any, client: Any) -> str:
    client.go_on("step 4")
    said = deployment.ends_well(server)
    client.ends(0)
    for record in deployment.rounds():
        assert record["participants"] == ["client-0", "client-1", "client-2"]
    return said


def one_line(said: str) -> str:
    """What a command that could not begin has said."""
    lines = said.splitlines()
    assert len(lines) == 1, said
    return lines[0]


def stranger(deployment: Any, tmp_path: Path, mine: timedelta = timedelta(0)) -> Path:
    """An identity that another authority gave to somebody of the same name."""
    other = Authority.init(tmp_path / "other", lambda: datetime.now(UTC) - mine)
    folder = tmp_path / "stranger"
    folder.mkdir(mode=0o700)
    adopt(folder, other.issue(pending_request(folder, "client-1"), "client-1"), other.certificate)
    return folder


def test_another_authority(deployment: Any, tmp_path: Path) -> None:
    server, client = held(deployment)
    other = deployment.client("client-1", identity=stranger(deployment, tmp_path))
    other.says("CERTIFICATE_VERIFY_FAILED")
    said = goes_on(deployment, server, client)
    assert "Traceback" not in other.said()
    assert "Traceback" not in said


def test_a_certificate_that_is_not_of_the_authority_beside_it(deployment: Any, tmp_path: Path) -> None:
    server, client = held(deployment)
    identity = stranger(deployment, tmp_path)
    (identity / "authority.pem").write_bytes(deployment.authority.certificate)
    other = deployment.client("client-1", identity=identity)
    assert "certificate is not of the authority" in one_line(other.ends(2))
    goes_on(deployment, server, client)


@pytest.mark.parametrize(
    ("who", "why"), [("nobody", "it shows no certificate"), ("stranger", "its certificate is not trusted: ")]
)
def test_no_certificate_or_one_that_the_server_does_not_trust(
    deployment: Any, tmp_path: Path, who: str, why: str
) -> None:
    server, client = held(deployment)
    shown: tuple[bytes, ...] = ()
    if who == "stranger":
        theirs = Identity.load(stranger(deployment, tmp_path))
        shown = theirs.key, theirs.certificate
    credentials = grpc.ssl_channel_credentials(deployment.authority.certificate, *shown)
    hello = Hello(version="1", name="client-1", instance="1")
    with pytest.raises(ConnectionLostError), connect(deployment.address, credentials, hello):
        pass
    server.says(f"is refused in its TLS handshake: {why}")
    goes_on(deployment, server, client)


def test_plain_text(deployment: Any) -> None:
    server, client = held(deployment)
    other = deployment.client("client-1", flags=("--once", "--insecure", "client-1"))
    other.says("waiting for ")
    server.says("is refused in its TLS handshake: it speaks no TLS")
    assert "Traceback" not in goes_on(deployment, server, client)


def test_a_flood_of_strangers(deployment: Any) -> None:
    server, client = held(deployment)
    host, _, port = deployment.address.rpartition(":")

    def knock(_: int) -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as line:
            line.sendall(b"garbage\n")
            line.recv(10)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(knock, range(2000)))
    assert goes_on(deployment, server, client).count("it speaks no TLS") < 10


def test_a_revoked_certificate_does_not_disturb_who_has_a_new_one(deployment: Any) -> None:
    old = deployment.identity("client-1")
    shutil.copytree(old, deployment.folder / "stolen")
    deployment.authority.revoke("client-1")
    shutil.rmtree(old)
    del deployment.identities["client-1"]
    server, client = held(deployment)
    thief = deployment.client("client-1", identity=deployment.folder / "stolen")
    assert "the server refuses this client: the certificate is revoked since" in thief.ends(2)
    goes_on(deployment, server, client)


def test_revoked_in_mid_run(deployment: Any) -> None:
    server = deployment.server()
    others = [deployment.client("client-0"), deployment.client("client-2", step_7="hold")]  # in round 3
    client = deployment.client("client-1", step_4="hold")
    client.reaches("step 4")
    deployment.authority.revoke("client-1")
    server.says("is refused: the certificate is revoked since")
    client.go_on("step 4")
    assert "the server refuses this client: the certificate is revoked since" in client.ends(2)
    others[1].go_on("step 7")
    said = server.ends(0)
    assert [record["participants"] for record in deployment.rounds()][1:] == [["client-0", "client-2"]] * 2
    assert "the certificate is revoked since" in deployment.rounds()[1]["quarantined"]["client-1"]
    assert "Traceback" not in said


def test_expired(deployment: Any) -> None:
    folder = deployment.folder / "expired"
    folder.mkdir(mode=0o700)
    then = datetime.now(UTC) - timedelta(days=1000)
    authority = Authority.init(deployment.folder / "old", lambda: then)
    adopt(folder, authority.issue(pending_request(folder, "client-1"), "client-1"), authority.certificate, then)
    said = one_line(deployment.client("client-1", identity=folder).ends(2))
    assert re.search("expired", said)


def test_a_private_key_that_others_can_read(deployment: Any) -> None:
    key = deployment.identity("client-1") / "key.pem"
    key.chmod(0o644)
    said = one_line(deployment.client("client-1").ends(2))
    assert str(key) in said
    assert "can be read by others" in said


@pytest.mark.parametrize("file", ["key.pem", "server/key.pem"])
def test_a_private_key_of_the_server_that_others_can_read(deployment: Any, file: str) -> None:
    deployment.authority.server_identity()
    key = deployment.authority.folder / file
    key.chmod(0o644)
    said = deployment.server().ends(2)
    assert str(key) in said
    assert said.count("\n") <= 2
    assert "Traceback" not in said


def test_a_port_that_is_taken(deployment: Any) -> None:
    server, client = held(deployment)
    said = deployment.server(out="second").ends(2)
    assert f"the server cannot listen there: got {deployment.address}" in said
    assert "Traceback" not in said
    goes_on(deployment, server, client)


def test_the_same_run_by_two_servers(deployment: Any) -> None:
    server, client = held(deployment)
    said = deployment.server().ends(2)
    assert "Traceback" not in said
    goes_on(deployment, server, client)
