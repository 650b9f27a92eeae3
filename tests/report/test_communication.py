from __future__ import annotations

import pytest

from fedtrain.records import RoundRecord
from fedtrain.report import charts_costs
from fedtrain.report.communication import Communication, Traffic, client_traffic
from fedtrain.report.view import Facts

RECORDS = [
    RoundRecord(round_number=0, central={"accuracy": 0.1}),
    RoundRecord(
        round_number=1,
        central={"accuracy": 0.5},
        bytes_up=30,
        bytes_down=200,
        client_bytes={"a": (10, 100), "b": (20, 100)},
    ),
    RoundRecord(
        round_number=2,
        central={"accuracy": 0.9},
        bytes_up=50,
        bytes_down=300,
        client_bytes={"b": (40, 200), "c": (10, 100)},
    ),
    RoundRecord(round_number=3, central={"accuracy": 0.9}, bytes_up=10, bytes_down=100, client_bytes={"b": (10, 100)}),
]


def sent(run):
    return Communication.of(run, Facts.of(run))


def test_bytes_in_total_by_round_by_client_and_until_the_target(make_run):
    assert sent(make_run(records=RECORDS)) == Communication(
        total=Traffic(90, 600),
        round_mean=Traffic(30, 200),  # the three rounds that moved any
        round_most=(2, Traffic(50, 300)),
        client_mean=Traffic(30, 200),
        client_most=("b", Traffic(70, 400)),
        turn_mean=Traffic(90 / 5, 600 / 5),
        target=Traffic(80, 500),  # .85 is reached in round 2
    )


def test_clients_come_by_what_they_moved():
    assert list(client_traffic(RECORDS).items()) == [
        ("b", Traffic(70, 400)),
        ("a", Traffic(10, 100)),
        ("c", Traffic(10, 100)),
    ]


def test_what_is_not_known_is_none(make_run, make_experiment):
    records = [RoundRecord(round_number=1, bytes_up=1, bytes_down=2)]
    found = sent(make_run(records=records, experiment=make_experiment(evaluation={})))
    assert (found.client_mean, found.client_most, found.turn_mean, found.target) == (None, None, None, None)
    assert found.total.both == 3


@pytest.mark.parametrize("records", [[], [RoundRecord(round_number=0)]])
def test_a_run_that_sent_nothing(make_run, records):
    assert sent(make_run(records=records)) is None


@pytest.mark.parametrize(("records", "first"), [(RECORDS, 1.0), (RECORDS[1:], 1.0), (RECORDS[:1], 0.0)])
def test_what_is_measured_before_the_first_round_is_no_round(monkeypatch, records, first):
    pytest.importorskip("matplotlib")
    drawn = []
    real = charts_costs.draw_line
    monkeypatch.setattr(charts_costs, "draw_line", lambda axes, x, y, look: (drawn.append(x), real(axes, x, y, look)))
    charts_costs.bytes_by_round(records, None)
    up, down, *totals = drawn
    assert (up[0], down[0], totals[0][0]) == (first, first, records[0].round_number)
    assert len(totals[0]) == len(records)
