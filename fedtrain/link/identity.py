"""Who a process is: a private key that never leaves its folder, and a certificate that the authority signed."""

from __future__ import annotations

import base64
import functools
import os
import re
import ssl
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import BaseModel, ConfigDict, Field

from fedtrain.disk import atomic_write, put_in_place
from fedtrain.errors import InputError
from fedtrain.link.certificates import (
    NAME,
    client_of,
    common_name,
    is_issued_by,
    key_pem,
    load_certificate,
    load_key,
    make_request,
    new_key,
)

__all__ = [
    "Identity",
    "Secret",
    "Token",
    "adopt",
    "new_key_and_request",
    "peer_name",
    "pending_request",
    "read_private",
    "split_address",
    "write_private",
]

_ANEW = "Restore the folder from one backup, or ask for a new invitation"
_KEY, _NEXT_KEY, _CERTIFICATE, _AUTHORITY = "key.pem", "next-key.pem", "certificate.pem", "authority.pem"
_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]{2,45})\]|(?P<host>[A-Za-z0-9._-]{1,253})):(?P<port>[0-9]{1,5})")

Secret = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$", repr=False)]  # 256 bits


@dataclass(frozen=True)
class Identity:
    """A key, its certificate, and the authority by which it knows its peers.

    Attributes:
        folder: where it lies.
        key, certificate, authority: as PEM.
        name: the certificate's common name.
        serial: the certificate's serial number.
        not_before, not_after: from when until when the certificate is valid, in UTC.
    """

    folder: Path
    key: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    authority: bytes = field(repr=False)
    name: str
    serial: int
    not_before: datetime
    not_after: datetime

    @classmethod
    def load(cls, folder: Path, now: datetime | None = None) -> Identity:
        """Read an identity and check it wholly.

        Args:
            folder: with key.pem, certificate.pem and authority.pem.
            now: the time at which it must be valid; this moment unless given.

        Raises:
            InputError: a file is missing, damaged or does not fit the others, the key can be read by others, or the
                certificate is expired or not yet valid.
        """
        certificate, authority = (_read(folder / name) for name in (_CERTIFICATE, _AUTHORITY))
        # An exchange that was killed between its last two steps has left the key under its first name.
        waiting = folder / _NEXT_KEY
        path = waiting if waiting.exists() and _belongs(waiting, certificate) else folder / _KEY
        return cls.checked(folder, read_private(path), certificate, authority, now)

    @classmethod
    def checked(
        cls, folder: Path, key: bytes, certificate: bytes, authority: bytes, now: datetime | None = None
    ) -> Identity:
        """Make an identity of what is in its files.

        Raises:
            InputError: they are damaged or do not fit each other, or the certificate is not valid at this time.
        """
        ours = load_certificate(certificate, folder / _CERTIFICATE)
        root = load_certificate(authority, folder / _AUTHORITY)
        if load_key(key, folder / _KEY).public_key() != ours.public_key():
            raise InputError("the private key does not belong to the certificate", got=folder, hint=_ANEW)
        if not is_issued_by(ours, root):
            raise InputError("the certificate is not of the authority beside it", got=folder, hint=_ANEW)
        name = common_name(ours)
        if name is None:
            raise InputError("the certificate does not name its owner", got=folder, hint=_ANEW)
        for kind, one in (("certificate", ours), ("authority's certificate", root)):
            _check_dates(f"the {kind} in {folder}", one, now or datetime.now(UTC))
        dates = ours.not_valid_before_utc, ours.not_valid_after_utc
        return cls(folder, key, certificate, authority, name, ours.serial_number, *dates)

    def renew_due(self, now: datetime | None = None) -> bool:
        """Whether the last third of the certificate's life has begun."""
        return (now or datetime.now(UTC)) >= self.not_after - (self.not_after - self.not_before) / 3

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client: it shows its certificate, and knows servers by the authority."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server: peers without a certificate of the authority are refused."""
        return grpc.ssl_server_credentials([(self.key, self.certificate)], self.authority, require_client_auth=True)


class Token(BaseModel):
    """What an invited site is given: where to enrol, as whom, by which secret, and how to know the server."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    server: Annotated[str, Field(max_length=300)]  # host:port
    secret: Secret
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    ca: Annotated[str, Field(max_length=8000)]  # the authority's certificate: base64 of DER

    @classmethod
    def of(cls, server: str, secret: str, name: str, authority: x509.Certificate) -> Token:
        """Make the token of an invitation."""
        der = authority.public_bytes(serialization.Encoding.DER)
        return cls(server=server, secret=secret, name=name, ca=base64.b64encode(der).decode())

    @classmethod
    def read(cls, line: str) -> Token:
        """Read a token.

        Raises:
            InputError: it is none, or not whole.
        """
        text = "".join(line.split())  # mail programs break lines
        try:
            token = cls.model_validate_json(base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True))
            split_address(token.server)
            root = load_certificate(token.authority)
            if not is_issued_by(root, root):
                raise ValueError("the authority's certificate was changed")
        except (ValueError, InputError):
            # Without the cause: its text would show the secret.
            raise InputError(
                "this is not a whole token",
                got=f"{len(text):,} characters",
                expected="the one line that `fedtrain ca invite` printed",
            ) from None
        return token

    def line(self) -> str:
        """The token as it is sent to the site."""
        return base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")

    @property
    def authority(self) -> bytes:
        """The authority's certificate in PEM."""
        return ssl.DER_cert_to_PEM_cert(base64.b64decode(self.ca, validate=True)).encode()


