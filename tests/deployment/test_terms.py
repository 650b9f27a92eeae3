"""What a client makes of an offer, and a server of a client's data."""

import json
from pathlib import Path

import pytest

from fedtrain.data.base import DataSpec
from fedtrain.data.federated import build
from fedtrain.deployment.terms import accepted, check_told, describe, differences, offer_for
from fedtrain.errors import DataError, LinkError, PolicyError
from fedtrain.experiment.code import code_of
from fedtrain.experiment.load import identity
from fedtrain.experiment.sections import Experiment

DATA = {"name": "digits", "clients": 3}


def experiment(**fields: object) -> Experiment:
    return Experiment.model_validate({"data": DATA, **fields})


def test_an_offer_comes_back_as_the_experiment_without_what_is_this_machines_affair() -> None:
    given = experiment(run={"threads": 2, "policy": "policy.toml", "ledgers": "elsewhere", "device": "cpu"})
    offer = offer_for(given, "0" * 32)
    read = accepted(offer, ())
    assert identity(read) == identity(given) == offer.experiment_hash
    assert (read.run.threads, read.run.policy, read.run.ledgers, read.run.device) == (2, None, None, "auto")
    assert "policy.toml" not in offer.model_dump_json()


def test_an_experiment_that_is_not_what_its_hash_says_is_refused() -> None:
    offer = offer_for(experiment(), "0" * 32)
    other = offer.model_copy(update={"facts": {"experiment": experiment(seed=5).model_dump(mode="json")}})
    with pytest.raises(LinkError, match="SHA-256"):
        accepted(other, ())


@pytest.mark.parametrize("facts", [{}, {"experiment": None}, {"experiment": []}, {"experiment": {"data": {"x": 1}}}])
def test_an_offer_without_an_experiment_is_refused(facts: dict[str, object]) -> None:
    with pytest.raises(LinkError, match="experiment is wrong"):
        accepted(offer_for(experiment(), "0" * 32).model_copy(update={"facts": facts}), ())


@pytest.mark.parametrize(
    "fields",
    [
        {"task": {"name": "subprocess:Popen", "options": {"args": ["touch", "it"]}}},
        {"strategy": {"name": "own", "path": "os:system"}},
        {"data": {"name": "shutil:rmtree", "options": {"path": "it"}, "clients": 3}},
        {"task": {"name": "mine.py:Task"}},
    ],
)
def test_a_server_cannot_name_code_that_the_owner_has_not(fields: dict[str, object]) -> None:
    wanted = experiment(**fields)
    (name,) = code_of(wanted)
    with pytest.raises(PolicyError, match="has not allowed"):
        accepted(offer_for(wanted, "0" * 32), ())
    assert code_of(accepted(offer_for(wanted, "0" * 32), (name,))) == [name]


def test_more_threads_than_a_client_gives() -> None:
    with pytest.raises(PolicyError, match=r"more threads .*run.threads = 1000000000000; expected at most 1024"):
        accepted(offer_for(experiment(run={"threads": 10**12}), "0" * 32), ())
    assert accepted(offer_for(experiment(run={"threads": 1024}), "0" * 32), ()).run.threads == 1024


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        (DataSpec((2,), "class", 2, ("age", "dose"), ("no", "a rare disease")), "data.classes"),
        (DataSpec((80,), "tokens", 17), "data.name"),
        (DataSpec((2,), "number", 0, ("age", "town=Berlin")), "got town.*data.drop"),
    ],
)
def test_what_was_found_in_rows_is_not_told(spec: DataSpec, hint: str) -> None:
    with pytest.raises(DataError, match=hint) as caught:
        check_told(experiment().data, spec)
    assert "rare" not in str(caught.value)
    assert "Berlin" not in str(caught.value)
    declared = experiment(data={**DATA, "classes": ["no", "a rare disease"]}).data
    check_told(declared, DataSpec((2,), "class", 2, ("age", "dose"), ("no", "a rare disease")))
    check_told(experiment().data, DataSpec((1,), "number", 0, ("age",)))


def test_a_file_of_tags_on_the_client_is_not_read() -> None:
    read = accepted(offer_for(experiment(clients={"tags": "/etc/passwd", "where": {"x": 1}}), "0" * 32), ())
    assert (read.clients.tags, read.clients.where) == (None, {})


def test_data_of_another_kind_are_told_apart() -> None:
    ours = describe(build(experiment().data, None, Path(), 0))
    assert json.loads(json.dumps(ours)) == ours
    assert (ours["input_shape"], ours["dtype"]) == ([1, 8, 8], "float32")
    assert differences(ours, ours) is None
    assert "input_shape [31] and not [1, 8, 8]" in str(differences({**ours, "input_shape": [31]}, ours))
    assert "class_names lack 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and have x" in str(
        differences({**ours, "class_names": ["x"]}, ours)
    )
    assert "class_names [1] and not ['0'," in str(differences({**ours, "class_names": [1]}, ours))
    table = {**ours, "input_shape": [3], "feature_names": ["age", "dose", "ward=A"]}
    less = {**table, "input_shape": [2], "feature_names": ["dose", "age"]}
    turned = {**table, "feature_names": ["dose", "age", "ward=A"]}
    assert differences(less, table) == "its data are of another kind: feature_names lack ward=A"
    assert differences(turned, table) == (
        "its data are of another kind: feature_names are in another order than age, dose, ward=A"
    )
    assert differences(None, ours) == differences({}, ours) == "it does not describe its data"
