from __future__ import annotations

import math

import pytest

from fedtrain.experiment.evaluation import higher_is_better
from fedtrain.records import PERSONAL, RoundRecord
from fedtrain.report.view import Facts, Spread, client_scores, guarantee, measured


def rounds(metric, *values):
    return [RoundRecord(round_number=n, central={"loss": 1.0, metric: value}) for n, value in enumerate(values)]


def test_facts_sum_a_run_up(make_run):
    first = RoundRecord(round_number=0, central={"accuracy": 0.1}, seconds_evaluate=0.5)
    second = RoundRecord(
        round_number=1,
        central={"accuracy": 0.9},
        bytes_up=10,
        bytes_down=20,
        seconds_train=2.0,
        quarantined={"mallory": "delta has NaN"},
    )
    third = RoundRecord(
        round_number=2,
        central={"accuracy": 0.8},
        clients={"accuracy": 0.7},
        per_client={f"c{i:02d}": {"accuracy": i / 20, "num_examples": 5.0} for i in range(20)},
        bytes_up=1,
        bytes_down=2,
        seconds_train=3.0,
    )
    facts = Facts.of(make_run(records=[first, second, third]))
    assert (facts.final, facts.final_round) == (0.8, 2)
    assert (facts.best, facts.best_round) == (0.9, 1)
    assert facts.target_round == 1  # the goal is 0.85
    assert facts.clients_mean == 0.7
    assert facts.worst_tenth == pytest.approx((0 / 20 + 1 / 20) / 2)
    assert (facts.bytes_up, facts.bytes_down, facts.seconds) == (11, 22, 5.5)
    assert facts.quarantined == ((1, "mallory", "delta has NaN"),)


def test_facts_of_late_asynchronous_and_set_aside_clients(make_run):
    records = [
        RoundRecord(round_number=0),
        RoundRecord(round_number=1, participants=["a", "b", "c"], late=["d"], staleness=1.0, virtual_seconds=60.0),
        RoundRecord(
            round_number=2,
            participants=["a"],
            late=["b", "c"],
            quarantined={"d": "NaN"},
            set_aside=["d"],
            staleness=3.0,
            virtual_seconds=30.5,
        ),
    ]
    facts = Facts.of(make_run(records=records))
    assert (facts.late, facts.asked) == (3, 8)
    assert facts.staleness == (3 * 1.0 + 1 * 3.0) / 4
    assert facts.virtual_seconds == 90.5
    assert facts.set_aside == ((2, "d"),)
    assert (facts.personal, facts.not_personal) == (None, None)


def test_epsilon_is_the_last_records_and_clients_end_in_a_round(make_private_run):
    spent = [(0, 0.0, []), (1, 3.0, ["a"]), (2, 4.5, ["b", "c"])]
    records = [RoundRecord(round_number=n, epsilon=epsilon, ended=ended) for n, epsilon, ended in spent]
    facts = Facts.of(make_private_run(records=records))
    assert facts.epsilon == 4.5
    assert facts.ended == ((1, "a"), (2, "b"), (2, "c"))
    assert not facts.not_private
    assert Facts.of(make_private_run(records=[])).epsilon is None


def test_an_epsilon_that_protects_nobody_is_told_apart(make_private_run, make_run):
    boundless = [RoundRecord(round_number=1, epsilon=math.inf)]
    assert Facts.of(make_private_run(records=boundless)).not_private
    assert Facts.of(make_private_run({"seeded": True}, records=[])).not_private
    assert not Facts.of(make_run()).not_private  # it promises nothing


def test_a_guarantee_is_the_promise_with_what_was_spent(make_private_run):
    promise = make_private_run({"unit": "client", "delta": 1e-3, "accountant": "rdp", "seeded": True}).privacy
    spent = guarantee(promise, 2.5, 7)
    assert (spent.epsilon, spent.rounds, spent.delta) == (2.5, 7, 1e-3)
    assert (spent.unit, spent.accountant, spent.sampling, spent.seeded) == ("client", "rdp", "Poisson", True)


