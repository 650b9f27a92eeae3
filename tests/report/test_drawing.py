from __future__ import annotations

import numpy as np
import pytest

from fedtrain.report.drawing import CENTRAL, draw_band, draw_heat, draw_line, figure, grouped, scaled

pytest.importorskip("matplotlib")


def test_groups_are_means_of_neighbours():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 9.0], [10.0, 11.0]])
    assert grouped(values, 5) is values
    assert grouped(values, 3).tolist() == [[2.0, 3.0], [6.0, 7.5], [10.0, 11.0]]
    assert grouped(np.arange(1001.0), 100).shape == (91,)


def test_a_long_line_keeps_its_peaks_and_few_points():
    values = np.sin(np.arange(200_000.0))
    values[77_777], values[150_000] = 9.0, -9.0
    values[10:2000] = np.nan
    with figure("line", (5, 3)) as (drawing, finish):
        axes = drawing.subplots()
        draw_line(axes, np.arange(200_000.0), values, (CENTRAL, 1.0))
        drawn = np.asarray(axes.lines[0].get_ydata())
        svg = finish()
    assert len(drawn) <= 1000
    assert (np.nanmax(drawn), np.nanmin(drawn)) == (9.0, -9.0)
    assert np.isnan(drawn).any()
    assert len(svg) < 60_000


def test_a_long_band_has_few_points():
    x = np.arange(100_000.0)
    with figure("band", (5, 3)) as (drawing, finish):
        draw_band(drawing.subplots(), x, np.stack([x, x + 1 + np.sin(x)]), CENTRAL)
        svg = finish()
    assert "fill: var(--central)" in svg
    assert 200 < svg.count(" L ") < 1000


def test_a_band_of_one_round_is_drawn():
    with figure("single", (5, 3)) as (drawing, finish):
        draw_band(drawing.subplots(), np.array([3.0]), np.array([[0.2], [0.8]]), CENTRAL)
        assert "stroke: var(--central)" in finish()


def test_a_heat_map_leaves_the_unknown_without_colour():
    with figure("heat", (5, 3)) as (drawing, _):
        axes = drawing.subplots()
        draw_heat(axes, np.array([[0.0, 1.0, np.nan, 0.5]]), "title")
        assert np.asarray(axes.images[0].get_array())[0, :, 3].tolist() == [0, 255, 0, 128]


@pytest.mark.parametrize(("most", "label", "value"), [(500.0, "bytes", 500.0), (2e6, "MB", 2.0), (3e12, "TB", 3.0)])
def test_values_take_the_largest_unit_that_fits(most, label, value):
    units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    got, values = scaled(np.array([0.0, most]), units, "{}")
    assert (got, values.tolist()) == (label, [0.0, value])
