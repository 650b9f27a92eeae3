from __future__ import annotations

import csv
import io
from urllib.parse import unquote

import pytest

from fedtrain.records import RoundRecord
from fedtrain.report import sections
from fedtrain.report.view import Facts

pytest.importorskip("matplotlib")


def part_of(name, run):
    takes_facts = name not in ("participation", "drift")
    return getattr(sections, name)(run, *[Facts.of(run)] * takes_facts)


def table(part, file):
    """The rows behind a chart, as text."""
    (chart,) = [chart for chart in part.charts if chart.file == file]
    return list(csv.reader(io.StringIO(unquote(chart.csv.partition(",")[2]))))


def test_communication_tells_rounds_totals_and_clients(whole_run):
    part = part_of("communication", whole_run)
    assert table(part, "bytes")[:3] == [["round", "bytes_up", "bytes_down"], ["0", "0", "0"], ["1", "900", "10000"]]
    assert table(part, "bytes-total")[-1] == ["12", "10800", "120000"]
    assert table(part, "bytes-clients")[:3] == [
        ["client", "bytes_up", "bytes_down"],
        ["client-19", "0", "12000"],
        ["client-00", "600", "6000"],
    ]
    assert part.rows == [
        ("In total", "10.8 kB", "120 kB", "131 kB"),
        ("A round, on average", "900 B", "10.0 kB", "10.9 kB"),
        ("The largest round, 1", "900 B", "10.0 kB", "10.9 kB"),
        ("A client, on average", "568 B", "6.3 kB", "6.9 kB"),
        ("The client with most, client-19", "0 B", "12.0 kB", "12.0 kB"),
        ("A client in one of its rounds, on average", "90 B", "1.0 kB", "1.1 kB"),
        ("Until the target was reached in round 8", "7.2 kB", "80.0 kB", "87.2 kB"),
    ]


def test_the_timeline_tells_each_rounds_length_and_work(whole_run):
    part = part_of("timeline", whole_run)
    header, *rounds = table(part, "timeline")
    assert dict(zip(header, rounds[1])) == {
        "round": "2",
        "virtual_seconds": "12",
        "client_seconds": "100",
        "wasted_seconds": "20",
        "used": "9",
        "late": "1",
        "quarantined": "1",
        "staleness": "0",
    }
    assert len(rounds) == 12
    assert part.rows == [
        ("Whole run", "3.3 minutes"),
        ("A round: median", "16.5 seconds"),
        ("A round: 95th percentile", "21.4 seconds"),
        ("The longest round, 12", "22.0 seconds"),
        ("Work of the clients", "20.0 minutes"),
        ("of it wasted", "4.0 minutes (20.0%)"),
        ("Updates that were late", "12 of 121 (9.9%)"),
    ]
    assert part.charts[0].note == ""


def test_many_rounds_share_a_bar(make_run):
    records = [RoundRecord(round_number=n, virtual_seconds=1.0) for n in range(1, 122)]
    part = part_of("timeline", make_run(records=records))
    assert part.charts[0].note == "A bar is the mean of 3 rounds."
    assert part.charts[0].svg.count("fill: var(--muted)") <= 60
    assert len(table(part, "timeline")) == 122


def test_participation_tells_each_clients_share(whole_run):
    part = part_of("participation", whole_run)
    header, *clients = table(part, "participation")
    assert header == ["client", "rounds_used", "share_of_updates", "share_of_examples"]
    examples = whole_run.data.num_examples
    assert clients[0] == ["client-18", "0", "0", f"{60 / examples:.7g}"]
    assert clients[2] == ["client-00", "6", f"{6 / 108:.7g}", f"{60 / examples:.7g}"]
    assert part.rows == [
        ("Clients", "20"),
        ("Updates used", "108"),
        ("Rounds a client was used in", "0 to 6"),
        ("Gini coefficient", "0.10"),
        ("Clients never used", "2: client-18, client-19"),
    ]


