"""The certificate authority of a consortium: a folder with its key, and the register of what it has issued."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import ipaddress
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtrain.disk import atomic_write, put_in_place
from fedtrain.errors import InputError, RunError, nearest
from fedtrain.link.certificates import (
    NAME,
    Issuer,
    client_of,
    is_issued_by,
    key_pem,
    load_certificate,
    load_key,
    load_request,
    new_key,
    pem,
    self_signed,
    server_names,
)
from fedtrain.link.identity import (
    Identity,
    Token,
    adopt,
    pending_request,
    read_private,
    split_address,
    write_private,
)
from fedtrain.link.register import Invitation, Issued, Register, read_register, write_register

__all__ = ["Authority"]

_CLIENT_LIFE = timedelta(days=90)
_SERVER_LIFE = timedelta(days=365)
_LONGEST_INVITATION = timedelta(days=30)  # well within a client's life, so that what it gave is still good
_MOST_VALID = 10  # certificates of one name at once: a client cannot fill the disk by renewing
_ALWAYS = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?")


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Authority:
    """An authority that exists; `init` makes one. Any number of processes and threads may use it at once.

    Args:
        folder: with key.pem, certificate.pem and register.json.
        clock: the time in UTC.

    Attributes:
        certificate: the authority's own, in PEM.
        register: the file that `Revocations` reads.

    Raises:
        InputError: there is none, it does not fit together, is expired, or its key can be read by others.
        RunError: its register is damaged.
    """

    def __init__(self, folder: Path, clock: Callable[[], datetime] = _utc_now) -> None:
        self.folder, self._clock = folder, clock
        self.register = folder / "register.json"
        key, certificate = folder / "key.pem", folder / "certificate.pem"
        if not key.exists() or not certificate.exists():
            raise InputError(
                "there is no certificate authority here", got=folder, hint="Make one with: fedtrain ca init"
            )
        self.certificate = certificate.read_bytes()
        self._issuer = Issuer(load_certificate(self.certificate, certificate), load_key(read_private(key), key))
        root = self._issuer.root
        if not is_issued_by(root, root) or root.public_key() != self._issuer.key.public_key():
            raise InputError("the authority's key does not belong to its certificate", got=folder)
        if clock() > root.not_valid_after_utc:
            raise InputError(
                f"the authority expired on {root.not_valid_after_utc:%Y-%m-%d}",
                got=folder,
                hint="Make a new one in another folder, and invite every site again",
            )
        read_register(self.register)

    @classmethod
    def init(cls, folder: Path, clock: Callable[[], datetime] = _utc_now) -> Authority:
        """Make a new authority, whole or not at all.

        Args:
            folder: must not exist, or be empty.
            clock: the time in UTC.

        Raises:
            InputError: there is something in the folder, or it cannot be made.
        """
        key = new_key()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                write_private(draft / "key.pem", key_pem(key))
                root = pem(self_signed(key, clock()))
                atomic_write(draft / "certificate.pem", lambda file: file.write(root))
                write_register(draft / "register.json", Register())
                put_in_place(draft, folder)  # which refuses to replace a folder that is not empty
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        except OSError as error:
            raise InputError(
                f"cannot make a certificate authority ({error.strerror})",
                got=folder,
                expected="a folder that does not exist, or is empty",
                hint="Replacing an authority means that every site has to enrol again",
            ) from error
        return cls(folder, clock)

    @classmethod
    def open(cls, folder: Path, clock: Callable[[], datetime] = _utc_now) -> Authority:
        """Open an authority: the constructor by another name, beside `init`."""
        return cls(folder, clock)

    def issue(self, request: bytes, name: str) -> bytes:
        """Sign a client's request.

        Args:
            request: in PEM; only its key counts.
            name: of the client.

        Returns:
            The certificate in PEM, for 90 days.

        Raises:
            InputError: the request or the name is not valid, or the name has ten valid certificates.
            RunError: the register cannot be written; nothing was issued.
        """
        with self._changing() as register:
            return self._issue(register, load_request(request), name)

    def invite(self, name: str, valid_for: timedelta, server: str, *, replace: bool = False) -> str:
        """Invite a client; an open invitation of the same name is withdrawn.

        Args:
            name: of the client.
            valid_for: until when it may enrol; at most 30 days.
            server: "host:port" where clients reach the enrolment server.
            replace: revoke the valid certificates of the name.

        Returns:
            The token, one line. It lets its holder enrol: send it on a channel you trust.

        Raises:
            InputError: an argument is not valid, or the name has a valid certificate.
            RunError: the register cannot be written.
        """
        _check_name(name)
        host, _ = split_address(server)
        if not timedelta(0) < valid_for <= _LONGEST_INVITATION:
            raise InputError("no valid time for an invitation", got=str(valid_for), expected="up to 30 days")
        secret = secrets.token_urlsafe(32)
        with self._changing() as register:
            if replace:
                self._revoke(register, name)
            elif self._valid(register, name):
                raise InputError(
                    f"{name} has a valid certificate",
                    hint=f"Revoke it first: fedtrain ca revoke {name}, or invite with --replace",
                )
            _withdraw(register, name)
            register.invitations.append(
                Invitation(name=name, secret_sha256=_sha256(secret), server=server, expires=self._clock() + valid_for)
            )
            _add_hosts(register, [host])
        return Token.of(server, secret, name, self._issuer.root).line()

    def redeem(self, secret: str, request: bytes) -> bytes:
        """Sign the request of an invited client.

        The invitation is then bound to the request's key: the same key gets the same certificate again, in case the
        answer was lost, and another key gets none.

        Raises:
            InputError: no invitation has this secret, it has expired, was used by another key, or the request is not
                valid. The text is for the log; a peer is not told.
            RunError: the register cannot be written; nothing was issued.
        """
        with self._changing() as register:
            digest = _sha256(secret)
            found = [one for one in register.invitations if hmac.compare_digest(one.secret_sha256, digest)]
            if not found:
                raise InputError("no open invitation has this secret")
            invitation = found[0]
            if invitation.state(self._clock())[0] == "expired":
                raise InputError(f"the invitation of {invitation.name} expired on {invitation.expires:%Y-%m-%d %H:%M}")
            key = load_request(request)
            if invitation.certificate is None:
                invitation.certificate = self._issue(register, key, invitation.name).decode()
            elif load_certificate(invitation.certificate.encode()).public_key() != key:
                raise InputError(f"the invitation of {invitation.name} was used by another key")
            return invitation.certificate.encode()

    def renew(self, certificate: bytes, request: bytes) -> bytes:
        """Sign a new request of a client that shows its valid certificate.

        Args:
            certificate: the one it has, in PEM.
            request: in PEM; only its key counts, the name stays.

        Raises:
            InputError: the certificate is not of this authority, revoked, expired or no client's, or as `issue`.
            RunError: the register cannot be written; nothing was issued.
        """
        old = load_certificate(certificate)
        name = client_of(old)
        if name is None or not is_issued_by(old, self._issuer.root):
            raise InputError("the certificate is not one of this authority's clients")
        with self._changing() as register:
            if not any(int(one.serial, 16) == old.serial_number for one in self._valid(register, name)):
                raise InputError(f"the certificate of {name} is revoked, expired or not in the register")
            return self._issue(register, load_request(request), name)

    def revoke(self, name: str) -> int:
        """Revoke all certificates of a client, and withdraw its invitation.

        Returns:
            How many valid certificates there were.

        Raises:
            InputError: there never was a client of this name.
            RunError: the register cannot be written; nothing was revoked.
        """
        with self._changing() as register:
            known = {one.name for one in register.issued if one.kind == "client"}
            known |= {one.name for one in register.invitations}
            if name not in known:
                raise InputError("no client has this name", got=name, hint=nearest(name, sorted(known)))
            _withdraw(register, name)
            return self._revoke(register, name)

    def issued(self) -> list[Issued]:
        """Every certificate in the order of issue, servers' included."""
        return read_register(self.register).issued

    def invitations(self) -> list[Invitation]:
        """Every client's last invitation: open, redeemed or expired."""
        return read_register(self.register).invitations

    def server_identity(self, hosts: Iterable[str] = ()) -> Identity:
        """The server's identity, issued where there is none, or none that is good for its hosts.

        Args:
            hosts: names and addresses by which clients reach it, besides localhost and the hosts of all invitations.

        Returns:
            The identity, for a year; it lies in the authority's folder.

        Raises:
            InputError: a host is not valid, or the server's key can be read by others.
            RunError: the folder cannot be written.
        """
        folder = self.folder / "server"
        with self._changing() as register:
            _add_hosts(register, hosts)
            wanted = sorted({*_ALWAYS, *register.hosts})
            if (folder / "key.pem").exists():
                read_private(folder / "key.pem")  # one that others could read is not quietly replaced
            with contextlib.suppress(InputError):
                current = Identity.load(folder, self._clock())
                fits = current.authority == self.certificate and not current.renew_due(self._clock())
                if fits and server_names(load_certificate(current.certificate)) == set(wanted):
                    return current
            folder.mkdir(mode=0o700, exist_ok=True)
            key = load_request(pending_request(folder, "server"))
            signed = self._issuer.server(wanted, key, self._clock(), _SERVER_LIFE)
            _enter(register, signed, "fedtrain server", "server")
            return adopt(folder, pem(signed), self.certificate, self._clock())

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Register]:
        """Hold the register against every other process and thread, and write it if the block has changed it."""
        try:
            with (self.folder / ".lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                register = read_register(self.register)
                before = register.model_copy(deep=True)
                yield register
                if register != before:
                    write_register(self.register, register)
        except OSError as error:
            raise RunError(
                f"the authority's folder cannot be written ({error.strerror})",
                got=self.folder,
                hint="Nothing was issued or revoked: free some space or make it writable, and try again",
            ) from error

    def _issue(self, register: Register, key: ec.EllipticCurvePublicKey, name: str) -> bytes:
        _check_name(name)
        if len(self._valid(register, name)) >= _MOST_VALID:
            raise InputError(
                f"{name} has {_MOST_VALID} valid certificates, the most there may be",
                hint=f"Invite it anew: fedtrain ca invite {name} --replace",
            )
        signed = self._issuer.client(name, key, self._clock(), _CLIENT_LIFE)
        _enter(register, signed, name, "client")
        return pem(signed)

    def _valid(self, register: Register, name: str) -> list[Issued]:
        now = self._clock()
        return [one for one in register.issued if (one.name, one.kind) == (name, "client") and one.valid(now)]

    def _revoke(self, register: Register, name: str) -> int:
        valid = self._valid(register, name)
        for one in valid:
            one.revoked_at = self._clock()
        return len(valid)


def _enter(register: Register, signed: x509.Certificate, name: str, kind: Literal["client", "server"]) -> None:
    serial = f"{signed.serial_number:x}"
    register.issued.append(Issued(name=name, kind=kind, serial=serial, not_after=signed.not_valid_after_utc))


def _withdraw(register: Register, name: str) -> None:
    register.invitations = [one for one in register.invitations if one.name != name]


def _add_hosts(register: Register, hosts: Iterable[str]) -> None:
    register.hosts = sorted({*register.hosts, *map(_normal, hosts)} - {*_ALWAYS})


def _normal(host: str) -> str:
    """A host as certificates spell it."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host.lower()):
            raise InputError("no valid host", got=host, expected="a DNS name or an IP address") from None
        return host.lower()


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise InputError(
            "no valid name for a client",
            got=name,
            expected="1 to 64 letters, digits, dots, dashes and underscores, with a letter or digit first",
        )


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
