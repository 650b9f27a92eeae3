import base64
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from fedtrain.errors import InputError
from fedtrain.link import identity as module
from fedtrain.link.authority import Authority
from fedtrain.link.certificates import common_name, load_request
from fedtrain.link.identity import (
    Identity,
    Token,
    adopt,
    new_key_and_request,
    peer_name,
    pending_request,
    split_address,
    write_private,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "ca")


def site(authority: Authority, folder: Path, name: str = "north") -> Identity:
    folder.mkdir(exist_ok=True)
    return adopt(folder, authority.issue(pending_request(folder, name), name), authority.certificate)


@pytest.fixture
def folder(authority: Authority, tmp_path: Path) -> Path:
    return site(authority, tmp_path / "north").folder


def test_it_is_read_as_it_was_made(authority: Authority, tmp_path: Path) -> None:
    made = site(authority, tmp_path / "north")
    assert Identity.load(tmp_path / "north") == made
    assert (made.name, made.authority) == ("north", authority.certificate)
    assert made.serial == x509.load_pem_x509_certificate(made.certificate).serial_number
    assert "PRIVATE" not in repr(made)
    assert {path.name for path in made.folder.iterdir()} == {"key.pem", "certificate.pem", "authority.pem"}
    assert (made.folder / "key.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(folder: Path, mode: int) -> None:
    (folder / "key.pem").chmod(mode)
    with pytest.raises(InputError, match=f"got mode {mode:04o}; expected 0600. Run: chmod 600 {folder}/key.pem"):
        Identity.load(folder)


def test_the_dates_are_checked_and_named(folder: Path) -> None:
    made = Identity.load(folder)
    with pytest.raises(InputError, match=f"expired on {made.not_after:%Y-%m-%d %H:%M} UTC"):
        Identity.load(folder, made.not_after + timedelta(seconds=1))
    with pytest.raises(InputError, match=f"not valid before {made.not_before:%Y-%m-%d %H:%M} UTC.*Set the clock"):
        Identity.load(folder, made.not_before - timedelta(seconds=1))
    Identity.load(folder, datetime.now(UTC) - timedelta(minutes=9))  # sites' clocks differ


def test_it_is_due_in_the_last_third_of_its_life(folder: Path) -> None:
    made = Identity.load(folder)
    due = made.not_before + (made.not_after - made.not_before) * 2 / 3
    assert not made.renew_due(due - timedelta(minutes=1))
    assert made.renew_due(due + timedelta(minutes=1))
    assert not made.renew_due()


@pytest.mark.parametrize("name", ["key.pem", "certificate.pem", "authority.pem"])
def test_files_that_are_missing_damaged_or_anothers(
    name: str, folder: Path, authority: Authority, tmp_path: Path
) -> None:
    path, whole = folder / name, (folder / name).read_bytes()
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        Identity.load(folder)
    write_private(path, whole[:100])
    with pytest.raises(InputError, match=f"{path} is damaged; expected PEM"):
        Identity.load(folder)
    other = site(Authority.init(tmp_path / "other"), tmp_path / "elsewhere").folder
    write_private(path, (other / name).read_bytes())
    with pytest.raises(InputError, match=r"does not belong to the certificate|is not of the authority"):
        Identity.load(folder)


@pytest.mark.parametrize("step", range(3))
def test_a_kill_while_it_is_replaced_leaves_the_old_or_the_new(
    step: int, authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, steps = Identity.load(folder), iter(range(3))

    def killed(write: Callable[..., None]) -> Callable[..., None]:
        def instead(*arguments: object) -> None:
            if next(steps) == step:
                raise KeyboardInterrupt
            write(*arguments)

        return instead

    new = authority.issue(pending_request(folder, "north"), "north")
    with monkeypatch.context() as patch:
        for function in ("atomic_write", "put_in_place"):
            patch.setattr(module, function, killed(getattr(module, function)))
        with pytest.raises(KeyboardInterrupt):
            adopt(folder, new, authority.certificate)
    left = Identity.load(folder)
    assert left.certificate == (new if step == 2 else old.certificate)
    assert site(authority, folder).key != left.key
    assert not (folder / "next-key.pem").exists()


def test_a_certificate_of_another_key_is_not_taken(authority: Authority, folder: Path) -> None:
    old = Identity.load(folder)
    pending_request(folder, "north")
    with pytest.raises(InputError, match="does not belong"):
        adopt(folder, authority.issue(new_key_and_request("north")[1], "north"), authority.certificate)
    assert Identity.load(folder) == old


def test_the_key_that_waits_asks_again(tmp_path: Path) -> None:
    first, second = (load_request(pending_request(tmp_path, "north")) for _ in range(2))
    assert first == second
    assert (tmp_path / "next-key.pem").stat().st_mode & 0o777 == 0o600


def test_a_private_file_is_private_whatever_the_mask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_private(tmp_path / "key.pem", b"secret")
    finally:
        os.umask(before)
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600


def test_a_peer_is_its_certificate(authority: Authority, folder: Path) -> None:
    client = Identity.load(folder)
    assert peer_name({"x509_pem_cert": [client.certificate]}) == ("north", client.serial)
    assert peer_name({"transport_security_type": [b"ssl"]}) is None
    assert peer_name({"x509_pem_cert": [authority.server_identity().certificate]}) is None
    assert peer_name({"x509_pem_cert": [authority.certificate]}) is None
    assert peer_name({"x509_pem_cert": [b"none"]}) is None


def test_a_token_is_one_line_and_survives_mail(authority: Authority) -> None:
    line = authority.invite("north", timedelta(days=1), "localhost:7444")
    assert line.isprintable()
    token = Token.read(f" {line[:70]}\r\n{line[70:]}\n")
    assert token == Token.read(line)
    assert (token.server, token.name, token.authority) == ("localhost:7444", "north", authority.certificate)
    assert token.secret not in repr(token)


@pytest.mark.parametrize(
    "change",
    [
        {"server": "unix:/tmp/socket"},
        {"server": "localhost"},
        {"name": "../north"},
        {"name": "north\n"},
        {"name": 3},
        {"ca": ""},
        {"ca": base64.b64encode(b"\x30\x84\xff\xff\xff\xff").decode()},
        {"ca": "A" * 100_000},
        {"more": 1},
        {"secret": None},
        {"secret": "short"},
    ],
)
def test_a_token_that_lies(change: dict[str, object], authority: Authority) -> None:
    token = Token.read(authority.invite("north", timedelta(days=1), "localhost:7444"))
    document = json.loads(token.model_dump_json()) | change
    line = base64.urlsafe_b64encode(json.dumps(document).encode()).decode()
    with pytest.raises(InputError, match="not a whole token") as caught:
        Token.read(line)
    assert token.secret not in str(caught.value)
    assert caught.value.__cause__ is None


@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
def test_any_other_text_is_no_token(text: str) -> None:
    with pytest.raises(InputError):
        Token.read(text)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("a.example:1", ("a.example", 1)), ("127.0.0.1:7444", ("127.0.0.1", 7444)), ("[::1]:65535", ("::1", 65535))],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", "a", "a:", ":1", "a:65536", "::1:5", "unix:/a", "dns:///a:1", "a:1\n", "a b:1"]
)
def test_no_addresses(address: str) -> None:
    with pytest.raises(InputError, match="no valid address"):
        split_address(address)


def test_the_request_says_the_name() -> None:
    key, request = new_key_and_request("north")
    assert b"PRIVATE" not in request
    assert b"PRIVATE" in key
    assert x509.load_pem_x509_csr(request).subject.rfc4514_string() == "CN=north"


def test_the_common_name_is_the_only_one(authority: Authority) -> None:
    certificate = x509.load_pem_x509_certificate(authority.issue(new_key_and_request("x")[1], "north"))
    assert common_name(certificate) == "north"
