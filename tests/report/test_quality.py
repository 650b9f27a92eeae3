from __future__ import annotations

import csv
import io
import urllib.parse
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from fedtrain.records import RoundRecord
from fedtrain.report.quality import confusion_chart, quality
from fedtrain.report.view import RunView

MATRIX = [[3, 1], [0, 4]]


def records(**last: object) -> list[RoundRecord]:
    first = {"round_number": 1, "central": {"loss": 9.0, "f1-macro": 0.1}}
    return [RoundRecord.model_validate(r) for r in (first, {"round_number": 2, **last})]


def test_every_metric_of_the_last_evaluation(make_run: Callable[..., RunView]) -> None:
    central = {"loss": 1.0, "accuracy": 0.5, "f1-macro": 0.25}
    found = quality(make_run(records=records(central=central, clients={"loss": 2.0, "personal_loss": 3.0})))
    assert found is not None
    assert list(found.header) == [
        "Metric",
        "central test set",
        "clients' held-out examples",
        "clients' personal models",
    ]
    assert [list(row) for row in found.rows] == [
        ["loss", "1", "2", "3"],
        ["accuracy", "50.0%", "-", "-"],
        ["f1-macro", "0.25", "-", "-"],
    ]
    assert not found.charts


def test_a_loss_and_one_metric_are_shown_elsewhere(make_run: Callable[..., RunView]) -> None:
    assert quality(make_run(records=records(central={"loss": 1.0, "f1-macro": 0.5}))) is None
    assert quality(make_run(records=[])) is None


def test_a_confusion_matrix_is_a_heat_map_with_its_counts(make_run: Callable[..., RunView]) -> None:
    found = quality(make_run(records=records(clients_confusion=MATRIX), data=None))
    assert found is not None
    (chart,) = found.charts
    assert chart.file == "confusion-clients"
    text = urllib.parse.unquote(chart.csv.partition(",")[2])
    assert list(csv.reader(io.StringIO(text))) == [["class", "0", "1"], ["0", "3", "1"], ["1", "0", "4"]]


@pytest.mark.parametrize("classes", [2, 100])
def test_a_heat_map_names_what_there_is_room_for(classes: int) -> None:
    names = ["<script>", *(f"class {i}" for i in range(1, classes))]
    svg = confusion_chart([[1] * classes] * classes, names, "central")
    words = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("text")]
    assert {"true", "predicted"} <= set(words)
    assert words.count("<script>") == 2
    assert 2 * min(classes, 12) <= sum(word.startswith("class ") for word in words) + 2 <= 2 * 24
