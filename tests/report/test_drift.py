from __future__ import annotations

import math

import pytest

from fedtrain.records import RoundRecord
from fedtrain.report.drift import (
    ClientLink,
    Correlation,
    Quantiles,
    client_links,
    correlation,
    drift_rounds,
    typical,
)
from fedtrain.report.view import Facts


def test_quantiles_are_deciles_of_what_is_finite():
    assert Quantiles.of([*range(11), math.nan, math.inf]) == Quantiles(1.0, 5.0, 9.0)
    assert all(map(math.isnan, vars(Quantiles.of([math.nan])).values()))


def test_each_round_that_measured_drift_is_summed_up():
    drift = {f"c{i}": (i / 10, 1 + i / 5) for i in range(11)}
    records = [
        RoundRecord(round_number=0),
        RoundRecord(round_number=1, drift=drift, diversity=0.5),
        RoundRecord(round_number=2, drift={"a": (1.0, 3.0)}),
    ]
    first, second = drift_rounds(records)
    assert (first.round_number, first.updates, first.diversity) == (1, 11, 0.5)
    assert vars(first.cosine) == pytest.approx({"low": 0.1, "median": 0.5, "high": 0.9})
    assert vars(first.ratio) == pytest.approx({"low": 1.2, "median": 2.0, "high": 2.8})
    assert (second.cosine.low, second.ratio.high) == (1.0, 3.0)
    assert math.isnan(second.diversity)
    assert typical([first, second]) == (0.75, 2.5)


@pytest.mark.parametrize("drift", [{}, {"a": (math.nan, 1.0)}])
def test_drift_that_is_not_known_has_no_typical_value(drift):
    assert typical(drift_rounds([RoundRecord(round_number=1, drift=drift)])) is None


def test_a_client_is_linked_with_its_last_result_and_its_mean_drift(make_run, make_data):
    data = make_data(3, 3).model_copy(
        update={"shown_clients": list("abc"), "label_names": ["x", "y"], "label_counts": [[4, 0], [0, 4], [4, 4]]}
    )
    records = [
        RoundRecord(round_number=1, drift={"a": (0.2, 1.0), "b": (0.5, 2.0)}, per_client={"a": {"mae": 0.1}}),
        RoundRecord(round_number=2, drift={"a": (0.4, 3.0)}, per_client={"a": {"mae": 0.7}, "c": {"mae": 1}}),
        RoundRecord(round_number=3, central={"mae": 2.0}),
    ]
    run = make_run(records=records, data=data)
    a, b, c = client_links(run, Facts.of(run))
    assert (a.client, a.value, a.cosine, a.ratio) == ("a", 0.7, pytest.approx(0.3), 2.0)
    assert (b.cosine, b.ratio) == (0.5, 2.0)
    assert math.isnan(b.value)
    assert (c.distance, c.value) == (pytest.approx(0), 1.0)
    assert math.isnan(c.cosine)
    assert a.distance == b.distance == pytest.approx(0.3112781)


def test_without_labels_nothing_is_linked(make_run, make_data):
    tokens = make_data().model_copy(update={"label_names": []})
    for data in (None, tokens):
        run = make_run(data=data)
        assert client_links(run, Facts.of(run)) == []


def links(values):
    return [ClientLink(f"c{i}", float(i), value, math.nan, 1.0) for i, value in enumerate(values)]


def test_correlation_is_over_the_clients_that_have_both():
    assert correlation(links([9, 8, 7, math.nan, 5, 4]), lambda k: k.value) == Correlation(pytest.approx(-1), 5)


@pytest.mark.parametrize("pick", [lambda k: k.value, lambda k: k.cosine, lambda k: k.ratio])
def test_too_few_or_equal_figures_have_no_correlation(pick):
    assert correlation(links([1, 2, 3, 4, math.inf, math.nan]), pick) is None


@pytest.mark.parametrize(("rank", "clients", "clear"), [(0.5, 17, True), (-0.5, 17, True), (0.48, 17, False)])
def test_a_correlation_is_clear_beyond_what_chance_gives_in_19_of_20_cases(rank, clients, clear):
    assert Correlation(rank, clients).clear == clear
