from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from fedtrain.errors import InputError, MissingExtraError
from fedtrain.records import RoundRecord
from fedtrain.report.compare import Stat, compare
from fedtrain.report.compare_page import headline, tables, write_page
from fedtrain.report.view import RunView


def records(accuracies: Sequence[float], **changes: Any) -> list[RoundRecord]:
    """Rounds from 0 on; each moves 100 bytes up and 200 down in 2 virtual seconds."""
    return [
        RoundRecord.model_validate(
            {"round_number": n, "central": {"accuracy": value, "loss": 1 - value}}
            | ({"bytes_up": 100, "bytes_down": 200, "seconds_train": 1.0, "virtual_seconds": 2.0} if n else {})
            | changes
        )
        for n, value in enumerate(accuracies)
    ]


@pytest.fixture
def run(make_run: Callable[..., RunView], make_experiment: Callable[..., Any], make_manifest: Callable[..., Any]):
    def make(accuracies: Sequence[float], status: str = "complete", changes: dict | None = None, **fields: Any):
        experiment = make_experiment(**{"rounds": 3, "evaluation": {}} | fields)
        manifest = make_manifest(status=status)
        return make_run(experiment=experiment, manifest=manifest, records=records(accuracies, **changes or {}))

    return make


PROX = {"strategy": {"name": "fedprox", "mu": 0.5}}


def test_runs_that_differ_only_in_the_seed_are_one_group(run) -> None:
    found = compare(
        {
            "a": run([0.1, 0.5, 0.8], seed=1),
            "b": run([0.1, 0.7, 0.6], seed=2),
            "c": run([0.1, 0.3, 0.4], seed=1, name="other", **PROX),
        }
    )
    first, second = found.groups
    assert (first.names, second.names) == (("a", "b"), ("c",))
    assert (first.label, second.label) == ("strategy=fedavg", "strategy=fedprox")
    assert first.final == Stat(2, pytest.approx(0.7), pytest.approx(math.sqrt(0.02)), 0.6, 0.8)
    assert first.best == Stat(2, pytest.approx(0.75), pytest.approx(math.sqrt(0.005)), 0.7, 0.8)
    assert second.final == Stat(1, 0.4, None, 0.4, 0.4)
    assert [(d.path, d.values) for d in found.differences] == [
        ("strategy.name", ('"fedavg"', '"fedprox"')),
        ("strategy.mu", ("", "0.5")),
    ]


def test_costs_are_counted_to_the_best_value_that_every_run_reached(run) -> None:
    found = compare({"a": run([0.1, 0.6, 0.8], seed=1), "b": run([0.1, 0.2, 0.5], **PROX)})
    assert (found.target, found.target_is_goal, found.clock) == (0.5, False, True)
    fast, slow = found.groups
    reads = [lambda p: p.round_number, lambda p: p.bytes_up, lambda p: p.bytes_down, lambda p: p.virtual_seconds]
    assert [fast.to_target(read).mean for read in reads] == [1, 100, 200, 2]
    assert [slow.to_target(read).mean for read in reads] == [2, 200, 400, 4]


def test_costs_are_counted_to_the_experiments_own_target(run) -> None:
    goal = {"evaluation": {"target_metric": "accuracy", "target_value": 0.55}}
    found = compare({"a": run([0.1, 0.6, 0.8], **goal), "b": run([0.1, 0.2, 0.5], **goal, **PROX)})
    assert (found.target, found.target_is_goal) == (0.55, True)
    assert [group.to_target(lambda p: p.round_number) for group in found.groups] == [Stat(1, 1, None, 1, 1), None]
    (costs,) = (table for table in tables(found) if table.title.startswith("To accuracy 55.0%"))
    assert [row[1] for row in costs.rows] == ["1 of 1", "0 of 1"]
    assert costs.rows[1][2:] == ("-", "-", "-", "-")


def test_a_loss_is_better_when_it_is_smaller(run) -> None:
    found = compare({"a": run([0.1, 0.6, 0.8]), "b": run([0.1, 0.2, 0.5], **PROX)}, metric="loss")
    assert found.target == pytest.approx(0.5)
    assert [group.best.mean for group in found.groups] == [pytest.approx(0.2), pytest.approx(0.5)]
    assert [group.to_target(lambda p: p.round_number).mean for group in found.groups] == [1, 2]
    assert "Best at the end: 0.2 with strategy=fedavg." in headline(found)


