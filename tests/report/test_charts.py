from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest

from fedtrain.records import RoundRecord
from fedtrain.report.charts import convergence, label_map, largest_share, per_client, spending
from fedtrain.report.view import Facts, client_scores

matplotlib = pytest.importorskip("matplotlib")


def charts_of(run):
    facts = Facts.of(run)
    return [*convergence(run, facts), label_map(run.data), per_client(client_scores(run, facts.metric), facts)]


@pytest.fixture(scope="module")
def charts(make_run):
    """The charts of one run, drawn once."""
    return charts_of(make_run())


def test_charts_take_their_colours_and_fonts_from_the_page(charts):
    for svg in charts:
        assert "var(--" in svg
        assert "#f0000" not in svg
        assert "font-family" not in svg
        assert "<style" not in svg
        assert "http" not in svg


def test_charts_of_one_page_share_no_ids(charts):
    ids = [name for svg in charts for name in re.findall(r' id="([^"]+)"', svg)]
    assert ids
    assert len(ids) == len(set(ids))


def test_drawing_ignores_matplotlibs_settings_and_puts_them_back(charts, make_data):
    with matplotlib.rc_context({"font.size": 31, "text.parse_math": True}):
        before = dict(matplotlib.rcParams)
        assert label_map(make_data()) == charts[3]
        assert dict(matplotlib.rcParams) == before


def test_each_client_is_a_dot_until_there_are_too_many(charts, make_run, make_records):
    run = make_run(records=make_records(0, 1000))
    facts = Facts.of(run)
    crowd = per_client(client_scores(run, facts.metric), facts)
    assert charts[-1].count("fill: var(--clients)") == 20
    assert crowd.count("fill: var(--clients)") == 0
    assert crowd.count("stroke: var(--clients)") == 1


def test_personal_models_are_rings_until_there_are_too_many(make_run, make_records):
    for clients, dots, rings, lines in ((20, 20, 7, 0), (1000, 0, 0, 1)):
        (record,) = make_records(0, clients)
        own = {name: values | {"personal_accuracy": 0.9} for name, values in list(record.per_client.items())[:7]}
        run = make_run(records=[record.model_copy(update={"per_client": record.per_client | own})])
        facts = Facts.of(run)
        svg = per_client(client_scores(run, facts.metric), facts)
        assert svg.count("fill: var(--clients)") == dots
        assert len(re.findall(r"fill: none; stroke: var\(--personal\)", svg)) == rings + lines
        assert svg.count("stroke: var(--clients)") == lines


def test_virtual_time_is_a_fourth_axis_where_there_is_any(make_run, make_records):
    records = [record.model_copy(update={"virtual_seconds": 180.0}) for record in make_records(40)]
    run = make_run(records=records)
    assert len(convergence(make_run(), Facts.of(make_run()))) == 3
    *_, by_time, by_virtual_time = convergence(run, Facts.of(run))
    assert ">seconds<" in by_time
    assert ">hours on the virtual clock<" in by_virtual_time


def test_personal_models_have_a_curve_of_their_own(charts, make_run, make_records):
    records = [
        record.model_copy(update={"clients": record.clients | {"personal_accuracy": 0.9, "personal_loss": 0.2}})
        for record in make_records()
    ]
    run = make_run(records=records)
    by_round, *_ = convergence(run, Facts.of(run))
    assert by_round.count("stroke: var(--personal)") == 2  # metric and loss
    assert charts[0].count("stroke: var(--personal)") == 0


def test_epsilon_is_drawn_over_rounds_and_buys_accuracy(make_private_run):
    run = make_private_run(rounds=3)
    over_rounds, bought = spending(run, Facts.of(run))
    assert ">epsilon<" in over_rounds
    assert ">rounds<" in over_rounds
    assert over_rounds.count("fill: none; stroke: var(--privacy)") == 1
    assert over_rounds.count("stroke-dasharray") == 1  # the planned epsilon
    assert ">central accuracy<" in bought
    assert ">epsilon<" in bought
    assert bought.count("fill: none; stroke: var(--central)") == 1


def test_what_was_not_spent_or_not_measured_is_not_drawn(make_private_run):
    unmeasured = [RoundRecord(round_number=n, epsilon=1.0 * n) for n in range(3)]
    for records, charts in ((unmeasured, 1), (unmeasured[:1], 0), ([], 0)):
        run = make_private_run(records=records)
        assert len(spending(run, Facts.of(run))) == charts


def test_the_label_map_shades_by_share(make_data):
    from PIL import Image

    data = make_data(2, 2).model_copy(update={"label_names": ["cat", "dog"], "label_counts": [[6, 2], [0, 4]]})
    encoded = re.search(r'href="data:image/png;base64,([^"]+)"', label_map(data))
    assert encoded is not None
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))).convert("RGBA"))[..., 3]
    assert largest_share(data) == 1.0
    assert alpha.tolist() == [[191, 0], [64, 255]]  # rows are labels, columns clients


def test_an_empty_client_has_no_share(make_data):
    data = make_data(2, 2).model_copy(update={"label_names": ["cat"], "label_counts": [[0], [0]]})
    assert largest_share(data) == 0.0
    assert "<image" in label_map(data)


def test_names_are_text_not_markup(hostile_run):
    facts = Facts.of(hostile_run)
    clients = per_client(client_scores(hostile_run, facts.metric), facts)
    assert clients.count("fill: var(--clients)") == 18  # of 21, one of them without a size
    for svg in (label_map(hostile_run.data), clients):
        assert "<script" not in svg
        assert "&lt;script&gt;" in svg
        assert "$\\bad{$" in svg


def test_axes_name_a_unit_that_fits(make_run, make_records):
    by_round, by_bytes, by_time = convergence(make_run(records=make_records(200)), Facts.of(make_run()))
    assert ">rounds<" in by_round
    assert ">MB moved, both ways<" in by_bytes
    assert ">minutes<" in by_time
