"""How a site comes by its certificate and renews it, over gRPC: both ends.

`fedtrain.Enrolment/Enrol` is served on a port of its own, where only the server shows a certificate; the token has told
the site by which authority to know it. `fedtrain.Enrolment/Renew` is served where clients show theirs.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import grpc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtrain.errors import FedtrainError, InputError, RunError, shorten
from fedtrain.link.authority import Authority
from fedtrain.link.certificates import client_of, common_name, load_certificate
from fedtrain.link.identity import Identity, Secret, Token, adopt, pending_request, split_address
from fedtrain.link.register import stamp_of

__all__ = ["add_enrolment", "add_renewal", "enrol", "renew", "server_credentials", "serving"]

_LOG = logging.getLogger("fedtrain.link")
_SERVICE = "fedtrain.Enrolment"
_CAP = 64 * 1024  # bytes of a body, either way
_SECONDS = 20.0  # for one answer
_LOOK = 60.0  # between two looks at the date
_PAUSES = (0.5, 2.0)  # seconds before the second and the third try
_OPTIONS = [
    ("grpc.max_receive_message_length", _CAP),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error
    ("grpc.initial_reconnect_backoff_ms", 200),
]
_REFUSALS = {"Enrol": "the token is not valid", "Renew": "the certificate is not valid"}  # all that a peer is told

_Pem = Annotated[str, Field(max_length=8000)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Enrol(_Body):
    secret: Secret
    request: _Pem


class _Renew(_Body):
    request: _Pem


class _Answer(_Body):
    certificate: _Pem


_Asked = TypeVar("_Asked", bound=_Body)


def add_enrolment(server: grpc.Server, authority: Authority) -> None:
    """Have a server answer `Enrol`: the secret of a token and a request give a certificate."""

    def sign(asked: _Enrol, _: grpc.ServicerContext) -> bytes:
        return authority.redeem(asked.secret, asked.request.encode())

    _add(server, "Enrol", _Enrol, sign)


def add_renewal(server: grpc.Server, authority: Authority) -> None:
    """Have a server that demands clients' certificates answer `Renew`: the certificate and a request give a new one."""

    def sign(asked: _Renew, context: grpc.ServicerContext) -> bytes:
        shown = context.auth_context().get("x509_pem_cert")
        if not shown:
            raise InputError("the peer shows no certificate")
        return authority.renew(shown[0], asked.request.encode())

    _add(server, "Renew", _Renew, sign)


