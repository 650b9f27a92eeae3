"""What a server offers and what a client makes of it: data only, checked before anything is built from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtrain.data.base import DataSpec
from fedtrain.errors import PolicyError, shorten
from fedtrain.experiment.load import identity
from fedtrain.experiment.sections import Experiment, RunSection
from fedtrain.experiment.strategies import OwnStrategy
from fedtrain.link.control import Offer
from fedtrain.link.headers import LinkError

__all__ = ["accepted", "code_of", "describe", "differences", "offer_for", "run_name"]

_EXPERIMENT = "experiment"


def run_name(experiment: Experiment, created_at: str, folder: Path) -> str:
    """Name a run: the same after a restart, and no other run's. 32 hexadecimal digits."""
    text = f"{identity(experiment)} {experiment.name} {created_at} {folder.resolve()}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def offer_for(experiment: Experiment, run: str) -> Offer:
    """Write what clients are offered. Of [run], which is this machine's affair, they learn the number of threads."""
    told = experiment.model_copy(update={"run": RunSection(threads=experiment.run.threads)})
    return Offer(run=run, experiment_hash=identity(told), facts={_EXPERIMENT: told.model_dump(mode="json")})


def accepted(offer: Offer, code: Collection[str]) -> Experiment:
    """Read an offer.

    An experiment can name code by import path, and files. A client runs no code but fedtrain's own and what its owner
    has named, and reads no files but those that its owner has named.

    Args:
        offer: of a server that is not trusted.
        code: "package.module:Name" or "file.py:Name" that the client's owner allows.

    Raises:
        LinkError: it holds no experiment, or another than it says.
        PolicyError: it names code that the owner has not allowed.
    """
    try:
        experiment = Experiment.model_validate(offer.facts.get(_EXPERIMENT))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise LinkError("the offered experiment is wrong", got=f"{shorten(place)}: {shorten(first['msg'])}") from error
    if identity(experiment) != offer.experiment_hash:
        raise LinkError("the offered experiment is not the one that its SHA-256 names", got=offer.experiment_hash[:12])
    if foreign := [name for name in code_of(experiment) if name not in code]:
        raise PolicyError(
            "the experiment names code that this client's owner has not allowed",
            got=", ".join(map(shorten, foreign)),
            hint=f"If it is installed here and you trust it: --allow-code {shorten(foreign[0])}",
        )
    clients = experiment.clients.model_copy(update={"tags": None, "where": {}})
    return experiment.model_copy(update={"clients": clients})


def code_of(experiment: Experiment) -> list[str]:
    """The code of a user's own that an experiment names."""
    strategy = experiment.strategy.path if isinstance(experiment.strategy, OwnStrategy) else ""
    return [name for name in (experiment.task.name, experiment.data.name or "", strategy) if ":" in name]


def describe(spec: DataSpec) -> dict[str, Any]:
    """Describe data so that a server can tell whether all clients have the same kind; names only as a digest."""
    facts = asdict(spec)
    names = json.dumps([facts.pop("feature_names"), facts.pop("class_names")])
    return {**facts, "input_shape": list(spec.input_shape), "names": hashlib.sha256(names.encode()).hexdigest()}


def differences(theirs: object, ours: dict[str, Any]) -> str | None:
    """Say in which way a client's data are of another kind; None if they are not."""
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        return "it does not describe its data"
    odd = [f"{key} is {shorten(theirs[key])} and not {ours[key]}" for key in ours if theirs[key] != ours[key]]
    return f"its data are of another kind: {'; '.join(odd)}" if odd else None
