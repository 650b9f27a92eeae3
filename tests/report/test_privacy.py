from __future__ import annotations

import pytest

from fedtrain.records import RoundRecord
from fedtrain.report.privacy import increments, promise_rows, sentences, warnings
from fedtrain.report.view import Facts


def told(part, run):
    return part(run, Facts.of(run))


def test_each_round_adds_the_growth_since_the_one_before():
    spent = {0: 0.0, 1: 3.0, 2: None, 3: 3.5, 4: 3.5}
    records = [RoundRecord(round_number=n, epsilon=epsilon) for n, epsilon in spent.items()]
    assert increments(records) == {0: 0.0, 1: 3.0, 3: 0.5, 4: 0.0}


def test_the_sentences_are_about_what_was_spent(make_private_run):
    protection, meaning = told(sentences, make_private_run())
    assert protection.startswith("Over 40 rounds, each example is protected against everybody")
    assert meaning.startswith("Epsilon 7.8 means: ")
    assert told(sentences, make_private_run({"seeded": True}))[0].startswith("NOT PRIVATE: the noise follows")
    assert told(sentences, make_private_run(rounds=0)) == ()
    assert told(sentences, make_private_run(records=[])) == ()


def test_a_budget_that_was_passed_is_a_warning(make_private_run):
    assert told(warnings, make_private_run()) == []
    assert told(warnings, make_private_run({"planned_epsilon": 7.5})) == [
        "Epsilon 7.8 was spent, more than the planned 7.5: rounds that were repeated after a crash are paid for again."
    ]


@pytest.mark.parametrize(
    ("unit", "delta", "n"),
    [
        ("client", 0.05, 20),  # clients
        ("client", 0.049, None),
        ("sample", 1 / 191, 191),  # examples of the largest client
        ("sample", 0.005, None),
    ],
)
def test_a_delta_that_is_too_large_is_a_warning(make_private_run, unit, delta, n):
    found = told(warnings, make_private_run({"unit": unit, "delta": delta}))
    assert [warning.partition(":")[0] for warning in found] == ([f"Delta {delta:g} is not below 1/{n}"] if n else [])
    assert told(warnings, make_private_run({"unit": unit, "delta": delta}, data=None)) == []


def test_the_table_of_a_promise_to_examples(make_private_run):
    ended = [RoundRecord(round_number=n, epsilon=1.0, ended=clients) for n, clients in ((4, ["a", "b"]), (9, ["c"]))]
    assert told(promise_rows, make_private_run(records=ended)) == [
        ("Protected unit", "each example"),
        ("Relation", "add/remove one example"),
        ("Delta", "1e-05"),
        ("Accountant", "PRV"),
        ("Sampling", "Poisson"),
        ("Must be trusted", "the client's own machine"),
        ("Noise multiplier", "0.83 to 1.42, from client to client"),
        ("Sample rate", "0.125 to 0.5, from client to client"),
        ("Steps per participation", "3 to 24, from client to client"),
        ("Calibrated for", "22 rounds of each client"),
        ("Clipped", "each example's gradient to L2 norm 1 (fast)"),
        ("Ledgers", "in the run's folder, ledgers"),
        ("Clients that have ended", "3: a in round 4, b in round 4, c in round 9"),
    ]


def test_the_table_of_a_promise_to_clients(make_private_run):
    promise = {"unit": "client", "sampling": "none", "relation": "blank one", "participations": 1, "steps": (1, 1)}
    rows = dict(told(promise_rows, make_private_run(promise | {"noise_multiplier": (1.1, 1.1)})))
    assert rows["Protected unit"] == "each client with all its examples"
    assert rows["Relation"] == "blank one client"
    assert rows["Sampling"] == "none: counted without amplification"
    assert rows["Must be trusted"] == "the server"
    assert (rows["Noise multiplier"], rows["Steps per participation"]) == ("1.1", "1")
    assert rows["Calibrated for"] == "1 round of the run"
    assert rows["Clients that have ended"] == "none"


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("", "none, for nothing is protected"),
        ("ledgers", "in the run's folder, ledgers"),
        ("/data/ledgers", "/data/ledgers; other runs may have spent there too"),
    ],
)
def test_the_table_says_where_the_ledgers_are(make_private_run, folder, words):
    assert dict(told(promise_rows, make_private_run({"ledgers": folder})))["Ledgers"] == words


def test_a_plain_run_promises_nothing(make_run):
    assert [told(part, make_run()) for part in (sentences, warnings, promise_rows)] == [(), [], []]
