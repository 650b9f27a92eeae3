"""Turn what pydantic found into the faults of an experiment file: path, what was got, what is allowed, what is near."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from fedtrain.errors import Fault, nearest, shorten
from fedtrain.experiment.schema import allowed, inline, key_text, positions, schema_tree, variants

__all__ = ["ELSEWHERE", "faults_of", "places_of"]

ELSEWHERE = {
    "dataset": "data.name",
    "epochs": "training.local_epochs",
    "learning_rate": "training.optimizer.lr",
    "num_clients": "data.clients",
}
"""Keys by the names that other tools have for them, where the nearest key is another or none."""

_ABSENT = object()
_MOST_PLACES = 3  # where a key may belong that are still a hint
_LONGEST_LIST = 160  # characters of allowed keys that are still worth reading


@dataclass(frozen=True)
class _Place:
    """Where in the file, and in the schema, a fault lies."""

    path: str
    key: str  # the last part of the path
    node: dict[str, Any]  # of the key; empty for a key that does not exist
    table: dict[str, Any]  # the schema of the table around the key
    tag: str  # the path of the key that chose this table among its variants; "" if none did
    counts: bool  # False for a member of a union that the value was not meant for


def faults_of(error: ValidationError, document: Mapping[str, Any], changes: Mapping[str, str]) -> list[Fault]:
    """List the faults of a file, each place once.

    Args:
        error: what validation raised.
        document: the file as it was read, overrides included.
        changes: dotted path of an override -> the override as it was typed.

    Returns:
        Faults in the order of validation; those that an override caused name it.
    """
    tree = schema_tree()
    faults: dict[str, Fault] = {}
    for item in error.errors(include_url=False):
        place = _locate(item["loc"], tree, document)
        if not place.counts:
            continue
        fault, involved = _fault(item, place, tree)
        guilty = [text for path, text in changes.items() if any(_within(i, path) for i in involved)]
        hints = [fault.hint, *(f"Set by --set {text}" for text in guilty)]
        faults[place.path] = replace(fault, hint=" ".join(hint for hint in hints if hint))
    return list(faults.values())


def places_of(key: str) -> list[str]:
    """Find where a key belongs, by its own name or by that of another tool: dotted paths, none if it is unknown."""
    if key in ELSEWHERE:
        return [ELSEWHERE[key]]
    return list(dict.fromkeys(path for known, path, _ in positions(schema_tree()) if known == key))


def _locate(loc: Iterable[str | int], tree: dict[str, Any], document: Any) -> _Place:
    """Walk pydantic's location, which names variants and union members beside the file's own keys."""
    node, table, value = tree, tree, document
    path = key = tag = ""
    counts = True
    for part in loc:
        choice, tables = variants(node)
        if choice and part in tables:
            node, tag = tables[str(part)], f"{path}.{choice}"
        elif "anyOf" in node:
            member = next((m for m in node["anyOf"] if m.get("title") == part), None)
            is_meant = isinstance(value, dict) and any("properties" in m for m in node["anyOf"])
            counts = (member is not None) == is_meant
            node = member or node
        elif isinstance(part, int):
            path += f"[{part}]"
            node = node["prefixItems"][part] if "prefixItems" in node else node["items"]
        else:
            key = part
            shown = shorten(key_text(part))
            path += f".{shown}" if path else shown
            tag = tag if tag.rpartition(".")[0] == path.rpartition(".")[0] else ""
            table, node = node, node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
            value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
    return _Place(path, key, node, table, tag, counts)


def _fault(item: Any, place: _Place, tree: dict[str, Any]) -> tuple[Fault, list[str]]:
    """Word one fault; also name the paths whose values brought it about."""
    got, involved = item["input"], [place.path]
    if item["type"] == "value_error":
        return _contradiction(str(item["ctx"]["error"]), got, place)
    if item["type"] == "missing":
        hint = place.node.get("description", "")
        return Fault(place.path, "nothing", allowed(place.node), hint), [*involved, place.tag]
    if item["type"] == "extra_forbidden":
        return _unknown_key(place, tree), [*involved, place.tag]
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag, tables = variants(place.node)
        path, chosen = f"{place.path}.{tag}", got.get(tag, _ABSENT)
        shown = "nothing" if chosen is _ABSENT else shorten(inline(chosen))
        return Fault(path, shown, f"one of: {', '.join(tables)}", nearest(chosen, tables, otherwise="")), [path]
    hint = nearest(got, place.node.get("enum", ()), otherwise="") or _as_meant(got, place)
    if item["type"] == "string_pattern_mismatch" and "examples" not in place.node:
        hint = place.node["description"]
    if "properties" in place.node:
        hint = hint or _elsewhere(place)
    return Fault(place.path, shorten(inline(got)), allowed(place.node), hint), involved


def _unknown_key(place: _Place, tree: dict[str, Any]) -> Fault:
    keys = list(place.table["properties"])
    listed = ", ".join(keys)
    expected = f"one of: {listed}" if len(listed) <= _LONGEST_LIST else "a key of this section"
    kinds = [variant for _, path, variant in positions(tree) if path == place.path]
    if kinds:
        *others, last = kinds
        listed_kinds = f"{', '.join(others)} or {last}" if others else last
        hint = f"{place.key} goes with {place.tag.rpartition('.')[2]} = {listed_kinds}."
    else:
        chooser = place.tag.rpartition(".")[2]
        begun = [key for key in keys if len(place.key) > 2 and key.startswith(place.key)]  # eps, for epsilon
        if chooser and place.key in ("name", "kind"):  # what chooses the table has one of the two names
            begun = [chooser]
        hint = f"Did you mean {begun[0]}?" if len(begun) == 1 else _elsewhere(place)
        hint = hint or nearest(place.key, keys, otherwise="")
    return Fault(place.path, "an unknown key", expected, hint)


def _elsewhere(place: _Place) -> str:
    """Name the places where a key of that name belongs."""
    # In a table such as [strategy] another tool's name may be that of a key of this table.
    table = place.path.rpartition(".")[0]
    if place.key in ELSEWHERE and table not in ("", "task", "data", "clients", "training"):
        return ""
    paths = [path for path in places_of(place.key) if path != place.path]
    return f"Did you mean {' or '.join(paths)}?" if 0 < len(paths) <= _MOST_PLACES else ""


def _as_meant(got: Any, place: _Place) -> str:
    """Write out the table that is meant by its name alone, or the list by its only member."""
    if not isinstance(got, str) or got != shorten(got):
        return ""
    is_list = place.node.get("type") == "array"
    node = place.node.get("items", {}) if is_list else place.node
    tag, tables = variants(node)
    key = tag or ("name" if "name" in node.get("properties", {}) else "")
    is_text = is_list and node.get("type") == "string" and got in node.get("enum", [got])
    if (tables and got not in tables) or not (key or is_text) or not re.search(node.get("pattern", ""), got):
        return ""
    meant = inline({key: got} if key else got)
    return f"Write {place.path} = {f'[{meant}]' if is_list else meant}."


def _contradiction(message: str, section: Any, place: _Place) -> tuple[Fault, list[str]]:
    """Show the values that the message speaks of."""
    if not isinstance(section, Mapping):  # one value, which a check of its own refused
        return Fault(place.path, shorten(inline(section)), message), [place.path]
    mentioned: dict[str, str] = {}
    for path in sorted(dict.fromkeys(path for _, path, _ in positions(place.node)), key=message.find):
        node = place.node.get("properties", {}).get(path, {})
        if "properties" in node:  # the name of a section, such as clients, is a word like any other
            continue
        if re.search(rf"(?<![\w.\"]){re.escape(path)}(?![\w.\"])", message):
            value: Any = section
            for key in path.split("."):
                value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
            absent = f"no {path} (default {inline(node['default'])})" if "default" in node else f"no {path}"
            mentioned[path] = absent if value is _ABSENT else f"{path} = {shorten(inline(value))}"
    involved = [f"{place.path}.{path}".lstrip(".") for path in mentioned]
    path = place.path or (involved[0] if involved else "file")
    return Fault(
        path, ", ".join(mentioned.values()) or "contradicting values", f"values that go together: {message}"
    ), involved


def _within(path: str, change: str) -> bool:
    """Whether one of the two places lies in the other: an override may have made the table that is at fault."""
    return path == change or path.startswith((f"{change}.", f"{change}[")) or change.startswith(f"{path}.")
