"""What a server offers and what a client makes of it: data only, checked before anything is built from it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtrain.data.base import DataSpec
from fedtrain.data.federated import PartitionedData
from fedtrain.data.table import text_columns
from fedtrain.errors import DataError, LinkError, PolicyError, shorten
from fedtrain.experiment.code import code_of
from fedtrain.experiment.load import identity
from fedtrain.experiment.sections import DataSection, Experiment, RunSection
from fedtrain.link.control import Offer
from fedtrain.tasks.modelling import digests

__all__ = ["MODEL_FILES", "OWN_DATA", "accepted", "check_told", "describe", "differences", "offer_for"]

OWN_DATA = "own_data"
"""Key of the offer's facts: the clients' rows are nowhere else."""
MODEL_FILES = "model_files"
"""Key of the offer's facts: the files that [model] names -> their SHA-256."""

_EXPERIMENT = "experiment"
_MOST_THREADS = 1024
_LONGEST_NAMES = 200  # characters of the names in which data differ


def offer_for(experiment: Experiment, run: str, *, own_data: bool = False, base: Path = Path()) -> Offer:
    """Write what clients are offered. Of [run], which is this machine's affair, they learn the number of threads.

    Args:
        experiment: what is run.
        run: its name.
        own_data: the server has no rows, and needs to know how many each client has.
        base: the experiment file's folder.

    Raises:
        InputError: a file that [model] names cannot be read.
    """
    told = experiment.model_copy(update={"run": RunSection(threads=experiment.run.threads)})
    facts = {
        _EXPERIMENT: told.model_dump(mode="json"),
        OWN_DATA: own_data,
        MODEL_FILES: digests(experiment.model, base),
    }
    return Offer(run=run, experiment_hash=identity(told), facts=facts)


def accepted(offer: Offer, code: Collection[str]) -> Experiment:
    """Read an offer.

    An experiment can name code by import path, and files. A client runs no code but fedtrain's own and what its owner
    has named, and reads no files but those that its owner has named.

    Args:
        offer: of a server that is not trusted.
        code: "package.module:Name" or "file.py:Name" that the client's owner allows.

    Raises:
        LinkError: it holds no experiment, or another than it says.
        PolicyError: it names code that the owner has not allowed, or a file outside the owner's folder of code; or it
            wants more threads than any machine has use for.
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
    for name in experiment.model.files:
        if Path(name).is_absolute() or ".." in Path(name).parts or name.startswith("~"):
            raise PolicyError(
                "the experiment names a file outside this client's folder of code",
                got=f"[model] {shorten(name)}",
                expected="a path below that folder, without ..",
            )
    if experiment.run.threads > _MOST_THREADS:
        raise PolicyError(
            "the experiment asks for more threads than a client gives",
            got=f"run.threads = {shorten(experiment.run.threads)}",
            expected=f"at most {_MOST_THREADS}",
        )
    clients = experiment.clients.model_copy(update={"tags": None, "where": {}, "duration": None})
    return experiment.model_copy(update={"clients": clients})


def describe(data: PartitionedData) -> dict[str, Any]:
    """Describe data so that a server can tell whether all clients have the same kind, and build the model from it.

    The names of columns are told as they are; see `check_told` for what comes from rows.
    """
    spec = asdict(data.spec)
    kind = {name: list(value) if isinstance(value, tuple) else value for name, value in spec.items()}
    return {**kind, "dtype": data.preparation.dtype}


def check_told(section: DataSection, spec: DataSpec) -> None:
    """Refuse to tell without noise what was found in the rows of a client's own file.

    The description of the data holds the names of columns, the shape of the inputs and their dtype, and nothing that
    depends on what stands in a row.

    Args:
        section: the experiment's [data].
        spec: of the data as they were read.

    Raises:
        DataError: classes, texts or tokens are known from the rows alone.
    """
    private = "and privacy protects each row"
    if spec.target == "class" and not section.classes:
        raise DataError(
            f"the classes would be told as they are found in the rows, {private}",
            hint="Have the experiment name them all: data.classes",
        )
    if spec.target == "tokens":
        raise DataError(
            f"the number of tokens would be told as it is found in the rows, {private}",
            hint="Have the experiment name a source or a loader with a fixed vocabulary: data.name",
        )
    if texts := text_columns(spec.feature_names):
        raise DataError(
            f"texts in columns would be told as they are found in the rows, {private}",
            got=", ".join(sorted(texts)),
            hint="Write them as numbers, or leave the columns out: data.drop",
        )


def differences(theirs: object, ours: dict[str, Any]) -> str | None:
    """Say in which way a client's data are of another kind; None if they are not."""
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        return "it does not describe its data"
    odd = [key for key in ours if theirs[key] != ours[key]]
    if "feature_names" in odd and "input_shape" in odd:  # the names say more than their number
        odd.remove("input_shape")
    told = [f"{key} {_difference(theirs[key], ours[key])}" for key in odd]
    return f"its data are of another kind: {'; '.join(told)}" if told else None


def _difference(theirs: object, ours: object) -> str:
    """What of two values differs; of two lists of names only what one of them has."""
    plain = f"{shorten(theirs)} and not {shorten(ours)}"
    if not (isinstance(theirs, list) and isinstance(ours, list) and theirs and ours):
        return plain
    if not all(isinstance(name, str) for name in (*theirs, *ours)):
        return plain
    there, here = dict.fromkeys(theirs), dict.fromkeys(ours)
    parts = {"lack": [n for n in here if n not in there], "have": [n for n in there if n not in here]}
    told = [f"{verb} {shorten(', '.join(names), _LONGEST_NAMES)}" for verb, names in parts.items() if names]
    return " and ".join(told) or f"are in another order than {shorten(', '.join(ours), _LONGEST_NAMES)}"
