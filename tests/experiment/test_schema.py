import json
import tomllib
from pathlib import Path

import pytest

from fedtrain.experiment import TEMPLATES, Experiment, json_schema
from fedtrain.experiment.schema import allowed, inline, schema_tree, variants


def tables(schema):
    yield "experiment", schema
    yield from schema["$defs"].items()


def test_every_key_and_table_has_a_description():
    for name, table in tables(json_schema()):
        assert table["description"], name
        for key, node in table["properties"].items():
            assert node["description"].endswith((".", '"')), f"{name}.{key}"
            assert node["title"] == key


def test_the_schema_is_json_of_the_current_draft_and_closed():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"]) == list(Experiment.model_fields)
    assert schema["required"] == ["data"]
    assert all(table["additionalProperties"] is False for _, table in tables(schema))


def test_toml_knows_no_null():
    assert "null" not in json.dumps(json_schema())


def test_variants_come_in_the_order_of_the_source():
    data = schema_tree()["properties"]["data"]["properties"]
    tag, choices = variants(data["partition"])
    assert (tag, list(choices)[:3]) == ("kind", ["iid", "dirichlet", "shards"])
    assert choices["dirichlet"]["properties"]["alpha"]["exclusiveMinimum"] == 0
    assert variants(data["scaling"]) == ("", {})


@pytest.fixture
def accepts():
    """Whether an editor finds nothing wrong with a file."""
    return pytest.importorskip("jsonschema").Draft202012Validator(json_schema()).is_valid


def test_an_editor_accepts_every_template_and_example(accepts):
    assert all(accepts(dict(template.values)) for template in TEMPLATES.values())
    for file in (Path(__file__).parents[2] / "examples").glob("*.toml"):
        assert accepts(tomllib.loads(file.read_text(encoding="utf-8"))), file


@pytest.mark.parametrize(
    ("strategy", "good"),
    [
        ({}, True),
        ({"name": "fedadam", "tau": 0.1}, True),
        ({"name": "fedavg", "tau": 0.1}, False),
        ({"name": "fedavgg"}, False),
        ({"name": "own", "path": "own_strategy.py:build"}, True),
        ({"name": "own"}, False),
        ({"name": "own_strategy.py:build", "options": {"power": 0.5}}, True),
        ({"name": "own_strategy.py:build", "path": "other.py:build"}, False),
    ],
)
def test_an_editor_knows_the_keys_of_each_strategy(accepts, strategy, good):
    assert accepts({"data": {"name": "digits", "clients": 5}, "strategy": strategy}) == good


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"type": "integer", "minimum": 1}, "an integer of at least 1"),
        ({"type": "integer", "minimum": 1, "maximum": 1e6}, "an integer from 1 to 1000000"),
        ({"type": "number", "exclusiveMinimum": 0.5, "exclusiveMaximum": 1}, "a number greater than 0.5 and below 1"),
        ({"type": "boolean"}, "true or false"),
        ({"type": "array", "items": {"type": "string"}}, "a list of strings"),
        (
            {"type": "array", "items": {"type": "string"}, "examples": [["a"], ["b"]]},
            'a list of strings such as ["a"] or ["b"]',
        ),
        ({"type": "object", "examples": [{"a": True}]}, "a table such as { a = true }"),
        ({"enum": ["a", "b"], "type": "string"}, "one of: a, b"),
        ({"const": "a", "type": "string"}, '"a"'),
        ({"anyOf": [{"const": "auto"}, {"type": "integer"}]}, '"auto", or an integer'),
    ],
)
def test_allowed_values_in_plain_words(node, words):
    assert allowed(node) == words


def test_inline_values_stay_on_one_line():
    value = {"a b": [1, 2.0, True], "c": {"d": "x\ny"}, "e": {}, "f": ()}
    assert inline(value) == '{ "a b" = [1, 2.0, true], c = { d = "x\\ny" }, e = {}, f = [] }'


def test_names_offered_to_editors_are_those_that_there_are():
    from fedtrain.data.sources import SOURCES
    from fedtrain.tasks.registry import FURTHER_TASKS, TASKS

    sections = schema_tree()["properties"]
    assert set(sections["task"]["properties"]["name"]["examples"]) == {*TASKS, *FURTHER_TASKS}
    assert set(sections["data"]["properties"]["name"]["examples"]) == set(SOURCES)
