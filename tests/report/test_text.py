from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedtrain.records import RoundRecord
from fedtrain.report.drift import Correlation
from fedtrain.report.text import (
    link_sentence,
    show_bytes,
    show_difference,
    show_epsilon,
    show_metric,
    show_seconds,
    summary,
    summary_lines,
)


def test_a_complete_run_reads_like_this(make_run):
    assert summary_lines(make_run()) == [
        "Trained mlp (55,210 parameters) on digits, spread over 20 clients: 40 rounds of fedavg, 10 clients a round.",
        "Strongly skewed labels: a client holds 3.1 of 10 labels on average, and 34 to 191 examples.",
        "Central accuracy: 88.6% after round 40; best 89.9% after round 38.",
        "Target accuracy 85.0%: reached in round 26, after 57.5 MB up and 57.4 MB down.",
        "On the clients' own held-out examples: accuracy 86.6% on average of 20 clients, 66.6% for the worst tenth.",
        "177 MB moved (88.4 MB up, 88.4 MB down) in 18.9 seconds.",
        "A client's update was used in 0 to 40 rounds (Gini coefficient 0.50); 10 of 20 clients were never used.",
    ]


def test_a_run_with_everything_says_one_sentence_on_each(whole_run, make_experiment):
    compression = {"up": ["topk:0.1", "int8"], "down": ["fp16"]}
    experiment = make_experiment(compression=compression | {"up_of": "delta"})
    first, clients, cost, trouble = summary(replace(whole_run, experiment=experiment))
    assert first[-1] == "Target accuracy 85.0%: reached in round 8, after 7.2 kB up and 80.0 kB down."
    assert clients[1:] == [
        "Drift: the cosine of a client's update and the mean of its round is 0.56, "
        "and its norm 1.85 times that of the mean (medians).",
    ]
    assert cost == [
        "131 kB moved (10.8 kB up, 120 kB down) in 0.0 seconds.",
        "Messages were compressed up by topk:0.1, int8 and down by fp16.",
        "A client moved 6.9 kB on average, and 12.0 kB at most.",
        "The run took 3.3 minutes on the virtual clock.",
        "Half of the rounds took up to 16.5 seconds, 95% up to 21.4 seconds; 20.0% of the clients' work was wasted.",
    ]
    assert trouble == [
        "Late and not waited for: 12 of 121 updates asked for (9.9%).",
        "A client's update was used in 0 to 6 rounds (Gini coefficient 0.10); 2 of 20 clients were never used.",
        "Quarantined 1 update of 1 client: client-18.",
    ]


@pytest.mark.parametrize(
    ("metric", "last", "worse"),
    [("accuracy", 0.65, "15.0 points"), ("accuracy", 0.8, None), ("mae", 9.5, "8.7"), ("mae", 0.7, None)],
)
def test_forgetting_is_told_where_clients_got_worse(make_run, metric, last, worse):
    records = [
        RoundRecord(round_number=n, clients={metric: value}, per_client={"a": {metric: value}})
        for n, value in enumerate([0.8, last])
    ]
    told = [line for line in summary_lines(make_run(records=records)) if "best before" in line]
    line = f"At the last evaluation a client was {worse} worse than at its own best before, on average."
    assert told == ([line] if worse else [])


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (Correlation(-0.67, 20), "The more a client's labels differ from everybody's, the lower its accuracy "),
        (Correlation(0.67, 20), "The more a client's labels differ from everybody's, the higher its accuracy "),
        (Correlation(0.2, 20), "How far a client's labels are from everybody's says little about its accuracy "),
    ],
)
def test_a_link_is_told_in_words(found, sentence):
    assert link_sentence(found, "accuracy") == f"{sentence}(rank correlation {found.rank:.2f} over 20 clients)."


def test_a_clear_link_of_labels_and_results_is_in_the_summary(make_run, make_data):
    data = make_data().model_copy(
        update={"label_names": ["x", "y"], "label_counts": [[20 + i, 20 - i] for i in range(20)]}
    )
    own = {name: {"accuracy": 0.9 - abs(i - 9.5) / 100} for i, name in enumerate(data.shown_clients)}
    record = RoundRecord(round_number=1, clients={"accuracy": 0.5}, per_client=own)
    assert [
        line for line in summary_lines(make_run(records=[record], data=data)) if line.startswith("The more a client")
    ]