def test_a_crowd_of_which_few_are_known_by_name(make_run, make_data):
    used = [RoundRecord(round_number=n, participants=[f"client-{n:02d}", "a"]) for n in range(4)]
    part = part_of("participation", make_run(records=used, data=make_data(1000, 10)))
    assert ("Clients never used", "995: client-04, client-05, client-06 and others") in part.rows
    assert len(table(part, "participation")) == 1 + 11


def test_fairness_tells_each_evaluation_and_each_client(whole_run):
    part = part_of("fairness", whole_run)
    header, *rounds = table(part, "fairness")
    first, *_, last = [dict(zip(header, row)) for row in rounds]
    assert (first["round"], first["clients"], first["forgetting"]) == ("3", "20", "")
    final = 0.95 - 0.8 / 12
    assert float(last["worst_tenth_mean"]) == pytest.approx(final - 0.08)
    assert float(last["median"]) == pytest.approx(final - 0.04)
    assert float(last["forgetting"]) == pytest.approx(0.8 / 12 - 0.8 / 9, rel=1e-5)
    header, *clients = table(part, "fairness-clients")
    assert header == ["client", "round_3", "round_6", "round_9", "round_12"]
    assert clients[0] == ["client-04", *(f"{0.87 - 0.8 / n:.7g}" for n in (3, 6, 9, 12))]
    assert part.charts[1].ramp == ("60.3%", "88.3%")
    assert "the clients: -2.2 points at the last" in part.sentences[0]


def test_drift_tells_deciles_and_diversity(whole_run):
    part = part_of("drift", whole_run)
    header, *rounds = table(part, "drift-cosine")
    assert header == ["round", "updates", "lowest_tenth", "median", "highest_tenth"]
    assert [float(cell) for cell in rounds[0]] == pytest.approx([1, 9, 0.612, 0.74, 0.868])
    assert [float(cell) for cell in table(part, "drift-norm")[2]] == pytest.approx([2, 9, 1.98, 2.3, 2.62])
    assert table(part, "diversity")[1] == ["1", "9", "0.25"]


def test_drift_without_diversity_has_two_charts(make_run):
    part = part_of("drift", make_run(records=[RoundRecord(round_number=1, drift={"a": (0.5, 1.0)})]))
    assert [chart.file for chart in part.charts] == ["drift-cosine", "drift-norm"]


def test_label_distance_stands_against_result_and_drift(whole_run):
    part = part_of("labels_and_results", whole_run)
    assert [chart.file for chart in part.charts] == ["labels-result", "labels-cosine", "labels-norm"]
    header, *clients = table(part, "labels-cosine")
    assert header == ["client", "distance_bits", "labels_cosine"]
    assert len(clients) == 18  # two were never used
    assert clients[3][0] == "client-03"
    assert float(clients[3][2]) == pytest.approx(0.78)
    assert len(table(part, "labels-result")) == 21
    assert all("(rank correlation " in chart.note for chart in part.charts)


@pytest.mark.parametrize(
    "name", ["communication", "timeline", "participation", "fairness", "drift", "labels_and_results"]
)
@pytest.mark.parametrize(
    "records",
    [
        [],
        [RoundRecord(round_number=0, central={"loss": 1.0})],
        [RoundRecord(round_number=1, clients={"accuracy": 0.5}, per_client={"a": {"accuracy": 0.5}})],
        [RoundRecord(round_number=n, per_client={"a": {"accuracy": float("nan")}}) for n in (1, 2)],
    ],
    ids=["no record", "an untrained model", "one evaluation", "nothing finite"],
)
def test_a_section_with_nothing_to_show_is_absent(make_run, name, records):
    assert part_of(name, make_run(records=records)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_cannot_be_drawn_break_no_chart(whole_run, make_run, value):
    records = [
        r.model_copy(
            update={
                "drift": dict.fromkeys(r.drift, (value, value)),
                "diversity": value,
                "per_client": {client: {"accuracy": value} for client in r.per_client},
            }
        )
        for r in whole_run.records
    ]
    run = make_run(records=records, data=whole_run.data)
    for name in ("fairness", "drift", "labels_and_results"):
        part = part_of(name, run)
        assert part is None or all("nan" not in chart.svg for chart in part.charts)
