import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fedtrain.errors import FedtrainError, InputError, RunError
from fedtrain.link.authority import Authority
from fedtrain.link.certificates import load_certificate, server_names
from fedtrain.link.identity import Identity, Token, new_key_and_request
from fedtrain.link.register import Revocations

DAY = timedelta(days=1)
SERVER = "train.example.org:7444"


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> Authority:
    return Authority.init(tmp_path / "ca", clock)


def request() -> bytes:
    return new_key_and_request("any")[1]


def secret_of(line: str) -> str:
    return Token.read(line).secret


def in_force(authority: Authority, certificate: bytes) -> bool:
    return not Revocations(authority.register).is_revoked(load_certificate(certificate).serial_number)


def test_its_folder_is_private_and_never_overwritten(authority: Authority) -> None:
    folder = authority.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    before = (folder / "key.pem").read_bytes()
    with pytest.raises(InputError, match="cannot make a certificate authority"):
        Authority.init(folder)
    assert (folder / "key.pem").read_bytes() == before
    assert list(folder.parent.iterdir()) == [folder]


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Authority.init(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make"):
        Authority.init(tmp_path / "file")


def test_one_that_cannot_be_opened(authority: Authority, clock: Clock, tmp_path: Path) -> None:
    folder = authority.folder
    with pytest.raises(InputError, match=r"no certificate authority here.*fedtrain ca init"):
        Authority.open(tmp_path)
    (folder / "key.pem").chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        Authority.open(folder)
    (folder / "key.pem").chmod(0o600)
    whole = authority.register.read_bytes()
    authority.register.write_bytes(whole[:-9])
    with pytest.raises(RunError, match="cannot be trusted"):
        Authority.open(folder)
    authority.register.write_bytes(whole)
    (folder / "certificate.pem").write_bytes(Authority.init(tmp_path / "other").certificate)
    with pytest.raises(InputError, match="does not belong"):
        Authority.open(folder)
    (folder / "certificate.pem").write_bytes(authority.certificate)
    clock.now += 3651 * DAY
    with pytest.raises(InputError, match="the authority expired on 20"):
        Authority.open(folder, clock)


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "a/b", "a b", "a\n", "\x1b[31m", "ä", "n" * 65])
def test_names_that_are_none(name: str, authority: Authority) -> None:
    for attempt in (lambda: authority.issue(request(), name), lambda: authority.invite(name, DAY, SERVER)):
        with pytest.raises(InputError, match="no valid name"):
            attempt()
    assert authority.issued() == []


def test_what_it_issues_is_in_its_register(authority: Authority, clock: Clock) -> None:
    certificate = load_certificate(authority.issue(request(), "North_1.a-b"))
    (entry,) = authority.issued()
    assert (entry.name, entry.kind, int(entry.serial, 16)) == ("North_1.a-b", "client", certificate.serial_number)
    assert entry.not_after == certificate.not_valid_after_utc
    assert certificate.not_valid_after_utc - clock.now == pytest.approx(90 * DAY, abs=timedelta(seconds=1))