@pytest.mark.parametrize(
    ("used", "line"),
    [
        ([*"ab"] * 3 + ["a"], None),
        ([*"ab"] * 3 + ["a"] * 9, "A client's update was used in 3 to 12 rounds (Gini coefficient 0.30)."),
    ],
)
def test_participation_is_told_where_it_is_uneven(make_run, used, line):
    records = [RoundRecord(round_number=n, participants=[client]) for n, client in enumerate(used)]
    told = [told for told in summary_lines(make_run(records=records, data=None)) if "Gini" in told]
    assert told == ([line] if line else [])


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ("running", "The run is not finished: this is its state after round 3 of 40."),
        ("interrupted", "The run was interrupted after round 3 of 40; the same command resumes it."),
        ("failed", "The run failed after round 3 of 40; what was finished is kept."),
    ],
)
def test_an_unfinished_run_says_so_first(make_run, make_manifest, make_records, status, sentence):
    run = make_run(manifest=make_manifest(status=status), records=make_records(3))
    assert summary_lines(run)[0] == sentence


def test_a_goal_that_was_missed_is_told(make_run, make_records):
    assert "Target accuracy 85.0%: not reached." in summary_lines(make_run(records=make_records(3)))


def test_quarantined_clients_are_named_most_often_first(make_run):
    often = [{"a": "NaN", "b": "NaN", "c": "NaN", "d": "NaN", "e": "NaN"}, {"e": "NaN"}]
    records = [RoundRecord(round_number=n, quarantined=reasons) for n, reasons in enumerate(often)]
    assert summary_lines(make_run(records=records))[-1] == "Quarantined 6 updates of 5 clients: e, a, b and 2 more."


def test_clients_that_are_set_aside_are_named_with_their_round(make_run):
    gone = [["a"], ["b", "c"], [], ["d"]]
    records = [RoundRecord(round_number=n, set_aside=clients) for n, clients in enumerate(gone, 1)]
    line = "Set aside for the rest of the run: a in round 1, b in round 2, c in round 2 and 1 more."
    assert summary_lines(make_run(records=records))[-1] == line


def test_clients_that_have_ended_are_named_with_their_round(make_private_run):
    records = [RoundRecord(round_number=n, ended=clients) for n, clients in ((3, ["a"]), (5, ["b"]))]
    line = "Ended, for their budget or policy allows no more: a in round 3, b in round 5."
    assert summary_lines(make_private_run(records=records))[-1] == line


def private(epsilon, **promise):
    return {"promise": promise, "records": [RoundRecord(round_number=3, epsilon=epsilon)], "data": None}


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (
            private(7.9949, unit="client", delta=1e-3),
            "Privacy: epsilon 7.99 at delta 0.001 (each client, add/remove one, PRV), planned 8; "
            "the server must be trusted.",
        ),
        (
            private(8.63, accountant="rdp"),
            "Privacy: epsilon 8.63 at delta 1e-05 (each example, add/remove one, RDP), more than the planned 8; "
            "the client's own machine must be trusted.",
        ),
        (
            private(2.0, sampling="none", relation="blank one"),
            "Privacy: epsilon 2 at delta 1e-05 (each example, blank one, PRV), planned 8; "
            "the client's own machine must be trusted.",
        ),
        (
            private(2.0, seeded=True),
            "NOT PRIVATE: the noise follows from a seed; with secret noise, epsilon 2 at delta 1e-05 "
            "(each example, add/remove one, PRV), planned 8.",
        ),
        (
            private(math.inf, planned_epsilon=math.inf),
            "NOT PRIVATE: epsilon infinite at delta 1e-05 (each example, add/remove one, PRV), planned infinite.",
        ),
        (private(None), "Privacy: nothing recorded yet; planned epsilon 8."),
        (private(None, seeded=True), "NOT PRIVATE: nothing recorded yet; planned epsilon 8."),
    ],
)
def test_privacy_is_one_line(make_private_run, run, line):
    assert summary_lines(make_private_run(**run))[2] == line


def test_a_plain_run_has_no_line_of_privacy(make_run):
    assert not [line for line in summary_lines(make_run()) if "rivacy" in line or "PRIVATE" in line]