def new_key_and_request(name: str) -> tuple[bytes, bytes]:
    """Make a key and the request for its certificate: (key, request), both in PEM."""
    key = new_key()
    return key_pem(key), make_request(key, name)


def pending_request(folder: Path, name: str) -> bytes:
    """Make a new key that is kept, and a request for it; the same key again while no certificate came for it.

    Returns:
        The request in PEM; `adopt` takes its certificate.

    Raises:
        InputError: the key that waits is damaged, or can be read by others.
        OSError: from the file system.
    """
    waiting, certificate = folder / _NEXT_KEY, folder / _CERTIFICATE
    if waiting.exists() and certificate.exists() and _belongs(waiting, certificate.read_bytes()):
        put_in_place(waiting, folder / _KEY)
    if not waiting.exists():
        key, request = new_key_and_request(name)
        write_private(waiting, key)
        return request
    return make_request(load_key(read_private(waiting), waiting), name)


def adopt(folder: Path, certificate: bytes, authority: bytes, now: datetime | None = None) -> Identity:
    """Take the certificate of the key that waits as this folder's identity.

    A kill at any moment leaves the old identity or the new one: the certificate decides which key is in force.

    Raises:
        InputError: the certificate is not of this key, not of this authority, or not valid.
        OSError: from the file system.
    """
    waiting = folder / _NEXT_KEY
    identity = Identity.checked(folder, read_private(waiting), certificate, authority, now)
    atomic_write(folder / _AUTHORITY, lambda file: file.write(authority))
    atomic_write(folder / _CERTIFICATE, lambda file: file.write(certificate))
    put_in_place(waiting, folder / _KEY)
    return identity


def peer_name(auth_context: Mapping[str, Iterable[bytes]]) -> tuple[str, int] | None:
    """Name the client at the other end of a gRPC connection.

    Args:
        auth_context: of the ServicerContext; TLS has verified the certificate in it.

    Returns:
        The name and the serial number of its certificate; None if it has none, or one that is not a client's.
    """
    return next((_peer(certificate) for certificate in auth_context.get("x509_pem_cert", ())), None)


def read_private(path: Path) -> bytes:
    """Read a private key's file.

    Raises:
        InputError: it cannot be read, or others than its owner can read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
    except OSError as error:
        raise InputError(f"the private key {path} cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise InputError(
            f"the private key {path} can be read by others",
            got=f"mode {mode:04o}",
            expected="0600",
            hint=f"Run: chmod 600 {path} (and if somebody may have read it, have it revoked and enrol anew)",
        )
    return content


def write_private(path: Path, content: bytes) -> None:
    """Write a file all or nothing that others than its owner can read at no moment.

    Raises:
        OSError: from the file system; the old file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port", or "[::1]:port", into its parts.

    Raises:
        InputError: it is none. What passes is no other kind of gRPC target, such as "unix:/path".
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found["port"]) > 65535:
        raise InputError("no valid address", got=address, expected="HOST:PORT, such as train.example.org:7444")
    return found["six"] or found["host"], int(found["port"])


@functools.lru_cache(maxsize=1024)
def _peer(content: bytes) -> tuple[str, int] | None:
    try:
        certificate = load_certificate(content)
    except InputError:
        return None
    name = client_of(certificate)
    return None if name is None else (name, certificate.serial_number)


def _belongs(key: Path, certificate: bytes) -> bool:
    ours = load_certificate(certificate, key.with_name(_CERTIFICATE))
    return load_key(read_private(key), key).public_key() == ours.public_key()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"there is no identity here: {path.name} cannot be read ({error.strerror})",
            got=path.parent,
            hint="Enrol first: fedtrain client enroll TOKEN; where the server speaks plain text, --insecure NAME",
        ) from error


def _check_dates(what: str, certificate: x509.Certificate, now: datetime) -> None:
    if now > certificate.not_valid_after_utc:
        raise InputError(
            f"{what} expired on {_date(certificate.not_valid_after_utc)}",
            got=f"{_date(now)} by this machine's clock",
            hint="Ask for a new invitation and enrol again",
        )
    if now < certificate.not_valid_before_utc:
        raise InputError(
            f"{what} is not valid before {_date(certificate.not_valid_before_utc)}",
            got=f"{_date(now)} by this machine's clock",
            hint="Set the clock",
        )


def _date(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
