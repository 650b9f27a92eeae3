"""The experiment file's JSON Schema, and its parts in plain words: faults, templates and the reference use them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import tomli_w

from fedtrain.experiment.sections import Experiment

__all__ = ["allowed", "inline", "is_section", "json_schema", "key_text", "positions", "schema_tree", "variants"]

_REFERENCE = "#/$defs/"
_NOUNS = {
    "integer": ("an integer", "integers"),
    "number": ("a number", "numbers"),
    "string": ("a string", "strings"),
    "boolean": ("true or false", "true or false"),
    "object": ("a table", "tables"),
}


def json_schema() -> dict[str, Any]:
    """Describe the experiment file as a JSON Schema (draft 2020-12), for editors that complete and check TOML.

    Returns:
        A schema in which every key has a description. TOML knows no null, so none is allowed or a default.
    """
    schema = _described_schema()
    own = schema["$defs"]["OwnStrategy"]
    # `name` may hold what `path` says otherwise; the variants that `schema_tree()` tells of are without this shorthand.
    name = own["properties"]["name"]
    name["anyOf"] = [{"const": name.pop("const")}, {"pattern": own["properties"]["path"]["pattern"]}]
    own["required"] = ["name"]
    own["oneOf"] = [{"required": ["path"]}, {"properties": {"name": name["anyOf"][1]}}]
    # A bare name stands for the defaults of its kind.
    augment = schema["$defs"]["TrainingSection"]["properties"]["augment"]
    augment["items"] = {"anyOf": [{"enum": list(augment["items"]["discriminator"]["mapping"])}, augment["items"]]}
    return schema


def _described_schema() -> dict[str, Any]:
    schema = Experiment.model_json_schema()
    for table in (schema, *schema["$defs"].values()):
        for key, node in table["properties"].items():
            members = [member for member in node.get("anyOf", ()) if member != {"type": "null"}]
            if len(members) == 1:
                del node["anyOf"]
                node.update(members[0])
            if "default" in node and node["default"] is None:
                del node["default"]
            # The tag of a variant (kind = "dirichlet") means what the variant means, and pydantic drops the
            # description of a section where it repeats the model's own.
            meant = schema["$defs"][node["$ref"].removeprefix(_REFERENCE)] if "$ref" in node else table
            node.setdefault("description", meant["description"])
            node["description"] = " ".join(node["description"].split())
            node["title"] = key
            if "$ref" in node and isinstance(node.get("default"), dict):
                node["default"] = {k: v for k, v in node["default"].items() if v is not None}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fedtrain experiment"}


@cache
def schema_tree() -> dict[str, Any]:
    """Expand all references of the schema: each node then says everything about its key. Read it only."""
    schema = _described_schema()

    def expand(node: Any) -> Any:
        if isinstance(node, list):
            return [expand(member) for member in node]
        if isinstance(node, str) and node.startswith(_REFERENCE):
            return expand(schema["$defs"][node.removeprefix(_REFERENCE)])
        if isinstance(node, dict):
            beside = {key: expand(member) for key, member in node.items() if key != "$ref"}
            return {**expand(node["$ref"]), **beside} if "$ref" in node else beside
        return node

    tree: dict[str, Any] = expand({key: member for key, member in schema.items() if key != "$defs"})
    return tree


def variants(node: dict[str, Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The tag's key and the variants of a tagged table, such as `("kind", {"iid": ...})`; `("", {})` for all else."""
    tagged = node.get("discriminator")
    if tagged is None:
        return "", {}
    tag = tagged["propertyName"]
    # The mapping is sorted by name; oneOf has the order of the source.
    order = [v for member in node["oneOf"] for v in _choices(member["properties"][tag])]
    return tag, {name: tagged["mapping"][name] for name in order}


def is_section(node: dict[str, Any]) -> bool:
    """Whether a key of the top level is a section of the file rather than a single value."""
    return "properties" in node or "discriminator" in node


def positions(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    """Walk all keys below a node.

    Yields:
        (key, its dotted path, the variant it belongs to or "").
    """
    _, choices = variants(node)
    for variant, table in (choices or {"": node}).items():
        for key, child in table.get("properties", {}).items():
            place = f"{path}.{key}" if path else key
            yield key, place, variant
            yield from positions(child, place)


def allowed(node: dict[str, Any]) -> str:
    """Say in plain words which values a key takes: "a number greater than 0"."""
    tag, choices = variants(node)
    if tag:
        return f'a table such as {{ {tag} = "{next(iter(choices))}" }}, with {tag} one of: {", ".join(choices)}'
    if "anyOf" in node:
        return ", or ".join(allowed(member) for member in node["anyOf"])
    if _choices(node):
        names = ", ".join(_choices(node))
        return f"one of: {names}" if "," in names else f'"{names}"'
    if node.get("type") == "array":
        return _list_of(node) + _such_as(node)
    if "properties" in node:
        return f"a table with {', '.join(node['properties'])}"
    noun = _NOUNS[node["type"]][0]
    if node["type"] == "object":
        return noun + _such_as(node)
    if node["type"] == "string" and len(node.get("examples", ())) > 1:
        return f"{noun} such as: {', '.join(node['examples'])}"
    return noun + _bounds(node)


def inline(value: Any) -> str:
    """Write a value as TOML on one line."""
    if isinstance(value, dict):
        pairs = ", ".join(f"{key_text(key)} = {inline(member)}" for key, member in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(inline(member) for member in value)}]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def key_text(key: str) -> str:
    """Write a key as TOML, quoted where it has to be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else inline(key)


def _choices(node: dict[str, Any]) -> list[str]:
    return node.get("enum") or ([node["const"]] if "const" in node else [])


def _list_of(node: dict[str, Any]) -> str:
    if "prefixItems" in node:
        count, item = f"a list of {len(node['prefixItems'])}", node["prefixItems"][0]
    else:
        count, item = "a list of", node["items"]
    least = ", at least one" if node.get("minItems") == 1 else ""
    if variants(item)[0]:
        return f"a list, each member {allowed(item)}"
    return f"{count} {_NOUNS[item['type']][1]}{_bounds(item)}{least}"


def _such_as(node: dict[str, Any]) -> str:
    return f" such as {' or '.join(map(inline, node['examples']))}" if "examples" in node else ""


def _bounds(node: dict[str, Any]) -> str:
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "greater than",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    # Pydantic gives 1e6 as 1000000.0, which reads as if an integer would not do.
    bounds = {key: int(node[key]) if node[key] == int(node[key]) else node[key] for key in words if key in node}
    if bounds.keys() == {"minimum", "maximum"}:
        return f" from {bounds['minimum']} to {bounds['maximum']}"
    return " " + " and ".join(f"{words[key]} {bound}" for key, bound in bounds.items()) if bounds else ""