def server_credentials(authority: Authority, hosts: Iterable[str] = (), *, mutual: bool) -> grpc.ServerCredentials:
    """Credentials of a server beside its authority; they follow its certificate's renewal and new hosts.

    Args:
        authority: issues the certificate, and knows the clients'.
        hosts: see `Authority.server_identity`.
        mutual: refuse peers without a certificate of the authority.

    Raises:
        InputError, RunError: as `Authority.server_identity`.
    """
    hosts = tuple(hosts)

    given, looked = authority.server_identity(hosts), time.monotonic()
    stamp = stamp_of(authority.register)
    lock = threading.Lock()

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(given.key, given.certificate)], given.authority if mutual else None
        )

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Look where something can have changed: gRPC asks at every connection, and crashes if told much."""
        nonlocal given, looked, stamp
        with lock:
            if time.monotonic() - looked < _LOOK and stamp_of(authority.register) == stamp:
                return None
            looked, stamp = time.monotonic(), stamp_of(authority.register)
            try:
                now = authority.server_identity(hosts)
            except FedtrainError as error:
                _LOG.error("The server goes on with the certificate it has: %s", error)
                return None
            if now.certificate == given.certificate:
                return None
            given = now
            return configuration()

    return grpc.dynamic_ssl_server_credentials(configuration(), changed, mutual)


@contextlib.contextmanager
def serving(authority: Authority, listen: str, hosts: Iterable[str] = ()) -> Iterator[str]:
    """Serve enrolment while the block runs.

    Args:
        authority: signs.
        listen: "host:port" to listen on; port 0 takes a free one.
        hosts: by which clients reach it, besides those of the invitations.

    Yields:
        The address it listens on.

    Raises:
        InputError: the address is not valid, not this machine's or taken.
    """
    _, port = split_address(listen)
    credentials = server_credentials(authority, hosts, mutual=False)
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=_OPTIONS)
    add_enrolment(server, authority)
    try:
        bound = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise InputError(
            "cannot listen for enrolments", got=listen, expected="an address of this machine with a free port"
        ) from error
    server.start()
    try:
        yield listen.removesuffix(str(port)) + str(bound)
    finally:
        server.stop(grace=2).wait()


def enrol(line: str, folder: Path) -> Identity:
    """Redeem a token: make a key that never leaves the folder, and have it certified.

    If it is cut short at any moment, or the answer is lost, the same call can be made again.

    Args:
        line: the token.
        folder: of the identity; it may exist.

    Raises:
        InputError: the token or the server's answer is not valid, the server refuses, or the folder has an identity
            that is still valid.
        RunError: the server cannot be reached, or the folder cannot be written.
    """
    token = Token.read(line)
    with _held(folder):
        _refuse_valid(folder)
        asked = _Enrol(secret=token.secret, request=pending_request(folder, token.name).decode())
        credentials = grpc.ssl_channel_credentials(token.authority)
        certificate = _ask(token.server, credentials, "Enrol", asked)
        return _adopt(folder, certificate, token.authority, token.name)


def renew(folder: Path, address: str) -> Identity:
    """Have an identity certified anew, with a new key.

    Args:
        folder: of the identity, which is valid; it stays so until the new one is whole.
        address: "host:port" of the server at which clients show their certificates.

    Raises:
        InputError: the identity or the server's answer is not valid, or the server refuses.
        RunError: the server cannot be reached, or the folder cannot be written.
    """
    with _held(folder):
        old = Identity.load(folder)
        asked = _Renew(request=pending_request(folder, old.name).decode())
        certificate = _ask(address, old.channel_credentials(), "Renew", asked)
        return _adopt(folder, certificate, old.authority, old.name)


def _add(
    server: grpc.Server, method: str, kind: type[_Asked], sign: Callable[[_Asked, grpc.ServicerContext], bytes]
) -> None:
    def answer(body: bytes, context: grpc.ServicerContext) -> bytes | None:
        peer = shorten(context.peer())
        try:
            if len(body) > _CAP:
                raise InputError("the request is too large", got=f"{len(body):,} bytes", expected=f"at most {_CAP:,}")
            certificate = sign(kind.model_validate_json(body), context)
        except (InputError, ValidationError) as error:
            # The reason is for the log. What pydantic says would show the secret.
            reason = "the request is malformed" if isinstance(error, ValidationError) else error
            _LOG.warning("%s refused to %s: %s", method, peer, reason)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, _REFUSALS[method])
        except Exception as error:
            _LOG.error("%s failed for %s: %s", method, peer, error, exc_info=not isinstance(error, FedtrainError))
            context.abort(grpc.StatusCode.UNAVAILABLE, "try again later")
        else:
            _LOG.info("%s: signed for %s at %s", method, client_of(load_certificate(certificate)), peer)
            return _Answer(certificate=certificate.decode()).model_dump_json().encode()
        return None  # never reached: abort raises

    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {method: handler}),))


def _ask(address: str, credentials: grpc.ChannelCredentials, method: str, asked: _Body) -> bytes:
    """Ask for a certificate, up to three times while the server cannot be reached."""
    split_address(address)
    body = asked.model_dump_json().encode()
    with grpc.secure_channel(f"dns:///{address}", credentials, options=_OPTIONS) as channel:
        call = channel.unary_unary(f"/{_SERVICE}/{method}")
        for pause in (*_PAUSES, None):
            try:
                content = call(body, timeout=_SECONDS)
                break
            except grpc.RpcError as error:
                if pause is None or not _may_pass(error):
                    raise _named(error, address, method) from error
                time.sleep(pause)
    try:
        return _Answer.model_validate_json(content).certificate.encode()
    except ValidationError as error:
        raise InputError("the server's answer is malformed", got=address) from error


def _may_pass(error: grpc.RpcError) -> bool:
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED) and not _distrusts(error)


def _distrusts(error: grpc.RpcError) -> bool:
    """Whether it was this end that refused the other's certificate."""
    return any(text in (error.details() or "") for text in ("CERTIFICATE_VERIFY_FAILED", "Verification Check failed"))


def _named(error: grpc.RpcError, address: str, method: str) -> FedtrainError:
    if error.code() == grpc.StatusCode.PERMISSION_DENIED:
        hint = {
            "Enrol": "It may be used, withdrawn or expired: ask for a new one (fedtrain ca invite NAME)",
            "Renew": "It may be revoked: ask who runs the server",
        }
        return InputError(f"the server says that {_REFUSALS[method]}", got=address, hint=hint[method])
    said = " ".join((error.details() or error.code().name).rpartition("last error: ")[2].split())
    cause = shorten(said if len(said) <= 110 else f"…{said[-109:]}", 110)  # the cause comes last
    if _distrusts(error):
        return InputError(
            f"the server cannot be trusted ({cause})",
            got=address,
            expected="a certificate of our authority for this address",
            hint="Nothing was sent. Check the address, both clocks, and that the server uses the right --ca folder",
        )
    return RunError(
        f"the server at {address} does not answer ({cause})",
        hint="Check the address and the network, and run the same command again: nothing is lost",
    )


def _adopt(folder: Path, certificate: bytes, authority: bytes, name: str) -> Identity:
    if client_of(load_certificate(certificate)) != name:
        raise InputError("the server's certificate is not made out to us", expected=name)
    return adopt(folder, certificate, authority)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the folder, hold it against a second process, and name what the disk refuses."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / ".lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError("another process is changing this identity", got=folder) from error
            yield
    except OSError as error:
        raise RunError(
            f"the identity's folder cannot be written ({error.strerror})",
            got=folder,
            hint="Free some space or make it writable, and run the same command again: nothing is lost",
        ) from error


def _refuse_valid(folder: Path) -> None:
    """Refuse a folder whose certificate is still good; one that is damaged or expired may be replaced."""
    try:
        old = load_certificate((folder / "certificate.pem").read_bytes())
    except (FileNotFoundError, InputError):
        return
    if datetime.now(UTC) <= old.not_valid_after_utc:
        raise InputError(
            f"there is a valid identity of {common_name(old)} already",
            got=folder,
            hint="Name another folder, or move this one away if it is to be replaced",
        )
