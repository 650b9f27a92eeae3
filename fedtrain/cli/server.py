"""`fedtrain server`: serve an experiment to clients that dial in."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fedtrain.cli.log import logged
from fedtrain.cli.members import watching
from fedtrain.cli.progress import RunObserver
from fedtrain.cli.running import carry_out
from fedtrain.deployment.metrics import Metrics
from fedtrain.deployment.server import Listening, Opened, serve
from fedtrain.errors import DataError, InputError
from fedtrain.experiment.code import code_of
from fedtrain.experiment.sections import Experiment
from fedtrain.link.authority import Authority
from fedtrain.link.enrolment import add_renewal, server_credentials, serving
from fedtrain.link.hub import Door
from fedtrain.link.identity import adopt, pending_request
from fedtrain.link.register import Revocations
from fedtrain.rundir import RunFolder
from fedtrain.simulations.run import Places

__all__ = ["ServerOptions", "serve_experiment"]

_CLIENT_SECONDS = 10.0  # that local clients have to end by themselves


@dataclass(frozen=True)
class ServerOptions:
    """What the command line says of a server.

    Attributes:
        listen: "host:port".
        enrol: "host:port" where invited sites enrol; None serves no enrolment.
        authority: folder of the certificate authority; None for plain text.
        hosts: names by which clients reach this machine.
        own_data: clients bring their own rows.
        min_clients: before the first round.
        wait: seconds for them.
        patience: seconds without progress after which a round does not wait for a client.
        max_clients: at once.
        metrics: port on loopback where Prometheus asks; None for none.
        with_clients: to start on this machine.
        insecure: plain text beyond this machine.
    """

    listen: str
    enrol: str | None = None
    authority: Path | None = None
    hosts: Sequence[str] = ()
    own_data: bool = False
    min_clients: int | None = None
    wait: float | None = None
    patience: float = 60.0
    max_clients: int = 64
    metrics: int | None = None
    with_clients: int = 0
    insecure: bool = False


def serve_experiment(
    experiment: Experiment, places: Places, options: ServerOptions, *, quiet: bool, as_json: bool
) -> None:
    """Serve an experiment until its run is complete.

    Args:
        experiment: what to run.
        places: where to read and write.
        options: of the command line.
        quiet: print only the report's path.
        as_json: print JSON lines.

    Raises:
        FedtrainError: as `serve`; or the options do not fit each other or the experiment.
    """
    _refuse_at_once(experiment, places, options)
    with contextlib.ExitStack() as stack:
        authority, scratch = None, Path()
        if options.with_clients:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedtrain-")))
            authority = Authority.init(scratch / "ca")
        elif options.authority:
            authority = Authority.open(options.authority)
        door = Door(insecure=options.insecure, max_clients=options.max_clients)
        if authority:
            credentials = server_credentials(authority, options.hosts, mutual=True)
            door = Door(credentials, Revocations(authority.register).objection, max_clients=options.max_clients)

        def run(observer: RunObserver) -> None:
            metrics = Metrics(observer)

            @contextlib.contextmanager
            def opened(to: Opened) -> Iterator[None]:
                if to.names:
                    _refuse_who_cannot_come(len(to.names), options)
                with contextlib.ExitStack() as inside:
                    if authority:
                        add_renewal(to.hub.server, authority)
                    if authority and options.enrol:
                        where = inside.enter_context(serving(authority, options.enrol, options.hosts))
                        observer.notice(f"invited sites enrol at {where}")
                    observer.notice(f"clients take part at {to.hub.address}{'' if authority else ', in plain text'}")
                    if options.metrics is not None:
                        url = inside.enter_context(metrics.serving(to.hub.members, options.metrics))
                        observer.notice(f"metrics are at {url}")
                    if authority and options.with_clients:
                        local = _LocalClients(experiment, places, authority, scratch)
                        inside.enter_context(local.running(to, options.with_clients))
                    inside.enter_context(watching(to.hub.members, observer.clients))
                    yield

            listening = Listening(
                address=options.listen,
                door=door,
                min_clients=options.min_clients,
                wait=options.wait,
                own_data=options.own_data,
                patience=options.patience,
                opened=opened,
            )
            with logged(observer):
                serve(experiment, places, metrics, listening)

        carry_out(experiment, RunFolder(places.out), run, quiet=quiet, as_json=as_json)


def _refuse_at_once(experiment: Experiment, places: Places, options: ServerOptions) -> None:
    """Say what is wrong with the options before there is a folder or a port is open."""
    section, folder = experiment.data, RunFolder(places.out)
    most = max(options.min_clients or 0, options.with_clients)
    if options.max_clients < most:
        _refuse_too_many(most, options)
    if options.own_data:
        if options.with_clients:
            raise InputError("--with-clients starts clients without data of their own", hint="Leave out --own-data")
        if section.name is not None and ":" not in section.name:
            raise DataError(
                "clients with data of their own have no built-in data set",
                got=section.name,
                hint="Say how to read their files, with data.path and data.target, or leave out --own-data",
            )
        if section.scaling == "pooled":
            raise DataError(
                "clients with data of their own have no pooled scaling",
                hint='Set data.scaling = "client", or give numbers: { mean = [...], std = [...] }',
            )
        if options.min_clients is None and not folder.roster.exists():
            raise InputError(
                "how many clients will come is not known",
                hint="Where clients bring their own data, say for how many to wait: --min-clients N",
            )
    elif section.path is not None and not folder.manifest.exists():
        path = (places.base / Path(section.path).expanduser()).resolve()
        if not path.exists():
            raise DataError(
                "there is no such file or folder",
                got=path,
                hint="data.path is relative to the experiment file. If clients bring their own data: --own-data",
            )


def _refuse_who_cannot_come(clients: int, options: ServerOptions) -> None:
    """Make sure that as many of the experiment's clients can be there as are waited for."""
    least = options.min_clients or clients
    if least > clients:
        raise InputError(
            "more clients are waited for than the data are spread over",
            got=f"--min-clients {least}",
            expected=f"at most {clients}",
        )
    if least > options.max_clients:
        _refuse_too_many(least, options)


