"""`fedtrain server --runtime flower`: an experiment on a Flower fleet, from the file to a run's folder."""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from fedtrain.data.federated import build
from fedtrain.disk import atomic_write
from fedtrain.errors import InputError, InterruptedRunError, RunError
from fedtrain.experiment.load import to_toml
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.fleet.control import Control
from fedtrain.fleet.events import follow
from fedtrain.fleet.processes import LocalFleet
from fedtrain.fleet.settings import NodeSettings, RunSettings
from fedtrain.rundir import RunFolder
from fedtrain.server.manifest import refuse_other_run
from fedtrain.server.observer import Observer
from fedtrain.simulations.run import Places

__all__ = ["Fleet", "run_on_flower"]

_SCRATCH = ".flower.tmp"  # in the run's folder, which knows such a name for a file that may be left over
_MOST_NODES = 16  # of a fleet of our own: each is three processes


@dataclass(frozen=True)
class Fleet:
    """Which fleet runs the experiment, and how long it is waited for.

    Attributes:
        address: HOST:PORT of a SuperLink; None: a fleet of our own on loopback, with a SuperNode for each client.
        authority: file with the certificate of the authority that signed the SuperLink's, in PEM, or the authority's
            folder; None: the system's.
        insecure: without TLS, also beyond loopback.
        wait: seconds to wait for SuperNodes of all clients before the first round.
        patience: seconds that a round waits for replies in all; flwr tells of no progress.
    """

    address: str | None = None
    authority: Path | None = None
    insecure: bool = False
    wait: float = 60.0
    patience: float = 3600.0


def run_on_flower(experiment: Experiment, places: Places, observer: Observer, fleet: Fleet) -> RunFolder:
    """Run an experiment on a Flower fleet, or go on with it where it was stopped.

    Args:
        experiment: what to run.
        places: where the ServerApp reads and writes, on the SuperLink's machine.
        observer: is told what happens.
        fleet: where to run it.

    Returns:
        The folder of the complete run.

    Raises:
        InputError: the fleet cannot be reached, or the data, the task or the folder does not fit.
        InterruptedRunError: stopped by a signal; resumable.
        RunError: the run cannot go on; resumable.
    """
    folder = RunFolder(places.out)
    _refuse_what_a_fleet_cannot(experiment)
    refuse_other_run(folder, experiment, places.base)
    if folder.manifest.exists() and folder.read_manifest().status == "complete":
        return folder
    scratch = places.out / _SCRATCH
    with contextlib.ExitStack() as stack:
        try:
            if fleet.address is None:
                nodes = _nodes(experiment, places)
                local = stack.enter_context(LocalFleet(scratch, nodes))
                control = stack.enter_context(Control(local.address, None, plain=True))
                local.wait_until(control.is_up)
            else:
                control = stack.enter_context(_control(fleet, fleet.address))
            settings = RunSettings(
                experiment=to_toml(experiment),
                base=str(places.base.absolute()),
                out=str(places.out.absolute()),
                data_root=None if places.data_root is None else str(places.data_root.absolute()),
                mark="" if fleet.address is None else _mark(scratch),
                wait=fleet.wait,
                patience=fleet.patience,
            )
            _carry_out(control, settings, observer)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "interrupted; what was finished is kept", hint="Run the same command again to go on"
            ) from None
    if folder.manifest.exists():
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        observer.notice(f"the run is complete; its folder is on the machine of the SuperLink: {places.out.absolute()}")
    return folder


def _carry_out(control: Control, settings: RunSettings, observer: Observer) -> None:
    run_id = control.start(settings.config())
    try:
        failure = follow(control.log(run_id), observer)
    except BaseException:
        control.stop(run_id)
        raise
    if failure is not None:
        raise failure
    status, details = control.outcome(run_id)
    if status == "stopped":
        raise InterruptedRunError("the run was stopped on the SuperLink", hint="Run the same command again to go on")
    if status != "completed":
        hint = f"Its log says more; that of a fleet of our own lies in {_SCRATCH}, in the run's folder"
        raise RunError("the run failed on the SuperLink", got=details or status, hint=hint)


def _refuse_what_a_fleet_cannot(experiment: Experiment) -> None:
    if isinstance(experiment.privacy, SamplePrivacy):
        raise InputError(
            'privacy.unit = "sample" needs clients that keep ledgers, which those of a Flower fleet do not',
            hint='Use fedtrain\'s own server and clients, or privacy.unit = "client"',
        )


def _nodes(experiment: Experiment, places: Places) -> list[dict[str, bool | float | str]]:
    """The SuperNodes of a fleet of our own: one for each client, with the paths of this machine."""
    count = len(build(experiment.data, places.data_root, places.base, experiment.seed).client_ids())
    if count > _MOST_NODES:
        raise InputError(
            "a Flower fleet on this machine takes several processes for each client",
            got=f"{count} clients",
            expected=f"at most {_MOST_NODES}",
            hint="Use `fedtrain simulate`, or give the address of a SuperLink",
        )
    root = None if places.data_root is None else str(places.data_root.absolute())
    base, states = str(places.base.absolute()), str(RunFolder(places.out.absolute()).clients)
    return [
        NodeSettings(partition_id=number, base=base, data_root=root, states=states).config() for number in range(count)
    ]


def _control(fleet: Fleet, address: str) -> Control:
    host = address.rpartition(":")[0].strip("[]")
    try:
        on_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        on_loopback = False
    if fleet.insecure and fleet.authority:
        raise InputError("there is no use for an authority's certificate without TLS", hint="Give one of the two")
    path = fleet.authority
    try:
        if path is not None and path.is_dir():
            path /= "certificate.pem"
        authority = path.read_bytes() if path else None
        return Control(address, authority, plain=fleet.insecure or (on_loopback and authority is None))
    except (OSError, ValueError) as error:  # no such file, or no certificate
        raise InputError("the authority's certificate cannot be read", got=str(error)) from error


def _mark(scratch: Path) -> str:
    """The run's mark: the same after a restart."""
    path = scratch / "mark"
    if not path.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(uuid.uuid4().hex.encode()))
    return path.read_text()
