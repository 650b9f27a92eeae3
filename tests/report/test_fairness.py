from __future__ import annotations

import math

import pytest

from fedtrain.records import RoundRecord
from fedtrain.report.fairness import client_grid, evaluations
from fedtrain.report.view import Facts


def rounds(metric, *evaluated):
    return [
        RoundRecord(
            round_number=n,
            clients={metric: 0.5},
            per_client={client: {metric: value} for client, value in values.items()},
        )
        for n, values in enumerate(evaluated)
    ]


def found(make_run, metric, *evaluated):
    run = make_run(records=rounds(metric, *evaluated))
    return evaluations(run, Facts.of(run))


def test_forgetting_is_the_best_before_minus_the_last(make_run):
    first, third, fourth = found(
        make_run, "accuracy", {"a": 0.9, "b": 0.2}, {}, {"a": 0.5, "b": 0.6, "c": 0.1}, {"a": 0.7, "b": 0.5, "c": 0.2}
    )
    assert math.isnan(first.forgetting)
    assert third.forgetting == pytest.approx(((0.9 - 0.5) + (0.2 - 0.6)) / 2)
    assert fourth.forgetting == pytest.approx(((0.9 - 0.7) + (0.6 - 0.5) + (0.1 - 0.2)) / 3)
    assert [e.round_number for e in (first, third, fourth)] == [0, 2, 3]


def test_an_error_is_forgotten_upwards(make_run):
    _, last = found(make_run, "mae", {"a": 1.0}, {"a": 3.5})
    assert last.forgetting == 2.5


def test_what_is_not_finite_is_neither_best_nor_forgotten(make_run):
    _, second, third = found(make_run, "accuracy", {"a": 0.4, "b": 0.4}, {"a": math.nan, "b": 0.3}, {"a": 0.2})
    assert second.forgetting == pytest.approx(0.1)
    assert math.isnan(second.worst_tenth)
    assert third.forgetting == pytest.approx(0.2)


def test_the_worst_tenth_and_the_deciles(make_run):
    (only,) = found(make_run, "accuracy", {f"c{i:02d}": i / 20 for i in range(21)})
    assert only.worst_tenth == pytest.approx((0 + 1 + 2) / 60)
    assert vars(only.spread) == pytest.approx({"low": 0.1, "median": 0.5, "high": 0.9})
    assert only.clients == 21


def test_the_grid_holds_each_clients_values_the_worst_in_the_end_first(make_run):
    run = make_run(records=rounds("accuracy", {"a": 0.9, "gone": 0.5}, {"a": 0.8, "b": 0.3}))
    grid = client_grid(run, Facts.of(run))
    assert (grid.clients, grid.rounds) == (["b", "a"], [0, 1])
    assert grid.values[1] == [0.9, 0.8]
    assert math.isnan(grid.values[0][0])
    assert grid.values[0][1] == 0.3


def test_a_grid_is_bounded(make_run):
    run = make_run(records=rounds("accuracy", *[{f"c{i:04d}": i / 1000 for i in range(1000)}] * 250))
    grid = client_grid(run, Facts.of(run))
    assert (len(grid.clients), len(grid.rounds)) == (200, 100)
    assert (grid.clients[0], grid.clients[-1], grid.rounds[0], grid.rounds[-1]) == ("c0000", "c0999", 0, 249)