def test_late_clients_are_told_with_their_share(make_run):
    record = RoundRecord(
        round_number=1,
        participants=["a", "b", "c"],
        late=["d", "e"],
        quarantined={"f": "NaN"},
        virtual_seconds=44_280.0,
    )
    lines = summary_lines(make_run(records=[record]))
    assert "The run took 12.3 hours on the virtual clock." in lines
    assert "Late and not waited for: 2 of 6 updates asked for (33.3%)." in lines


def test_an_asynchronous_run_tells_how_old_its_updates_were(make_run):
    record = RoundRecord(round_number=1, participants=["a", "b"], staleness=1.5, virtual_seconds=30.0)
    line = "The run took 30.0 seconds on the virtual clock; an update was 1.5 rounds old on average."
    assert line in summary_lines(make_run(records=[record]))


def test_personal_models_stand_beside_the_one_trained_together(make_run):
    values = {f"c{i:02d}": {"accuracy": 0.8, "personal_accuracy": 0.9, "num_examples": 10.0} for i in range(18)}
    values |= {f"d{i}": {"accuracy": 0.3, "personal_accuracy": 0.7, "num_examples": 10.0} for i in range(2)}
    record = RoundRecord(round_number=1, per_client=values, clients={"accuracy": 0.75, "personal_accuracy": 0.88})
    lines = summary_lines(make_run(records=[record]))
    assert (
        "Personal models: accuracy 88.0% on average of 20 clients, 70.0% for the worst tenth; "
        "without them 75.0% and 30.0%."
    ) in lines


def test_numbers_as_targets_are_told_as_ranges(make_run, make_data):
    record = RoundRecord(round_number=1, central={"loss": 9.0, "mae": 2.34567})
    data = make_data().model_copy(update={"target": "number"})
    lines = summary_lines(make_run(records=[record], data=data))
    assert lines[1].startswith("Strongly skewed target ranges: a client holds 3.1 of 10 target ranges on average")
    assert lines[2] == "Central mae: 2.346 after round 1, the best of the run."


@pytest.mark.parametrize(
    ("l1", "words"),
    [
        (0.149, "Nearly even"),
        (0.15, "Slightly skewed"),
        (0.4, "Moderately skewed"),
        (0.7, "Strongly skewed"),
        (1.2, "Extremely skewed"),
    ],
)
def test_skew_has_words(make_run, make_data, l1, words):
    data = make_data()
    measured = data.heterogeneity.model_copy(update={"l1": l1})
    lines = summary_lines(make_run(data=data.model_copy(update={"heterogeneity": measured})))
    assert lines[1].startswith(f"{words} labels: ")


def test_tokens_and_missing_data_leave_the_labels_out(make_run, make_data):
    tokens = make_data().model_copy(update={"heterogeneity": None, "label_names": []})
    assert summary_lines(make_run(data=tokens))[1] == "A client holds 34 to 191 examples."
    assert summary_lines(make_run(data=None))[1].startswith("Central accuracy")


def test_a_diverged_run_says_not_a_number(make_run):
    records = [RoundRecord(round_number=1, central={"accuracy": math.nan})]
    line = "Central accuracy: not a number after round 1; no value was finite."
    assert line in summary_lines(make_run(records=records))


def test_names_reach_the_terminal_without_control_characters(hostile_run):
    assert all(line.isprintable() for line in summary_lines(hostile_run))


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy", 0.9126, "91.3%"),
        ("mae", 0.9126, "0.9126"),
        ("loss", 12345.6, "1.235e+04"),
        ("loss", math.nan, "not a number"),
        ("accuracy", -math.inf, "infinite"),
        ("loss", None, "-"),
    ],
)
def test_metrics(metric, value, text):
    assert show_metric(metric, value) == text


def test_differences():
    assert (show_difference("accuracy", 0.0213), show_difference("mae", 0.0213)) == ("2.1 points", "0.0213")


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(0.0, "0"), (0.012345, "0.0123"), (7.996, "8"), (51.72, "51.7"), (12345.6, "12,346"), (math.inf, "infinite")],
)
def test_epsilons(epsilon, text):
    assert show_epsilon(epsilon) == text
    assert show_epsilon(None) == "-"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (177e6, "177 MB"),
        (999.7e6, "1.0 GB"),
        (8.84e9, "8.8 GB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_bytes(count, text):
    assert show_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 seconds"), (90, "1.5 minutes"), (9000, "2.5 hours")])
def test_seconds(seconds, text):
    assert show_seconds(seconds) == text