def test_curves_are_means_of_the_rounds_that_all_runs_of_a_group_have(run) -> None:
    (group,) = compare({"a": run([0.1, 0.5, 0.8, 0.9], seed=1), "b": run([0.3, 0.7], seed=2)}).groups
    curve = [(p.round_number, p.value, p.moved, low, high) for p, low, high in group.mean_curve()]
    assert curve == [(0, pytest.approx(0.2), 0, 0.1, 0.3), (1, pytest.approx(0.6), 300, 0.5, 0.7)]


def test_groups_may_be_made_by_one_field(run) -> None:
    runs = {
        "a": run([0.1, 0.5], rounds=10),
        "b": run([0.1, 0.7], rounds=20),
        "c": run([0.1, 0.6], rounds=20, **PROX),
    }
    by_rounds = compare(runs, by="rounds")
    assert [(group.label, group.names) for group in by_rounds.groups] == [
        ("rounds=10", ("a",)),
        ("rounds=20", ("b", "c")),
    ]
    assert {d.path: d.values for d in by_rounds.differences}["strategy.name"] == ('"fedavg"', '"fedavg", "fedprox"')
    assert [group.names for group in compare(runs, by="strategy").groups] == [("a", "b"), ("c",)]
    with pytest.raises(InputError, match=r"no such field: got strategy.nam.*Did you mean strategy.name\?"):
        compare(runs, by="strategy.nam")


def test_names_of_groups_use_as_few_fields_as_tell_them_apart(run) -> None:
    rates = [{"training": {"optimizer": {"lr": lr}}} for lr in (0.1, 0.2)]
    found = compare(
        {
            str(i): run([0.1, 0.5], **rate, **other)
            for i, (rate, other) in enumerate([(rates[0], {}), (rates[1], {}), (rates[0], PROX)])
        }
    )
    assert [g.label for g in found.groups] == [
        "lr=0.1, strategy=fedavg",
        "lr=0.2, strategy=fedavg",
        "lr=0.1, strategy=fedprox",
    ]


def test_own_files_with_other_contents_set_runs_apart(run, make_manifest) -> None:
    same = run([0.1, 0.5])
    found = compare({"a": same, "b": replace(same, manifest=make_manifest(own_files={"task.py": "ab" * 32}))})
    assert [d.path for d in found.differences] == ["contents of task.py"]


def test_an_unfinished_run_is_taken_and_told_of(run) -> None:
    found = compare(
        {"a": run([0.1, 0.5]), "b": run([0.1], status="interrupted", seed=2), "c": run([], status="failed")}
    )
    assert found.unfinished == ["b (interrupted, after round 0 of 3)", "c (failed, after round 0 of 3)"]
    assert "Not finished: b (interrupted, after round 0 of 3); c (failed, after round 0 of 3)." in headline(found)
    assert found.groups[0].final.runs == 2


def test_the_same_seed_twice_is_told_of(run) -> None:
    found = compare({"a": run([0.1, 0.5]), "b": run([0.1, 0.5])})
    assert "The same seed counts more than once in: all runs." in headline(found)


def test_runs_of_different_metrics_do_not_go_together(run, make_run) -> None:
    other = make_run(records=[RoundRecord(round_number=0, central={"loss": 1.0, "rmse": 2.0})])
    with pytest.raises(InputError, match=r"different metrics: got accuracy in a; rmse in b.*--metric loss"):
        compare({"a": run([0.1]), "b": other})
    assert compare({"a": run([0.1]), "b": other}, metric="loss").metric == "loss"
    with pytest.raises(InputError, match=r"the metric rmse was not measured in a"):
        compare({"a": run([0.1]), "b": other}, metric="rmse")


def test_runs_without_a_measurement_cannot_be_compared(run) -> None:
    with pytest.raises(InputError, match="nothing was measured"):
        compare({"a": run([])})


def test_runs_without_a_central_test_set_are_compared_on_the_clients(run) -> None:
    own = {"central": {}, "clients": {"accuracy": 0.25}}
    found = compare({"a": run([0.1], changes=own), "b": run([0.1, 0.5], changes={"clients": {"accuracy": 0.75}})})
    assert found.part == "clients"
    assert found.groups[0].final == Stat(2, 0.5, pytest.approx(math.sqrt(0.125)), 0.25, 0.75)


