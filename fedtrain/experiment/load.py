"""Read an experiment file, with overrides, into a checked Experiment; and write it back."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtrain.errors import ExperimentError, Fault, InputError, nearest, shorten
from fedtrain.experiment.faults import faults_of
from fedtrain.experiment.schema import inline
from fedtrain.experiment.sections import Experiment

__all__ = ["identified", "identity", "load", "to_toml"]


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check an experiment file.

    Args:
        path: a TOML file in UTF-8.
        overrides: changes such as `training.optimizer.lr=0.1`, applied in order; the value is TOML, or a bare word.

    Raises:
        InputError: the file cannot be read.
        ExperimentError: the file or an override has faults; the error lists all of them.
    """
    document = _parse(_read(path), str(path))
    faults, changes = [], {}
    for override in overrides:
        fault = _apply(override, document)
        if fault:
            faults.append(fault)
        else:
            changes[override.partition("=")[0].strip()] = override
    document.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:64] or "experiment")
    try:
        experiment = Experiment.model_validate(document)
    except ValidationError as error:
        raise ExperimentError(str(path), faults + faults_of(error, document, changes)) from error
    if faults:
        raise ExperimentError(str(path), faults)
    return experiment


def to_toml(experiment: Experiment) -> str:
    """Write an experiment with every field spelled out; `load` of the text gives an equal experiment."""
    lines = []
    for key, value in experiment.model_dump(exclude_none=True).items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{name} = {inline(member)}" for name, member in value.items())]
        else:
            lines.append(f"{key} = {inline(value)}")
    return "\n".join(lines) + "\n"


def identity(experiment: Experiment) -> str:
    """Hash what is computed: SHA-256, in hex, of all fields but the name, the [run] section and the byte budget."""
    text = json.dumps(identified(experiment), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def identified(experiment: Experiment) -> dict[str, Any]:
    """The fields that `identity` hashes, by section."""
    return experiment.model_dump(mode="json", exclude={"name": True, "run": True, "compression": {"max_bytes"}})


def _read(path: Path) -> str:
    try:
        # An editor on Windows may have put a byte-order mark in front, which TOML does not know.
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        hint = nearest(
            str(path),
            map(str, path.parent.glob("*.toml")),
            otherwise=f"To write one: fedtrain init {path.stem}.toml",
        )
        raise InputError("there is no such experiment file", got=path, hint=hint) from error
    except IsADirectoryError as error:
        inside = path / "experiment.toml"
        hint = f"Did you mean {inside}?" if inside.exists() else "To write one: fedtrain init digits.toml"
        raise InputError("the experiment file is a folder", got=path, hint=hint) from error
    except UnicodeDecodeError as error:
        what = "the experiment file is not UTF-8 text"
        raise InputError(what, got=path, hint="Save it as UTF-8, or write one with: fedtrain init") from error
    except OSError as error:
        what = f"the experiment file cannot be read ({error.strerror})"
        raise InputError(what, got=path, hint="Check its permissions, or write one with: fedtrain init") from error


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        message = str(error)
        place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
        if place is None:
            fault = Fault("end of file" if "end of document" in message else "file", message, "TOML")
        else:
            line = text.replace("\r\n", "\n").split("\n")[int(place[1]) - 1]
            where = f"line {place[1]}, column {place[2]}"
            hint = f"{message[: place.start()]}. Text needs quotes; true and false are lower-case."
            fault = Fault(where, shorten(line.strip()) or "an empty line", "TOML", hint)
        raise ExperimentError(source, [fault]) from error


def _apply(override: str, document: dict[str, Any]) -> Fault | None:
    """Set one override in the document, or say what is wrong with it."""
    name, _, text = override.partition("=")
    path, text = name.strip().split("."), text.strip()
    if not text or not all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in path):
        return Fault(f"--set {shorten(override)}", shorten(override), "KEY=VALUE, such as training.optimizer.lr=0.1")
    try:
        value = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError) as error:
        if text[0] in "\"'[{":
            return Fault(f"--set {shorten(override)}", shorten(text), "a value in TOML", str(error))
        value = {}
    table = document
    for depth, key in enumerate(path[:-1], start=1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            reached = ".".join(path[:depth])
            return Fault(f"--set {shorten(override)}", f"{reached} = {shorten(inline(table))}", f"a table {reached}")
    # A bare word is a string, and so is text that breaks out of the one line.
    table[path[-1]] = value["value"] if value.keys() == {"value"} else text
    return None
