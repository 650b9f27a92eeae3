"""Experiment files to start from, written from the schema: each key with its meaning, defaults commented out."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedtrain.disk import atomic_write
from fedtrain.errors import InputError, nearest
from fedtrain.experiment.schema import allowed, inline, is_section, schema_tree, variants

__all__ = ["TEMPLATES", "Template", "reference_markdown", "render", "write"]


class Template(NamedTuple):
    """An experiment to start from."""

    description: str
    next_step: str
    values: Mapping[str, Any]  # as in the file: what departs from the defaults


_DATA_ROOT = "The data lie under the data root: --data-root DIR, or FEDTRAIN_DATA=DIR."

TEMPLATES: dict[str, Template] = {
    "digits": Template(
        "Handwritten digits on 20 clients with skewed labels; runs offline in seconds.",
        "Ready to run.",
        {
            "rounds": 40,
            "task": {"name": "mlp", "options": {"hidden": [64]}},
            "data": {
                "name": "digits",
                "clients": 20,
                "partition": {"kind": "dirichlet", "alpha": 0.3, "min_examples": 10},
                "test": 0.2,
                "central_test": 0.2,
            },
            "clients": {"per_round": 10},
            "training": {"local_epochs": 2, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.1}},
            "evaluation": {"clients_every": 5, "target_metric": "accuracy", "target_value": 0.9},
        },
    ),
    "private": Template(
        "Digits on 10 clients, each example protected by differential privacy; runs offline in half a minute.",
        "Ready to run. See what it will cost with `fedtrain plan private.toml`.",
        {
            "rounds": 20,
            "task": {"name": "mlp", "options": {"hidden": [64]}},
            "data": {"name": "digits", "clients": 10, "partition": {"kind": "iid"}, "central_test": 0.2},
            "training": {"local_epochs": 1, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 3.0}},
            "privacy": {"unit": "sample", "epsilon": 8.0, "delta": 1e-3},
        },
    ),
    "tabular": Template(
        "Your own table (CSV or Parquet), with a column that names each row's client.",
        "Set data.path, data.target and data.client_column to your own.",
        {
            "rounds": 20,
            "task": {"name": "mlp", "options": {"hidden": [32]}},
            "data": {
                "path": "table.csv",
                "target": "label",
                "client_column": "hospital",
                "partition": {"kind": "natural", "min_examples": 10},
                "missing": "median",
                "scaling": "client",
                "test": 0.2,
            },
            "training": {"local_epochs": 1, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.05}},
            "evaluation": {"clients_every": 5},
        },
    ),
    "images": Template(
        "Your own images: a folder with one sub-folder per class, spread over 10 clients.",
        "Set data.path to your folder; all images are resized to data.options.size.",
        {
            "rounds": 30,
            "task": {"name": "simple-cnn"},
            "data": {
                "path": "images",
                "options": {"size": 32},
                "clients": 10,
                "partition": {"kind": "dirichlet", "alpha": 0.5, "min_examples": 10},
                "central_test": 0.2,
            },
            "clients": {"per_round": 5},
            "training": {"local_epochs": 1, "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9}},
        },
    ),
    "mnist": Template(
        "MNIST on 100 equal clients with the 2NN: the IID row of McMahan et al. 2017, table 1.",
        "To get the data: fedtrain data fetch mnist. " + _DATA_ROOT,
        {
            "rounds": 100,
            "task": {"name": "mlp", "options": {"hidden": [200, 200]}},
            "data": {"name": "mnist", "clients": 100, "partition": {"kind": "iid"}},
            "clients": {"per_round": 10},
            "training": {"local_epochs": 1, "batch_size": 10, "optimizer": {"name": "sgd", "lr": 0.1}},
            "evaluation": {"target_metric": "accuracy", "target_value": 0.97},
        },
    ),
    "fashion-noniid": Template(
        "Fashion-MNIST on 10 clients with Dirichlet label skew, as in NIID-Bench (Li et al. 2022).",
        "To get the data: fedtrain data fetch fashion-mnist. " + _DATA_ROOT,
        {
            "rounds": 50,
            "task": {"name": "simple-cnn"},
            "data": {
                "name": "fashion-mnist",
                "clients": 10,
                "partition": {"kind": "dirichlet", "alpha": 0.5, "min_examples": 10},
            },
            "training": {
                "local_epochs": 10,
                "batch_size": 64,
                "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
            },
        },
    ),
    "heart-disease": Template(
        "Heart disease in four hospitals, logistic regression, after FLamby (Ogier du Terrail et al. 2022).",
        _DATA_ROOT,
        {
            "rounds": 15,
            "task": {"name": "logistic"},
            "data": {"name": "heart-disease", "partition": {"kind": "natural"}, "scaling": "pooled", "test": 0.34},
            "training": {"local_steps": 100, "batch_size": 4, "optimizer": {"name": "sgd", "lr": 0.001}},
            "evaluation": {"clients_every": 1},
        },
    ),
    "regression": Template(
        "A score of Parkinson's disease from the voice, one client per patient: regression on a table.",
        _DATA_ROOT,
        {
            "rounds": 50,
            "task": {"name": "regressor", "options": {"target_mean": 29.0, "target_std": 10.7}},
            "data": {"name": "parkinsons", "partition": {"kind": "natural"}, "scaling": "pooled", "test": 0.2},
            "clients": {"per_round": 10},
            "training": {"local_epochs": 1, "optimizer": {"name": "sgd", "lr": 0.05}},
            "evaluation": {"clients_every": 10},
        },
    ),
    "text": Template(
        "The next character in Shakespeare's plays, one client per role, with an LSTM.",
        _DATA_ROOT,
        {
            "rounds": 100,
            "task": {"name": "char-lstm"},
            "data": {"name": "shakespeare", "partition": {"kind": "natural", "min_examples": 2}, "test": 0.2},
            "clients": {"per_round": 10},
            "training": {"local_epochs": 1, "batch_size": 10, "optimizer": {"name": "sgd", "lr": 0.8}},
            "evaluation": {"central_every": 10},
        },
    ),
    "own-task": Template(
        "Your own model, loss and metrics, from a Python file beside this one.",
        "Write my_task.py with a class MyTask beside this file: docs/tasks.md shows one.",
        {
            "rounds": 10,
            "task": {"name": "my_task.py:MyTask"},
            "data": {
                "name": "breast-cancer",
                "clients": 5,
                "partition": {"kind": "dirichlet", "alpha": 0.5, "min_examples": 10},
                "scaling": "client",
                "central_test": 0.2,
            },
            "training": {"local_epochs": 1, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.05}},
        },
    ),
}

_COLUMN = 38  # where comments start
_WIDTH = 110
# What the value itself tells: "an integer of at least 1" leaves "at least 1".
_TYPE = re.compile(r"^(an? (integer|number|string|table|list of strings)( of)?|true or false) ?")


def render(name: str) -> str:
    """Write a template as an experiment file: its own keys active, all others commented out with their defaults.

    Args:
        name: a key of TEMPLATES.

    Raises:
        InputError: there is no such template.
    """
    if name not in TEMPLATES:
        raise _no_template(name)
    description, next_step, values = TEMPLATES[name]
    lines = [
        f"# {description}",
        f"# {next_step}",
        "#",
        "# A key behind `# ` has the default that is shown, or is not set by default: remove the `# ` to set it.",
        "",
    ]
    for key, node in schema_tree()["properties"].items():
        if not is_section(node):
            lines += _entry(key, node, values)
            continue
        absent = "default" not in node and "discriminator" in node and key not in values
        lines += ["", *_beside(f"{'# ' if absent else ''}[{key}]", [node["description"]])]
        if "properties" not in node:
            lines += _kinds(node, values.get(key, {}))
            continue
        for member, child in node["properties"].items():
            lines += _entry(member, child, values.get(key, {}))
    return "\n".join(lines) + "\n"


def write(target: str, template: str | None = None) -> Path:
    """Write a template to a new file, all or nothing.

    Args:
        target: a template's name, written to NAME.toml in the working directory; or a path ending in .toml.
        template: which template; by default the one that the file is named after, else "digits".

    Returns:
        The file that was written.

    Raises:
        InputError: there is no such template, the file exists, or it cannot be written.
    """
    if not target.endswith(".toml") and target not in TEMPLATES:
        raise _no_template(target)
    path = Path(target if target.endswith(".toml") else f"{target}.toml")
    text = render(template or (path.stem if path.stem in TEMPLATES else "digits"))
    if path.exists():
        raise InputError("the file exists and stays as it is", got=path, hint="Give another name, or remove it.")
    try:
        atomic_write(path, lambda file: file.write(text.encode()))
    except OSError as error:
        what = f"the experiment file cannot be written ({error.strerror})"
        raise InputError(what, got=path, hint="Give a path in a folder that exists and is writable.") from error
    return path


def reference_markdown() -> str:
    """Tabulate every key of the experiment file, as Markdown."""
    properties = schema_tree()["properties"]
    lines = ["### Top level", "", *_HEAD]
    lines += [_row(key, node) for key, node in properties.items() if not is_section(node)]
    for section, node in properties.items():
        if not is_section(node):
            continue
        lines += ["", f"### [{section}]", "", node["description"]]
        if "properties" not in node:
            lines += _inner_tables(section, node)
            continue
        lines += ["", *_HEAD]
        lines += [_row(key, child) for key, child in node["properties"].items()]
        for key, child in node["properties"].items():
            lines += _inner_tables(f"{section}.{key}", child)
    return "\n".join(lines) + "\n"


def _entry(key: str, node: dict[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """One key of a template, with its comment beside or below it."""
    active = key in values
    value = values[key] if active else node.get("default", node.get("examples", [None])[0])
    paragraphs = [_meaning(node, shown=not active)]
    if value is None and "properties" in node:
        value = {}  # a table whose keys all have defaults
    tag, choices = variants(node)
    if tag:
        value = value or {tag: next(iter(choices))}
        paragraphs.append(f"- {tag}: {', '.join(_with_own_keys(choices).values())}.")
    for name, child in (choices[value[tag]] if tag else node).get("properties", {}).items():
        if name != tag:
            paragraphs.append(f"- {name}: {_meaning(child, shown=not active and name in value)}")
    return _beside(f"{'' if active else '# '}{key} = {inline(value)}", paragraphs)


def _kinds(node: dict[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """A section that comes in kinds: the one that is chosen with what there is besides, and its keys."""
    tag, choices = variants(node)
    chosen = values.get(tag, node.get("default", {}).get(tag, next(iter(choices))))
    others = [text for name, text in _with_own_keys(choices).items() if name != chosen]
    paragraphs = [choices[chosen]["description"], f"Others, each with its keys: {', '.join(others)}."]
    yield from _beside(f"{'' if tag in values else '# '}{tag} = {inline(chosen)}", paragraphs)
    for key, child in choices[chosen]["properties"].items():
        if key != tag:
            yield from _entry(key, child, values)


def _with_own_keys(choices: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Each variant with the keys, in brackets, that not all variants have."""
    common = set.intersection(*(set(table["properties"]) for table in choices.values()))
    own = {name: [key for key in table["properties"] if key not in common] for name, table in choices.items()}
    return {name: f"{name} ({', '.join(keys)})" if keys else name for name, keys in own.items()}


