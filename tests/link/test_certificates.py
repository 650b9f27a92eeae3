import base64
import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given
from hypothesis import strategies as st

from fedtrain.errors import InputError
from fedtrain.link.certificates import (
    Issuer,
    client_of,
    common_name,
    is_issued_by,
    load_certificate,
    load_request,
    make_request,
    new_key,
    self_signed,
    server_names,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
KEY = new_key()
REQUEST = make_request(KEY, "north")


ROOT_KEY = new_key()
ROOT = self_signed(ROOT_KEY, NOW)
CLIENT = Issuer(ROOT, ROOT_KEY).client("north", KEY.public_key(), NOW, DAY)


@pytest.fixture
def issuer() -> Issuer:
    return Issuer(ROOT, ROOT_KEY)


def test_what_another_verifier_says(issuer: Issuer) -> None:
    """An independent check of the whole chain, its extensions and purposes: a client is no server, nor the reverse."""
    client = issuer.client("north", KEY.public_key(), NOW, DAY)
    server = issuer.server(["train.example.org", "::1"], KEY.public_key(), NOW, DAY)
    policy = PolicyBuilder().store(Store([issuer.root])).time(NOW)
    policy.build_client_verifier().verify(client, [])
    policy.build_server_verifier(x509.DNSName("train.example.org")).verify(server, [])
    with pytest.raises(x509.verification.VerificationError):
        policy.build_client_verifier().verify(server, [])
    with pytest.raises(x509.verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("north")).verify(client, [])
    with pytest.raises(x509.verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("other.example.org")).verify(server, [])


def test_what_a_certificate_says(issuer: Issuer) -> None:
    client = issuer.client("north", KEY.public_key(), NOW, DAY)
    server = issuer.server(["train.example.org", "::1", "127.0.0.1"], KEY.public_key(), NOW, DAY)
    assert (client_of(client), client_of(server), client_of(issuer.root)) == ("north", None, None)
    assert server_names(client) == {"north"}
    assert server_names(server) == {"train.example.org", "::1", "127.0.0.1"}
    assert (client.not_valid_before_utc, client.not_valid_after_utc) == (NOW - timedelta(hours=1), NOW + DAY)
    assert client.public_key() == KEY.public_key()


def test_nothing_outlives_the_authority(issuer: Issuer) -> None:
    client = issuer.client("north", KEY.public_key(), NOW + 3649 * DAY, 90 * DAY)
    assert client.not_valid_after_utc == issuer.root.not_valid_after_utc


def test_a_certificate_of_another_authority_with_the_same_name(issuer: Issuer) -> None:
    client = issuer.client("north", KEY.public_key(), NOW, DAY)
    assert is_issued_by(client, issuer.root)
    assert not is_issued_by(Issuer(issuer.root, new_key()).client("north", KEY.public_key(), NOW, DAY), issuer.root)
    assert not is_issued_by(client, self_signed(new_key(), NOW))


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
)
def test_keys_of_another_kind(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
    with pytest.raises(InputError, match=r"another kind: got (RSA|secp384r1|Ed25519); expected ECDSA on the"):
        load_request(request.public_bytes(serialization.Encoding.PEM))


def test_only_the_key_of_a_request_counts() -> None:
    assert load_request(make_request(KEY, "somebody else")) == KEY.public_key()


def der(whole: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return whole.public_bytes(serialization.Encoding.DER)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut anywhere, or with one byte changed."""
    changed, place = bytearray(content), draw(st.integers(0, len(content) - 1))
    if draw(st.booleans()):
        del changed[place:]
    else:
        changed[place] ^= draw(st.integers(1, 255))
    return bytes(changed)


def in_pem(kind: str, der: bytes) -> bytes:
    return b"-----BEGIN %s-----\n%s-----END %s-----\n" % (kind.encode(), base64.encodebytes(der), kind.encode())


def test_a_request_that_was_changed() -> None:
    with pytest.raises(InputError, match="was changed: its signature does not match"):
        load_request(in_pem("CERTIFICATE REQUEST", der(x509.load_pem_x509_csr(REQUEST)).replace(b"north", b"south")))


@given(data=st.data())
def test_a_request_that_is_damaged(data: st.DataObject) -> None:
    """Padding alone is not signed."""
    content = data.draw(damaged(der(x509.load_pem_x509_csr(REQUEST))))
    with contextlib.suppress(InputError):
        assert load_request(in_pem("CERTIFICATE REQUEST", content)) == KEY.public_key()


@pytest.mark.filterwarnings("ignore:Parsed a serial number which wasn't positive")
@pytest.mark.parametrize("certificate", [ROOT, CLIENT])
@given(data=st.data())
def test_a_certificate_that_is_damaged(certificate: x509.Certificate, data: st.DataObject) -> None:
    with contextlib.suppress(InputError):
        read = load_certificate(in_pem("CERTIFICATE", data.draw(damaged(der(certificate)))))
        common_name(read), client_of(read), server_names(read)
        if is_issued_by(*(read, ROOT) if certificate is CLIENT else (CLIENT, read)):
            assert read.tbs_certificate_bytes == certificate.tbs_certificate_bytes


@given(st.binary(max_size=400))
def test_any_other_bytes_are_no_request(content: bytes) -> None:
    with pytest.raises(InputError):
        load_request(content)
