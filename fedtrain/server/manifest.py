"""The manifest of a run: what it was made from and on, and whether a folder may be gone on with."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import fedtrain
from fedtrain.disk import sha256_of
from fedtrain.errors import FedtrainError, RunFolderError
from fedtrain.experiment.code import code_of
from fedtrain.experiment.load import identified, identity, load
from fedtrain.experiment.sections import Experiment
from fedtrain.records import Manifest
from fedtrain.rundir import RunFolder
from fedtrain.server.traces import files_of

__all__ = ["Circumstances", "new_manifest", "refuse_other_run", "resumed_manifest"]

_NAMED = 4  # changes that are told


@dataclass(frozen=True)
class Circumstances:
    """What a manifest says beside the experiment.

    Attributes:
        base: the experiment file's folder.
        device: where clients train.
        workers: worker processes.
        data_fingerprint: SHA-256 over all rows and the partition.
        parameters: parameters of the model that are trained.
    """

    base: Path
    device: torch.device
    workers: int
    data_fingerprint: str
    parameters: int


def new_manifest(experiment: Experiment, now: Circumstances) -> Manifest:
    """Describe a run that starts."""
    return Manifest(
        fedtrain=fedtrain.__version__,
        experiment_hash=identity(experiment),
        own_files=_own_files(experiment, now.base),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),  # names the run in ledgers
        status="running",
        base_folder=str(now.base.absolute()),
        seed=experiment.seed,
        data_fingerprint=now.data_fingerprint,
        parameters=now.parameters,
        **_machine(experiment, now),
    )


def resumed_manifest(
    manifest: Manifest, experiment: Experiment, now: Circumstances, notice: Callable[[str], None]
) -> Manifest:
    """Describe a run that goes on; tell `notice` of what may cost the equality of its bytes.

    Raises:
        RunFolderError: the data are no longer those that the run was started with.
    """
    if manifest.data_fingerprint != now.data_fingerprint:
        raise RunFolderError(
            "the data have changed since this run was started",
            got=f"fingerprint {now.data_fingerprint[:12]}",
            expected=manifest.data_fingerprint[:12],
            hint="Bring the old data back, or start anew in another folder with --out",
        )
    machine = _machine(experiment, now)
    before = {"threads": manifest.threads, "device": manifest.device, "torch": manifest.versions.get("torch")}
    after = {"threads": machine["threads"], "device": machine["device"], "torch": metadata.version("torch")}
    for name, value in after.items():
        if value != before[name]:
            notice(f"{name} was {before[name]} and is {value} now: the last bits may differ from an uninterrupted run")
    return manifest.model_copy(update={**machine, "status": "running", "resumed": manifest.resumed + 1})


def refuse_other_run(folder: RunFolder, experiment: Experiment, base: Path) -> None:
    """Make sure that the folder is free, or holds a run of this experiment and of the same own files.

    Raises:
        RunFolderError: it is not; nothing was changed.
    """
    if folder.manifest.exists():
        manifest = folder.read_manifest()
        if manifest.experiment_hash != identity(experiment):
            what = f"this folder holds a run of a different experiment{_changes(folder, experiment)}"
        elif manifest.own_files != _own_files(experiment, base):
            what = "this folder holds a run with other contents of the files that the experiment names"
        else:
            return
    elif folder.is_foreign():
        what = "this folder holds other files"
    else:
        return
    raise RunFolderError(what, got=folder.path, hint="Choose another folder with --out; nothing was changed")


def _changes(folder: RunFolder, experiment: Experiment) -> str:
    """Name what an experiment has otherwise than a folder's; nothing if that cannot be read any more."""
    try:
        before, now = (_flat("", identified(one)) for one in (load(folder.experiment), experiment))
    except FedtrainError:
        return ""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return f", with other values of {', '.join(changed[:_NAMED])}" if changed else ""


def _flat(path: str, value: object) -> dict[str, object]:
    """Dotted path -> value."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: v for name, inner in value.items() for key, v in _flat(f"{path}.{name}".strip("."), inner).items()}


def _own_files(experiment: Experiment, base: Path) -> dict[str, str]:
    """SHA-256 of the user's code and data files that the experiment names; where a folder of images lies."""
    named = [name.rpartition(":")[0] for name in code_of(experiment) if ".py:" in name]
    named += [
        path for path in (experiment.data.path, experiment.clients.tags, *files_of(experiment.clients.duration)) if path
    ]
    named += experiment.model.files
    paths = {name: base / Path(name).expanduser() for name in named}
    return {name: sha256_of(path) if path.is_file() else str(path.resolve()) for name, path in paths.items()}


def _machine(experiment: Experiment, now: Circumstances) -> dict[str, object]:
    packages = ("torch", "flwr", "numpy", "pydantic", "safetensors")
    hardware = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') >> 20} MiB",
    }
    if now.device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(now.device)
    return {
        "threads": experiment.run.threads,
        "device": str(now.device),
        "workers": now.workers,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "hardware": hardware,
    }
