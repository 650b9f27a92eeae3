"""The fields of an experiment, flat: dotted path and value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedtrain.experiment.schema import inline, key_text
from fedtrain.experiment.sections import Experiment

__all__ = ["fields"]


def fields(experiment: Experiment) -> dict[str, str]:
    """List what an experiment says, without its [run] section.

    Returns:
        dotted path, as for --set, -> value as TOML on one line, in the order of the sections; lists are one value.
    """
    return {path: inline(value) for path, value in _walk(experiment.model_dump(exclude={"run"}, exclude_none=True), "")}


def _walk(table: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        path = f"{above}.{key_text(key)}" if above else key
        if isinstance(value, dict) and value:
            yield from _walk(value, path)
        else:
            yield path, value
