import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from fedtrain.errors import InputError, RunError
from fedtrain.link import enrolment
from fedtrain.link.authority import Authority
from fedtrain.link.certificates import load_certificate
from fedtrain.link.enrolment import add_renewal, enrol, renew, server_credentials, serving
from fedtrain.link.identity import Identity, Token, adopt, new_key_and_request, peer_name, pending_request
from fedtrain.link.register import Revocations

DAY = timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "ca")


@pytest.fixture
def address(authority: Authority) -> Iterator[str]:
    """Of an enrolment server."""
    with serving(authority, "127.0.0.1:0") as address:
        yield address


@contextlib.contextmanager
def service(
    credentials: grpc.ServerCredentials,
    name: str,
    host: str = "127.0.0.1",
    **methods: Callable[[bytes, grpc.ServicerContext], bytes],
) -> Iterator[tuple[grpc.Server, str]]:
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    handlers = {key: grpc.unary_unary_rpc_method_handler(method) for key, method in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    port = server.add_secure_port(f"{host}:0", credentials)
    server.start()
    try:
        yield server, f"{host}:{port}"
    finally:
        server.stop(None).wait()


def who(body: bytes, context: grpc.ServicerContext) -> bytes:
    return json.dumps(peer_name(context.auth_context())).encode()


@pytest.fixture
def main(authority: Authority) -> Iterator[str]:
    """Address of a server at which clients show their certificates."""
    with service(server_credentials(authority, mutual=True), "test", Who=who) as (server, address):
        add_renewal(server, authority)
        yield address


def ask(
    address: str, credentials: grpc.ChannelCredentials | None, method: str = "/test/Who", body: bytes = b""
) -> bytes:
    """Call by TLS, or in plain text without credentials."""
    with grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address) as channel:
        return channel.unary_unary(method)(body, timeout=60)


def site(authority: Authority, folder: Path, name: str = "north", now: datetime | None = None) -> Identity:
    """An identity without the network."""
    folder.mkdir(exist_ok=True)
    return adopt(folder, authority.issue(pending_request(folder, name), name), authority.certificate, now)


def test_enrol(authority: Authority, address: str, main: str, tmp_path: Path) -> None:
    identity = enrol(authority.invite("north", DAY, address), tmp_path / "sites" / "north")
    assert identity == Identity.load(tmp_path / "sites" / "north")
    assert (identity.name, identity.authority) == ("north", authority.certificate)
    assert identity.folder.stat().st_mode & 0o777 == 0o700
    assert (identity.folder / "key.pem").stat().st_mode & 0o777 == 0o600
    assert json.loads(ask(main, identity.channel_credentials())) == ["north", identity.serial]
    assert not Revocations(authority.register).is_revoked(identity.serial)


