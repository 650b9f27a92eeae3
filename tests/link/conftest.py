import contextlib
import datetime
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.app import ConfigRecord, Message, RecordDict

from fedtrain import flower
from fedtrain.deployment.remote import Remote, Waits
from fedtrain.errors import FedtrainError
from fedtrain.link.channel import Link, Partial, Task, connect
from fedtrain.link.control import Ack, Farewell, Hello, Offer
from fedtrain.link.frames import pack
from fedtrain.link.hub import Door, Hub
from fedtrain.simulations.grid import SimulationGrid

LIMIT = 1 << 26


class Doorman:
    """Lets everybody in who is not in `objections`, and remembers."""

    def __init__(self) -> None:
        self.objections: dict[str, str] = {}
        self.events: list[tuple[str, str]] = []
        self.changed = threading.Condition()

    def ready(self, name: str, facts: dict[str, Any]) -> str | None:
        self._note("ready", name)
        return self.objections.get(name)

    def left(self, name: str) -> None:
        self._note("left", name)

    def wait_for(self, *events: tuple[str, str]) -> None:
        """Wait until these have happened, each as often as it is listed."""
        with self.changed:
            assert self.changed.wait_for(lambda: all(self.events.count(e) >= events.count(e) for e in events), 30)

    def _note(self, what: str, name: str) -> None:
        with self.changed:
            self.events.append((what, name))
            self.changed.notify_all()


def echo(task: Task, _: Link) -> None:
    """Answer with what was asked."""
    task.submit(pack(task.fetch(LIMIT)))


class Site(threading.Thread):
    """A client: joins, and handles tasks until the end."""

    def __init__(self, address: str, name: str, handle: Callable[[Task, Link], object], **more: Any) -> None:
        super().__init__(name=f"site-{name}")
        self.farewell: Farewell | None = None
        self.error: FedtrainError | None = None
        self.tasks: list[str] = []
        self.acks: list[Ack] = []
        self.handled = threading.Semaphore(0)  # released after each task
        self._address, self._handle = address, handle
        self._instance = more.pop("instance", f"of-{name}")
        self._facts, self._credentials = more.pop("facts", {}), more.pop("credentials", None)
        self._name, self._more = name, more

    def run(self) -> None:
        hello = Hello(version="1", name=self._name, instance=self._instance)
        try:
            with connect(self._address, self._credentials, hello, **self._more) as link:
                link.ready(self._facts)
                for task in link.tasks():
                    self.tasks.append(task.id)
                    ack = self._handle(task, link)
                    if isinstance(ack, Ack):
                        self.acks.append(ack)
                    self.handled.release()
                self.farewell = link.farewell
        except FedtrainError as error:
            self.error = error


class Proxy:
    """Forwards TCP; can cut connections after so many bytes towards the client or from it, or stall."""

    def __init__(self, address: str) -> None:
        self._target = address.rpartition(":")[::2]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_down_after = self.cut_up_after = 1 << 40
        self.stalled = threading.Event()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._target[0], int(self._target[1])))
                self._sockets += [client, server]
                threading.Thread(target=self._forward, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, True), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, down: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and not self.stalled.is_set():
                passed += len(data)
                if passed > (self.cut_down_after if down else self.cut_up_after):
                    break
                target.sendall(data)
        if not self.stalled.is_set():
            for one in (source, target):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


class Net:
    """One hub and its clients, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.doorman = folder, Doorman()
        self._stack, self._sites = contextlib.ExitStack(), list[Site]()
        self.hub: Hub
        self.partial = Partial()

    def serve(self, **door: Any) -> Hub:
        offer = Offer(run="0" * 32, experiment_hash="ab", facts={"rounds": 3})
        self.hub = Hub("127.0.0.1:0", offer, self.doorman, self.folder, Door(**door))
        self._stack.callback(self.hub.close, grace=2)
        self.hub.start()
        return self.hub

    def proxy(self) -> Proxy:
        proxy = Proxy(self.hub.address)
        self._stack.callback(proxy.close)
        return proxy

    def join(self, name: str, handle: Callable[[Task, Link], object] = echo, **more: Any) -> Site:
        """Start a client; see `Doorman.wait_for` for when it is there."""
        site = Site(more.pop("address", self.hub.address), name, handle, **more)
        self._sites.append(site)
        site.start()
        return site

    def grid(self, names: Sequence[str], limit: int = LIMIT, **waits: Any) -> SimulationGrid:
        return SimulationGrid(Remote(self.hub, names, limit, Waits(**waits)), len(names))

    def ask(self, names: Sequence[str], size: int = 1000, **more: Any) -> Iterator[Message]:
        """Ask clients to echo `size` numbers; the group is "1"."""
        grid = self.grid(names, **more)
        content = RecordDict({"arrays": flower.array_record({"w": torch.arange(float(size))})})
        messages = []
        for node in grid.get_node_ids():
            own = RecordDict({**content, "config": ConfigRecord({"name": names[node - 1]})})
            messages.append(grid.create_message(own, "train", node, "1"))
        return grid.send_and_receive(messages)

    def close(self) -> None:
        self._stack.close()
        for site in self._sites:
            site.join(30)
            assert not site.is_alive()


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    net = Net(tmp_path)
    yield net
    net.close()
    assert list(tmp_path.iterdir()) == [], "payloads leave nothing behind"


class Certificates:
    """A throw-away authority."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _subject("authority")
        self._root = self._make(self._name, self._key, None)
        key, certificate = self._issue("server", ExtendedKeyUsageOID.SERVER_AUTH)
        self.server = grpc.ssl_server_credentials([(key, certificate)], _pem(self._root), require_client_auth=True)
        self.nobody = grpc.ssl_channel_credentials(_pem(self._root))

    def client(
        self, name: str, usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH
    ) -> grpc.ChannelCredentials:
        key, certificate = self._issue(name, usage)
        return grpc.ssl_channel_credentials(_pem(self._root), key, certificate)

    def _issue(self, name: str, usage: x509.ObjectIdentifier) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        plain = serialization.NoEncryption()
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        return pem, _pem(self._make(_subject(name), key, usage))

    def _make(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, usage: x509.ObjectIdentifier | None
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=10))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=usage is None, path_length=None), critical=True)
            .add_extension(here, critical=False)
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="session")
def certificates() -> Certificates:
    return Certificates()
