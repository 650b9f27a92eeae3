from __future__ import annotations

import csv
import io
import math
from urllib.parse import unquote

import pytest

from fedtrain.report.tables import data_uri, thinned


def test_a_table_comes_back_from_its_link():
    rows = [("client", "x"), ('a,"b\n<c>', 1), ("é#%&", None), ("z", 0.1), ("n", math.nan)]
    kind, _, text = data_uri(rows).partition(",")
    assert kind == "data:text/csv;charset=utf-8"
    assert not set(text) & set('"<># &\n')
    back = list(csv.reader(io.StringIO(unquote(text))))
    assert back == [["client", "x"], ['a,"b\n<c>', "1"], ["é#%&", ""], ["z", "0.1"], ["n", "nan"]]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_a_name_is_never_a_formula(name):
    assert unquote(data_uri([[name]]).partition(",")[2]).lstrip('"').startswith("'")


def test_a_name_that_is_no_text_is_kept_as_far_as_it_goes():
    assert "a" in data_uri([["a\ud800"]])


def test_rows_are_thinned_evenly_with_both_ends():
    assert thinned([1, 2, 3], 3) == [1, 2, 3]
    assert thinned(range(101), 5) == [0, 25, 50, 75, 100]
    assert len(thinned(range(10**6))) == 2000
