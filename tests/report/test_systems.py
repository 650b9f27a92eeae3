from __future__ import annotations

import pytest

from fedtrain.records import RoundRecord
from fedtrain.report.systems import Clock, Participation, Use


def test_the_clock_tells_median_and_95th_percentile_and_what_was_wasted(make_run):
    lengths = [0.0, *range(1, 102)]  # nothing happens in round 0
    records = [
        RoundRecord(round_number=n, virtual_seconds=s, client_seconds=2 * s, wasted_seconds=s / 2)
        for n, s in enumerate(lengths)
    ]
    clock = Clock.of(make_run(records=records))
    assert (clock.seconds, clock.median, clock.p95, clock.longest) == (5151.0, 51.0, 96.0, (101, 101.0))
    assert (clock.client_seconds, clock.wasted_seconds, clock.wasted_share) == (10302.0, 2575.5, 0.25)


def test_without_a_clock_there_is_none(make_run):
    assert Clock.of(make_run()) is None
    assert Clock.of(make_run(records=[RoundRecord(round_number=1, virtual_seconds=3.0)])).wasted_share == 0


def test_participation_counts_uses_also_of_those_never_used(make_run, make_data):
    data = make_data(5, 4).model_copy(update={"shown_clients": list("abcd"), "shown_sizes": [10, 20, 30, 40]})
    records = [
        RoundRecord(round_number=1, participants=["a", "b"], late=["c"]),
        RoundRecord(round_number=2, participants=["a", "b"], quarantined={"c": "NaN"}),
        RoundRecord(round_number=3, participants=["a"]),
    ]
    taken = Participation.of(make_run(records=records, data=data))
    assert taken.uses == (Use("c", 0, 30), Use("d", 0, 40), Use("b", 2, 20), Use("a", 3, 10))
    assert (taken.clients, taken.updates, taken.least, taken.most, taken.never) == (5, 5, 0, 3, 3)
    assert taken.gini == pytest.approx((4 * 3 + 2 * 2) / (5 * 5))  # of 0, 0, 0, 2, 3
    assert taken.even == 0.2


def test_clients_of_whom_only_the_records_tell(make_run):
    records = [RoundRecord(round_number=1, participants=["a"], late=["b"], ended=["c"])]
    taken = Participation.of(make_run(records=records, data=None))
    assert taken.uses == (Use("b", 0, None), Use("c", 0, None), Use("a", 1, None))
    assert (taken.clients, taken.never) == (3, 2)


@pytest.mark.parametrize(
    "records",
    [[], [RoundRecord(round_number=0)], [RoundRecord(round_number=n, participants=["a", "b"]) for n in (1, 2)]],
)
def test_nothing_or_equal_shares_say_nothing(make_run, records):
    assert Participation.of(make_run(records=records, data=None)) is None