def _refuse_too_many(least: int, options: ServerOptions) -> NoReturn:
    raise InputError(
        f"{least} clients are waited for, and not so many may be there at once",
        got=f"--max-clients {options.max_clients}",
        expected=f"at least {least}",
        hint="Set --max-clients or --min-clients",
    )


@dataclass(frozen=True)
class _LocalClients:
    """Clients on this machine, with certificates that are thrown away: a whole deployment in one command."""

    experiment: Experiment
    places: Places
    authority: Authority
    scratch: Path

    @contextlib.contextmanager
    def running(self, to: Opened, count: int) -> Iterator[None]:
        """Run the first clients of the experiment for as long as the hub is open."""
        if count != len(to.names):
            raise InputError(
                "so many clients does not fit the experiment",
                got=f"--with-clients {count}",
                expected=f"{len(to.names)}, as the data are spread over",
                hint=f"Use --with-clients {len(to.names)}, or --set data.clients={count}",
            )
        logs = RunFolder(self.places.out).local_clients
        logs.mkdir(exist_ok=True)
        who = "1 client is" if count == 1 else f"{count} clients are"
        to.observer.notice(f"{who} started on this machine; logs are in {logs}")
        processes = [self._start(name, to.hub.address, logs) for name in to.names]
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_CLIENT_SECONDS)
                process.kill()
                process.wait()

    def _start(self, name: str, address: str, logs: Path) -> subprocess.Popen[bytes]:
        identity = self.scratch / name
        identity.mkdir(mode=0o700)
        adopt(identity, self.authority.issue(pending_request(identity, name), name), self.authority.certificate)
        section, base = self.experiment.data, self.places.base
        data = base / Path(section.path).expanduser() if section.path else self.places.data_root or base
        command = [sys.executable, "-m", "fedtrain", "client", "--server", address, "--identity", str(identity)]
        command += [
            "--data",
            str(data),
            "--share",
            "--home",
            str(RunFolder(self.places.out).local_clients / name),
            "--once",
        ]
        command += ["--device", self.experiment.run.device, "--code", str(base), "--parent", str(os.getpid())]
        for reference in code_of(self.experiment):
            command += ["--allow-code", reference]
        with (logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own command line
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            )