def test_personal_models_are_compared_on_the_clients_that_have_one(make_run):
    own = f"{PERSONAL}accuracy"
    per_client = {
        "a": {"accuracy": 0.2, own: 0.9, "num_examples": 10.0},
        "b": {"accuracy": 0.6, own: 0.5, "num_examples": 30.0},
        "c": {"accuracy": 0.0, "num_examples": 60.0},  # never asked to train
    }
    facts = Facts.of(make_run(records=[RoundRecord(round_number=1, per_client=per_client, clients={"accuracy": 0.2})]))
    assert facts.personal == Spread(2, pytest.approx((10 * 0.9 + 30 * 0.5) / 40), 0.5)
    assert facts.not_personal == Spread(2, pytest.approx((10 * 0.2 + 30 * 0.6) / 40), 0.2)
    assert facts.personal.worst == "worst client"


def test_what_was_measured_on_personal_models_is_a_part_of_its_own(make_run):
    record = RoundRecord(round_number=1, clients={"loss": 2.0, f"{PERSONAL}loss": 1.0}, train={"loss": 3.0})
    assert [measured(record, part) for part in ("central", "clients", "personal", "train")] == [
        {},
        {"loss": 2.0},
        {"loss": 1.0},
        {"loss": 3.0},
    ]
    assert Facts.of(make_run(records=[record])).metric == "loss"


def test_an_error_is_best_and_reached_from_above(make_run, make_experiment):
    goal = make_experiment(evaluation={"target_metric": "mae", "target_value": 3.0})
    facts = Facts.of(make_run(experiment=goal, records=rounds("mae", 9.0, 2.5, 4.0)))
    assert (facts.best, facts.best_round, facts.target_round) == (2.5, 1, 1)


def test_a_value_that_is_not_finite_is_neither_best_nor_a_goal(make_run):
    facts = Facts.of(make_run(records=rounds("accuracy", math.nan, 0.2, math.nan)))
    assert (facts.best, facts.best_round, facts.target_round) == (0.2, 1, None)
    assert math.isnan(facts.final)


def test_an_empty_run_has_nothing_measured(make_run):
    facts = Facts.of(make_run(records=[]))
    assert (facts.rounds_done, facts.final, facts.best, facts.clients_mean, facts.worst_tenth) == (0, *[None] * 4)


@pytest.mark.parametrize(
    ("measured", "goal", "metric"),
    [
        (["loss", "f1", "accuracy"], None, "accuracy"),
        (["loss", "f1", "accuracy"], "f1", "f1"),
        (["loss", "f1"], "accuracy", "f1"),
        (["loss", "mae", "mse"], None, "mae"),
        (["loss"], None, "loss"),
        ([], None, "loss"),
    ],
)
def test_the_main_metric_is_the_goal_then_accuracy_then_the_first(make_run, make_experiment, measured, goal, metric):
    evaluation = {"target_metric": goal, "target_value": 0.5} if goal else {}
    record = RoundRecord(round_number=0, central=dict.fromkeys(measured, 1.0))
    assert Facts.of(make_run(experiment=make_experiment(evaluation=evaluation), records=[record])).metric == metric


def test_what_is_asked_for_comes_before_what_a_task_measures(make_run, make_experiment):
    experiment = make_experiment(evaluation={"metrics": ["f1-macro", "auroc"]})
    record = RoundRecord(round_number=0, central=dict.fromkeys(["loss", "flagged", "auroc"], 1.0))
    assert Facts.of(make_run(experiment=experiment, records=[record])).metric == "auroc"


@pytest.mark.parametrize(("metric", "order"), [("accuracy", ["c", "a", "b"]), ("mae", ["c", "b", "a"])])
def test_clients_come_worst_first_and_a_missing_value_is_worst(make_run, metric, order):
    values = {"a": {metric: 0.1}, "b": {metric: 0.2}, "c": {"loss": 1.0}}
    earlier = RoundRecord(round_number=0, per_client={"z": {metric: 0.5}})
    records = [earlier, RoundRecord(round_number=1, per_client=values), RoundRecord(round_number=2)]
    assert [score.client for score in client_scores(make_run(records=records), metric)] == order


def test_accuracy_r2_and_the_like_grow():
    named = ("accuracy", "r2", "loss", "mae", "f1")
    assert [name for name in named if higher_is_better(name)] == ["accuracy", "r2", "f1"]
