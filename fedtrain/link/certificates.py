"""Keys, requests and certificates: what fedtrain makes of them, and what it takes. No files."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtrain.errors import InputError

__all__ = [
    "NAME",
    "Issuer",
    "Key",
    "client_of",
    "common_name",
    "is_issued_by",
    "key_pem",
    "load_certificate",
    "load_key",
    "load_request",
    "make_request",
    "new_key",
    "pem",
    "self_signed",
    "server_names",
]

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a client; never a path such as ".."
Key = ec.EllipticCurvePrivateKey

_BACKDATED = timedelta(hours=1)  # the clocks of sites differ
_AUTHORITY_LIFE = timedelta(days=3650)
_PEM = serialization.Encoding.PEM
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
_DAMAGED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


def new_key() -> Key:
    """Make an ECDSA key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """A private key in PEM, without a password."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate in PEM."""
    return certificate.public_bytes(_PEM)


def load_key(content: bytes, source: Path) -> Key:
    """Read a private key in PEM.

    Args:
        content: what was read.
        source: from where, for the error.

    Raises:
        InputError: it is none, or not ECDSA on P-256.
    """
    try:
        key = serialization.load_pem_private_key(content, None)
    except _DAMAGED as error:
        raise InputError(f"the private key {source} is damaged", expected="PEM without a password") from error
    _check_kind(key.public_key())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def load_certificate(content: bytes, source: Path | None = None) -> x509.Certificate:
    """Read a certificate in PEM.

    Args:
        content: what was read.
        source: from where, for the error; None for a peer's.

    Raises:
        InputError: it is none.
    """
    try:
        certificate = x509.load_pem_x509_certificate(content)
        _ = certificate.public_key(), certificate.subject, certificate.extensions  # parsed only when they are read
    except _DAMAGED as error:
        raise InputError(f"the certificate {source or 'of the peer'} is damaged", expected="PEM") from error
    return certificate


def make_request(key: Key, name: str) -> bytes:
    """Make a signing request in PEM."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(name)).sign(key, hashes.SHA256())
    return request.public_bytes(_PEM)


def load_request(content: bytes) -> ec.EllipticCurvePublicKey:
    """Read a signing request in PEM; of all that it says, only the key counts.

    Raises:
        InputError: it is none, its signature does not match, or its key is not ECDSA on P-256.
    """
    try:
        request = x509.load_pem_x509_csr(content)
        key, signed = request.public_key(), request.is_signature_valid
    except _DAMAGED as error:
        raise InputError("a signing request is damaged", expected="a PKCS #10 request in PEM") from error
    if not signed:
        raise InputError("a signing request was changed: its signature does not match")
    return _check_kind(key)


def common_name(certificate: x509.Certificate) -> str | None:
    """Its one common name."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else None


def client_of(certificate: x509.Certificate) -> str | None:
    """The name of the client whose certificate it is; None if it is no client's."""
    usages = _extension(certificate, x509.ExtendedKeyUsage)
    return common_name(certificate) if usages is not None and ExtendedKeyUsageOID.CLIENT_AUTH in usages else None


def server_names(certificate: x509.Certificate) -> set[str]:
    """The hosts and addresses that a server's certificate is good for."""
    names = _extension(certificate, x509.SubjectAlternativeName)
    return set() if names is None else {str(name.value) for name in names}


def is_issued_by(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    """Whether a whole root has signed it; dates apart."""
    try:
        root.verify_directly_issued_by(root)
        certificate.verify_directly_issued_by(root)
    except (*_DAMAGED, InvalidSignature):
        return False
    return True


def self_signed(key: Key, now: datetime) -> x509.Certificate:
    """Make an authority's certificate: ten years, and no authorities below it."""
    subject = _subject(f"fedtrain authority {secrets.token_hex(4)}")
    return (
        _builder(subject, key.public_key(), now, now + _AUTHORITY_LIFE)
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA256())
    )


@dataclass(frozen=True)
class Issuer:
    """What signs: the authority's certificate and key."""

    root: x509.Certificate
    key: Key

    def client(self, name: str, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta) -> x509.Certificate:
        """Make a client's certificate."""
        alternatives = [x509.DNSName(name)]
        return self._sign(
            _builder(_subject(name), key, now, self._end(now, life)), alternatives, ExtendedKeyUsageOID.CLIENT_AUTH
        )

    def server(
        self, hosts: Sequence[str], key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
    ) -> x509.Certificate:
        """Make a server's certificate, good for these host names and addresses."""
        alternatives = [_host(host) for host in hosts]
        builder = _builder(_subject("fedtrain server"), key, now, self._end(now, life))
        return self._sign(builder, alternatives, ExtendedKeyUsageOID.SERVER_AUTH)

    def _end(self, now: datetime, life: timedelta) -> datetime:
        return min(now + life, self.root.not_valid_after_utc)

    def _sign(
        self, builder: x509.CertificateBuilder, alternatives: Sequence[x509.GeneralName], purpose: x509.ObjectIdentifier
    ) -> x509.Certificate:
        return (
            builder.issuer_name(self.root.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*named: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in named for usage in _USAGES})


def _check_kind(key: object) -> ec.EllipticCurvePublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        curve = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else None
        raise InputError(
            "a key is of another kind",
            got=curve or type(key).__name__.removesuffix("PublicKey"),
            expected="ECDSA on the curve P-256",
        )
    return key


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
