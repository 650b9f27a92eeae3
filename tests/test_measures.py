from __future__ import annotations

import math

import numpy as np
import pytest

from fedtrain.measures import gini, jensen_shannon, rank_correlation


@pytest.mark.parametrize(
    ("values", "expected"),
    [([5, 5, 5], 0), ([0, 0, 0, 4], 3 / 4), ([3, 1], 1 / 4), ([0, 1, 2, 3], 5 / 12), ([0, 0], 0), ([7], 0)],
)
def test_gini_is_half_the_mean_difference_over_the_mean(values, expected):
    assert gini(values) == pytest.approx(expected)


def test_jensen_shannon_of_each_client_from_all_together():
    distances = jensen_shannon(np.array([[4.0, 0.0], [0.0, 4.0], [4.0, 4.0], [0.0, 0.0]]))
    # the pool is (1/2, 1/2); the middle of it and (1, 0) has entropy h(3/4)
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert distances[:3] == pytest.approx([entropy - 0.5, entropy - 0.5, 0])
    assert math.isnan(distances[3])
    three_of_four, _ = jensen_shannon(np.array([[3.0, 1.0], [1.0, 3.0]]))
    middle = -(5 / 8 * math.log2(5 / 8) + 3 / 8 * math.log2(3 / 8))
    assert three_of_four == pytest.approx(middle - entropy / 2 - 0.5)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 30], [0.1, 5, 6], 1),
        ([1, 2, 3], [9, 5, 1], -1),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),
        ([1, 1, 2], [1, 2, 3], math.sqrt(3) / 2),  # ranks 1.5, 1.5, 3
    ],
)
def test_rank_correlation(first, second, expected):
    assert rank_correlation(first, second) == pytest.approx(expected)


def test_equal_values_have_no_order():
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