def _meaning(node: dict[str, Any], *, shown: bool) -> str:
    """What a key means, which values it takes where that is not plain, and its default unless that is shown."""
    description: str = node["description"]
    is_table = "properties" in node or "discriminator" in node
    told = "enum" in node and all(choice in description for choice in node["enum"])
    bounds = "" if told or is_table else _TYPE.sub("", allowed(node)).lstrip(", ")
    facts = [bounds] if bounds else []
    if shown and "default" not in node:
        facts.append("not set by default")
    if not shown and "default" in node and not is_table:
        facts.append(f"default {inline(node['default'])}")
    return f"{description} ({'; '.join(facts)})" if facts else description


def _beside(code: str, paragraphs: list[str]) -> Iterator[str]:
    """Lay out code with its comment in a column of its own."""
    comment = []
    for paragraph in paragraphs:
        later = "  " if paragraph.startswith("- ") else ""
        comment += textwrap.wrap(paragraph, _WIDTH - _COLUMN - 2, subsequent_indent=later, break_on_hyphens=False)
    if len(code) >= _COLUMN:
        yield code
        code = ""
    for line in comment:
        yield f"{code:<{_COLUMN}}# {line}"
        code = ""


_HEAD = ("| key | meaning | values | default |", "|---|---|---|---|")