def test_the_key_stays_at_the_site(authority: Authority, tmp_path: Path) -> None:
    seen = []

    def listen(body: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(body)
        return b""

    with (
        service(server_credentials(authority, mutual=False), "fedtrain.Enrolment", Enrol=listen) as (_, address),
        pytest.raises(InputError, match="answer is malformed"),
    ):
        enrol(authority.invite("north", DAY, address), tmp_path / "north")
    (body,) = seen
    assert set(json.loads(body)) == {"secret", "request"}
    assert "PRIVATE" not in body.decode()


def test_a_token_is_good_for_one_site(
    authority: Authority, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = authority.invite("north", DAY, address)
    enrol(line, tmp_path / "north")
    with pytest.raises(InputError, match=r"the token is not valid: got 127.0.0.1:\d+. It may be used, withdrawn or"):
        enrol(line, tmp_path / "thief")
    assert not (tmp_path / "thief" / "certificate.pem").exists()
    assert "the invitation of north was used by another key" in caplog.text
    assert Token.read(line).secret not in caplog.text


def test_when_the_answer_was_lost_the_same_key_gets_it_again(
    authority: Authority, address: str, tmp_path: Path
) -> None:
    line, folder = authority.invite("north", DAY, address), tmp_path / "north"
    folder.mkdir()
    lost = authority.redeem(Token.read(line).secret, pending_request(folder, "north"))
    assert enrol(line, folder).certificate == lost


def test_a_try_that_fails_is_repeated(
    authority: Authority, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer is lost after the token was redeemed; the second try is sent by itself."""
    lost = iter([True, False])
    redeem = authority.redeem

    def losing(secret: str, request: bytes) -> bytes:
        certificate = redeem(secret, request)
        if next(lost):
            raise RunError("the disk is full")
        return certificate

    monkeypatch.setattr(authority, "redeem", losing)
    enrol(authority.invite("north", DAY, address), tmp_path / "north")
    assert len([one for one in authority.issued() if one.kind == "client"]) == 1


@pytest.mark.parametrize("refusal", ["expired", "revoked", "replaced"])
def test_tokens_that_are_refused_all_alike(
    refusal: str, authority: Authority, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = authority.invite("north", DAY, address)
    if refusal == "expired":
        monkeypatch.setattr(authority, "_clock", lambda: datetime.now(UTC) + DAY)
    elif refusal == "revoked":
        authority.revoke("north")
    else:
        authority.invite("north", DAY, address)
    with pytest.raises(InputError, match="the server says that the token is not valid"):
        enrol(line, tmp_path / "north")


def test_an_identity_that_is_valid_is_not_overwritten(authority: Authority, address: str, tmp_path: Path) -> None:
    before = site(authority, tmp_path / "north")
    line = authority.invite("south", DAY, address)
    with pytest.raises(InputError, match="there is a valid identity of north already"):
        enrol(line, before.folder)
    assert Identity.load(before.folder) == before
    assert authority.invitations()[0].certificate is None


def test_one_that_has_expired_is_replaced(authority: Authority, address: str, tmp_path: Path) -> None:
    then = datetime.now(UTC) - 91 * DAY
    folder = site(Authority.init(tmp_path / "before", lambda: then), tmp_path / "north", now=then).folder
    with pytest.raises(InputError, match="expired on"):
        Identity.load(folder)
    assert enrol(authority.invite("north", DAY, address), folder) == Identity.load(folder)


@pytest.mark.parametrize(
    ("who_serves", "host", "cause"),
    [
        ("another authority", "localhost", "unable to get local issuer"),
        ("a client named localhost", "localhost", "unsupported certificate purpose"),
        ("a server of another address", "127.0.0.2", "Hostname Verification"),
        ("a server that has expired", "localhost", "certificate has expired"),
    ],
)
def test_an_impostor_gets_nothing(who_serves: str, host: str, cause: str, tmp_path: Path) -> None:
    then = datetime.now(UTC) - 400 * DAY
    past = Authority.init(tmp_path / "ca", lambda: then)
    authority = Authority.open(tmp_path / "ca")
    identity = {
        "another authority": Authority.init(tmp_path / "other").server_identity,
        "a client named localhost": lambda: site(authority, tmp_path / "client", "localhost"),
        "a server of another address": authority.server_identity,
        "a server that has expired": past.server_identity,
    }[who_serves]()
    credentials = grpc.ssl_server_credentials([(identity.key, identity.certificate)])
    seen: list[bytes] = []
    with service(credentials, "fedtrain.Enrolment", host, Enrol=lambda body, _: seen.append(body)) as (_, address):
        token = Token.of(address, "s" * 43, "north", load_certificate(authority.certificate))
        with pytest.raises(InputError, match=rf"cannot be trusted \(.*{cause}.*Nothing was sent"):
            enrol(token.line(), tmp_path / "north")
    assert seen == []


@pytest.mark.parametrize("fault", ["another key", "another name", "another authority", "a server's", "no JSON"])
def test_answers_that_are_not_taken(fault: str, authority: Authority, tmp_path: Path) -> None:
    other = Authority.init(tmp_path / "other")

    def answer(body: bytes, _: grpc.ServicerContext) -> bytes:
        request = json.loads(body)["request"].encode()
        certificate = {
            "another key": lambda: authority.issue(new_key_and_request("north")[1], "north"),
            "another name": lambda: authority.issue(request, "south"),
            "another authority": lambda: other.issue(request, "north"),
            "a server's": lambda: authority.server_identity().certificate,
            "no JSON": lambda: b'"',
        }[fault]()
        return b'{"certificate": %s}' % json.dumps(certificate.decode()).encode() if fault != "no JSON" else certificate

    with (
        service(server_credentials(authority, mutual=False), "fedtrain.Enrolment", Enrol=answer) as (_, address),
        pytest.raises(InputError, match=r"does not belong|not made out to us|not of the authority|malformed"),
    ):
        enrol(authority.invite("north", DAY, address), tmp_path / "north")
    assert not (tmp_path / "north" / "certificate.pem").exists()


def test_nobody_answers(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(enrolment.time, "sleep", pauses.append)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RunError, match=rf"the server at 127.0.0.1:{port} does not answer.*nothing is lost"):
        enrol(authority.invite("north", DAY, f"127.0.0.1:{port}"), tmp_path / "north")
    assert len(pauses) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 60_000,
        b'{"secret": "%s", "request": 1}' % (b"s" * 43),
        b'{"secret": "%s", "request": "", "name": "north"}' % (b"s" * 43),
        b'{"secret": "%s", "request": ""}' % (b"s" * 42),
        b'{"secret": "%s", "request": ""}' % (b"\\ud800" * 43),
        b'{"secret": "%s", "request": "%s"}' % (b"s" * 43, b"r" * 9000),
    ],
)
def test_bodies_that_lie(body: bytes, address: str, authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(address, grpc.ssl_channel_credentials(authority.certificate), "/fedtrain.Enrolment/Enrol", body)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert caught.value.details() == "the token is not valid"
    assert caplog.messages[0].endswith("the request is malformed")


def test_bodies_are_capped(
    address: str, main: str, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = b" " * (64 * 1024 + 1)
    with pytest.raises(grpc.RpcError) as caught:
        ask(address, grpc.ssl_channel_credentials(authority.certificate), "/fedtrain.Enrolment/Enrol", body)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as caught:  # where larger messages are welcome
        ask(main, site(authority, tmp_path / "n").channel_credentials(), "/fedtrain.Enrolment/Renew", body)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "the request is too large: got 65,537 bytes" in caplog.text


def test_a_fault_of_the_servers_own_is_not_told(
    address: str, authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("inner affairs")

    monkeypatch.setattr(authority, "redeem", broken)
    body = b'{"secret": "%s", "request": ""}' % (b"s" * 43)
    with pytest.raises(grpc.RpcError) as caught:
        ask(address, grpc.ssl_channel_credentials(authority.certificate), "/fedtrain.Enrolment/Enrol", body)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "try again later")
    assert "inner affairs" in caplog.text


def test_plain_text_gets_no_answer(address: str, authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(address, None, "/fedtrain.Enrolment/Enrol", b"{}")
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    enrol(authority.invite("north", DAY, address), tmp_path / "north")  # others are served as before


def test_enrolment_does_not_renew(address: str, authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(address, site(authority, tmp_path / "n").channel_credentials(), "/fedtrain.Enrolment/Renew", b"{}")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_running_server_takes_on_the_host_of_an_invitation(authority: Authority, tmp_path: Path) -> None:
    with serving(authority, "127.0.0.2:0") as address:
        with pytest.raises(grpc.RpcError):
            ask(address, grpc.ssl_channel_credentials(authority.certificate), "/fedtrain.Enrolment/Enrol")
        assert enrol(authority.invite("north", DAY, address), tmp_path / "north").name == "north"


def test_a_server_whose_folder_fails_goes_on(
    authority: Authority, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = authority.invite("north", DAY, address)
    key = authority.folder / "server" / "key.pem"
    key.chmod(0o644)
    assert enrol(line, tmp_path / "north").name == "north"
    assert "The server goes on with the certificate it has" in caplog.text


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:99999", "unix:/tmp/socket", "192.0.2.1:0"])
def test_where_nobody_can_listen(listen: str, authority: Authority) -> None:
    with pytest.raises(InputError, match=r"no valid address|cannot listen"), serving(authority, listen):
        pytest.fail("it listens")


def test_a_port_that_is_taken(authority: Authority, address: str) -> None:
    with pytest.raises(InputError, match=f"cannot listen for enrolments: got {address}"), serving(authority, address):
        pytest.fail("it listens")


def test_another_process_in_the_folder(authority: Authority, address: str, tmp_path: Path) -> None:
    line = authority.invite("north", DAY, address)
    with enrolment._held(tmp_path / "north"), pytest.raises(InputError, match="another process is changing"):
        enrol(line, tmp_path / "north")


def test_a_folder_that_cannot_be_made(authority: Authority, address: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        enrol(authority.invite("north", DAY, address), tmp_path / "file" / "north")


def test_renew(authority: Authority, main: str, tmp_path: Path) -> None:
    old = site(authority, tmp_path / "north")
    new = renew(tmp_path / "north", main)
    assert new == Identity.load(tmp_path / "north")
    assert (new.name, new.authority) == (old.name, old.authority)
    assert new.key != old.key
    for identity in (old, new):
        assert json.loads(ask(main, identity.channel_credentials())) == ["north", identity.serial]


def test_a_renewal_whose_answer_was_lost(authority: Authority, main: str, tmp_path: Path) -> None:
    old = site(authority, tmp_path / "north")
    authority.renew(old.certificate, pending_request(tmp_path / "north", "north"))
    assert Identity.load(tmp_path / "north") == old
    assert renew(tmp_path / "north", main).key != old.key


def test_who_is_revoked_is_not_renewed(
    authority: Authority, main: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = site(authority, tmp_path / "north")
    authority.revoke("north")
    with pytest.raises(InputError, match="the server says that the certificate is not valid"):
        renew(tmp_path / "north", main)
    assert "the certificate of north is revoked" in caplog.text
    assert Identity.load(tmp_path / "north") == old
    assert Revocations(authority.register).objection(old.certificate).startswith("the certificate is revoked since 20")


def test_renewal_needs_a_certificate(authority: Authority) -> None:
    with service(server_credentials(authority, mutual=False), "test", Who=who) as (server, address):
        add_renewal(server, authority)
        credentials = grpc.ssl_channel_credentials(authority.certificate)
        with pytest.raises(grpc.RpcError) as caught:
            ask(address, credentials, "/fedtrain.Enrolment/Renew", b'{"request": ""}')
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("peer", ["nobody", "another authority", "expired", "a server", "plain text", "a client"])
def test_who_gets_in(peer: str, static: bool, tmp_path: Path) -> None:
    then = datetime.now(UTC) - 91 * DAY
    past = Authority.init(tmp_path / "ca", lambda: then)
    authority = Authority.open(tmp_path / "ca")
    identity = {
        "another authority": lambda: site(Authority.init(tmp_path / "other"), tmp_path / "north"),
        "expired": lambda: site(past, tmp_path / "north", now=then),
        "a server": authority.server_identity,
    }.get(peer, lambda: site(authority, tmp_path / "north"))()
    credentials = {
        "nobody": grpc.ssl_channel_credentials(authority.certificate),
        "plain text": None,
    }.get(peer, grpc.ssl_channel_credentials(authority.certificate, identity.key, identity.certificate))
    server = authority.server_identity().server_credentials() if static else server_credentials(authority, mutual=True)
    with service(server, "test", Who=who) as (_, address):
        if peer == "a client":
            assert json.loads(ask(address, credentials)) == ["north", identity.serial]
            return
        with pytest.raises(grpc.RpcError) as caught:
            ask(address, credentials)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_many_sites_at_once(authority: Authority, address: str, tmp_path: Path) -> None:
    lines = [authority.invite(f"site-{i}", DAY, address) for i in range(20)]
    with ThreadPoolExecutor(8) as threads:
        identities = list(threads.map(lambda i: enrol(lines[i], tmp_path / str(i)), range(20)))
    assert [one.name for one in identities] == [f"site-{i}" for i in range(20)]
    assert not any(map(Revocations(authority.register).is_revoked, (one.serial for one in identities)))