def test_nothing_is_issued_that_cannot_be_written_down(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    line = authority.invite("north", DAY, SERVER)
    with monkeypatch.context() as patch:
        patch.setattr("fedtrain.link.authority.write_register", full)
        with pytest.raises(RunError, match="No space left on device"):
            authority.redeem(secret_of(line), request())
    assert authority.issued() == []
    authority.redeem(secret_of(line), request())


def test_an_invitation_is_for_one_key(authority: Authority, clock: Clock) -> None:
    secret = secret_of(authority.invite("north", DAY, SERVER))
    assert secret not in authority.register.read_text()
    mine = request()
    first = authority.redeem(secret, mine)
    assert x509.load_pem_x509_certificate(first).subject.rfc4514_string() == "CN=north"
    assert authority.redeem(secret, mine) == first  # the answer was lost
    with pytest.raises(InputError, match="used by another key"):
        authority.redeem(secret, request())
    assert len(authority.issued()) == 1
    clock.now += DAY
    with pytest.raises(InputError, match="the invitation of north expired on 20"):
        authority.redeem(secret, mine)


def test_a_request_that_is_damaged_does_not_use_up_the_invitation(authority: Authority) -> None:
    secret = secret_of(authority.invite("north", DAY, SERVER))
    with pytest.raises(InputError, match="signing request is damaged"):
        authority.redeem(secret, b"none")
    authority.redeem(secret, request())


def test_a_secret_of_nobody(authority: Authority) -> None:
    authority.invite("north", DAY, SERVER)
    for secret in ("", "x" * 43, "ä"):
        with pytest.raises(InputError, match="no open invitation has this secret"):
            authority.redeem(secret, request())


def test_a_new_invitation_replaces_the_open_one(authority: Authority) -> None:
    old, new = (secret_of(authority.invite("north", DAY, SERVER)) for _ in range(2))
    assert len(authority.invitations()) == 1
    with pytest.raises(InputError, match="no open invitation"):
        authority.redeem(old, request())
    authority.redeem(new, request())


@pytest.mark.parametrize("time", [timedelta(0), -DAY, 31 * DAY])
def test_invitations_expire(time: timedelta, authority: Authority) -> None:
    with pytest.raises(InputError, match="expected up to 30 days"):
        authority.invite("north", time, SERVER)


def test_a_name_with_a_valid_certificate_is_not_invited_again(authority: Authority, clock: Clock) -> None:
    old = authority.issue(request(), "north")
    with pytest.raises(InputError, match=r"north has a valid certificate.*ca revoke north.*--replace"):
        authority.invite("north", DAY, SERVER)
    assert in_force(authority, old)
    authority.invite("north", DAY, SERVER, replace=True)
    assert not in_force(authority, old)
    authority.issue(request(), "south")
    clock.now += 91 * DAY
    authority.invite("south", DAY, SERVER)


def test_a_revoked_name_has_nothing_left(authority: Authority) -> None:
    line = authority.invite("north", DAY, SERVER)
    certificates = [authority.redeem(secret_of(line), mine := request()), authority.issue(request(), "north")]
    other = authority.issue(request(), "south")
    assert authority.revoke("north") == 2
    assert [in_force(authority, one) for one in (*certificates, other)] == [False, False, True]
    with pytest.raises(InputError, match="no open invitation"):
        authority.redeem(secret_of(line), mine)
    with pytest.raises(InputError, match="revoked"):
        authority.renew(certificates[0], request())
    assert authority.revoke("north") == 0
    with pytest.raises(InputError, match=r"no client has this name: got nroth. Did you mean north\?"):
        authority.revoke("nroth")


def test_an_invitation_alone_can_be_revoked(authority: Authority) -> None:
    line = authority.invite("north", DAY, SERVER)
    assert authority.revoke("north") == 0
    with pytest.raises(InputError, match="no open invitation"):
        authority.redeem(secret_of(line), request())


def test_renewal(authority: Authority, clock: Clock, tmp_path: Path) -> None:
    old = authority.issue(request(), "north")
    clock.now += 60 * DAY
    new = authority.renew(old, request())
    assert x509.load_pem_x509_certificate(new).subject.rfc4514_string() == "CN=north"
    assert in_force(authority, old)  # until the client has the new one
    clock.now += 31 * DAY
    with pytest.raises(InputError, match="expired"):
        authority.renew(old, request())
    authority.renew(new, request())
    other = Authority.init(tmp_path / "other").issue(request(), "north")
    for foreign in (other, authority.certificate, authority.server_identity().certificate):
        with pytest.raises(InputError, match="not one of this authority's clients"):
            authority.renew(foreign, request())


def test_nobody_fills_the_disk_by_renewing(authority: Authority) -> None:
    certificate = authority.issue(request(), "north")
    for _ in range(9):
        certificate = authority.renew(certificate, request())
    with pytest.raises(InputError, match="10 valid certificates, the most"):
        authority.renew(certificate, request())


def test_the_servers_identity_follows_its_hosts(authority: Authority, clock: Clock) -> None:
    first = authority.server_identity(["Train.Example.org", "192.0.2.1"])
    always = {"localhost", "127.0.0.1", "::1"}
    assert server_names(load_certificate(first.certificate)) == always | {"train.example.org", "192.0.2.1"}
    assert authority.server_identity() == first
    assert authority.server_identity(["127.0.0.1", "train.example.org"]) == first
    authority.invite("north", DAY, "[2001:db8:0::1]:7444")
    second = authority.server_identity()
    assert server_names(load_certificate(second.certificate)) > {"2001:db8::1", "192.0.2.1"}
    assert second.key != first.key
    assert Identity.load(second.folder) == second
    clock.now += 250 * DAY  # the last third of a year
    assert authority.server_identity().not_after > second.not_after
    for host in ("", "a b", "*.example.org", "a/b", "host:1"):
        with pytest.raises(InputError, match="no valid host"):
            authority.server_identity([host])


def test_a_servers_key_that_others_can_read_is_not_quietly_replaced(authority: Authority) -> None:
    (authority.server_identity().folder / "key.pem").chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        authority.server_identity()


def test_two_keys_at_once_and_one_invitation(authority: Authority) -> None:
    secret = secret_of(authority.invite("north", DAY, SERVER))

    def attempt(mine: bytes) -> bool:
        try:
            authority.redeem(secret, mine)
        except FedtrainError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, [request() for _ in range(8)])) == 1
    assert len(authority.issued()) == 1


ISSUING = """
import sys
from pathlib import Path
from fedtrain.link.authority import Authority
from fedtrain.link.identity import new_key_and_request
authority = Authority.open(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for i in range(30):
    authority.issue(new_key_and_request("x")[1], f"{sys.argv[2]}-{i}")
"""


def test_two_processes_at_once(authority: Authority) -> None:
    command = [sys.executable, "-c", ISSUING, authority.folder]
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name in ("a", "b")
    ]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert {one.name for one in authority.issued()} == {f"{name}-{i}" for name in ("a", "b") for i in range(30)}