def _row(key: str, node: dict[str, Any]) -> str:
    default = f"`{inline(node['default'])}`" if "default" in node else ""
    values = allowed(node).replace("*", r"\*")
    return f"| `{key}` | {node['description']} | {values} | {default} |"


def _inner_tables(path: str, node: dict[str, Any]) -> Iterator[str]:
    """Tabulate the keys of an inline table: of each variant, or of the one table that the key may hold."""
    listed = "items" in node
    tag, choices = variants(node["items"] if listed else node)
    for name, table in choices.items():
        where = f"{path} = {{ {tag} = {inline(name)} }}" if "." in path else f"[{path}] {tag} = {inline(name)}"
        where = f"{path} = [{{ {tag} = {inline(name)} }}]" if listed else where
        yield from ("", f"#### {where}", "", table["description"])
        rows = [_row(key, child) for key, child in table["properties"].items() if key != tag]
        yield from ("", *_HEAD, *rows) if rows else ()
    for table in (node, *node.get("anyOf", ())):
        if "properties" in table:
            yield from ("", f"#### {path}", "", table["description"], "", *_HEAD)
            yield from (_row(key, child) for key, child in table["properties"].items())


def _no_template(name: str) -> InputError:
    hint = nearest(name, TEMPLATES, otherwise="Or give a path ending in .toml.")
    return InputError("there is no such template", got=name, expected=f"one of: {', '.join(TEMPLATES)}", hint=hint)