def test_a_diverged_run_leaves_no_number_but_a_name(run) -> None:
    found = compare({"a": run([0.1, math.nan]), "b": run([0.2, 0.3], seed=2)})
    assert tables(found)[0].rows[0][2] == "not a number"


def test_epsilon_that_protects_nobody_is_marked(make_private_run) -> None:
    for seeded in (False, True):
        found = compare({"a": make_private_run({"seeded": seeded})})
        header, row = tables(found)[0].header, tables(found)[0].rows[0]
        assert row[header.index("Epsilon")] == ("7.8 NOT PRIVATE" if seeded else "7.8")


def page_of(found, path: Path) -> str:
    write_page(found, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture
def _drawing() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")


@pytest.mark.usefixtures("_drawing")
def test_the_page_holds_curves_tables_and_their_data(run, tmp_path: Path) -> None:
    runs = {f"runs/{n}": run([0.1, 0.2 + n / 10, 0.4 + n / 10], seed=n) for n in range(3)}
    html = page_of(compare(runs | {"x": run([0.1, 0.3], **PROX)}), tmp_path / "c.html")
    assert html.count("<svg") == 3
    assert "var(--group-0)" in html
    assert "#f1000" not in html
    assert not re.findall(r"<script|<link|url\((?!#)|@import|https?:", html)
    sheets = {
        name: list(csv.reader(io.StringIO(unquote(uri))))
        for uri, name in re.findall(
            r'href="data:text/csv;charset=utf-8,([^"]*)" download="comparison-([^"]*).csv"', html
        )
    }
    assert set(sheets) == {"curves", "table-1", "table-2", "table-3", "runs"}
    assert sheets["curves"][0][:5] == ["group", "round", "mean_central_accuracy", "least", "most"]
    assert sheets["curves"][2][:6] == ["strategy=fedavg", "1", "0.3", "0.2", "0.4", "100"]
    assert [row[:3] for row in sheets["runs"][1:]] == [
        *(["runs/" + str(n), "strategy=fedavg", str(n)] for n in range(3)),
        ["x", "strategy=fedprox", "7"],
    ]


@pytest.mark.usefixtures("_drawing")
def test_hostile_names_are_text(hostile_run: RunView, tmp_path: Path) -> None:
    name = "runs/<script>alert(1)</script>\x1b[2J"
    found = compare({name: hostile_run})
    html = page_of(found, tmp_path / "c.html")
    assert "<script>" not in html
    assert "\x1b" not in html
    told = [
        *headline(found),
        *(cell for table in tables(found) for row in (table.title, *table.header, *table.rows) for cell in row),
    ]
    assert not [text for text in told if not text.isprintable()]


@pytest.mark.usefixtures("_drawing")
def test_more_groups_than_colours_are_in_the_tables_but_not_drawn(run, tmp_path: Path) -> None:
    runs = {str(n): run([0.1, n / 20], rounds=n + 1) for n in range(10)}
    html = page_of(compare(runs), tmp_path / "c.html")
    assert "Drawn are the 8 best groups; 2 more" in html
    keys = html.partition("Convergence")[2].partition("<figure")[0]
    assert re.findall(r"rounds=\d+", keys) == [f"rounds={n + 1}" for n in range(2, 10)]


def test_what_sets_many_groups_apart_is_a_row_for_each(run) -> None:
    found = compare({str(n): run([0.1, 0.5], rounds=n + 1, **(PROX if n else {})) for n in range(5)})
    differences = tables(found)[-1]
    assert differences.header == ("Group", "rounds", "strategy.name", "strategy.mu")
    assert differences.rows[:2] == (("rounds=1", "1", '"fedavg"', "-"), ("rounds=2", "2", '"fedprox"', "0.5"))


@pytest.mark.usefixtures("_drawing")
def test_a_file_that_is_no_comparison_is_not_written_over(run, tmp_path: Path) -> None:
    found = compare({"a": run([0.1, 0.5])})
    path = tmp_path / "c.html"
    path.write_text("my notes")
    with pytest.raises(InputError, match="no comparison of fedtrain's"):
        write_page(found, path)
    assert path.read_text() == "my notes"
    path.unlink()
    write_page(found, path)
    write_page(found, path)
    with pytest.raises(InputError, match="cannot write"):
        write_page(found, tmp_path / "nowhere" / "c.html")


def test_without_jinja_the_page_says_what_to_install(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="report"):
        write_page(compare({"a": run([0.1, 0.5])}), tmp_path / "c.html")
