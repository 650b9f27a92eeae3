from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtrain.data.prepare import (
    fill_missing,
    fit_moments,
    given_moments,
    held_out_counts,
    prepare,
    stratified_sample,
)
from fedtrain.errors import DataError
from fedtrain.experiment.sections import GivenScaling

NAN = float("nan")


def test_moments_are_fitted_to_the_values_that_are_there() -> None:
    rows = torch.tensor([[1.0, 5.0, NAN, NAN], [3.0, 5.0, 4.0, NAN], [5.0, 5.0, NAN, NAN]])
    moments = fit_moments(rows)
    torch.testing.assert_close(moments.mean, torch.tensor([3.0, 5.0, 4.0, 0.0]))
    torch.testing.assert_close(moments.std, torch.tensor([(8 / 3) ** 0.5, 1.0, 1.0, 1.0]))


def test_a_small_deviation_beside_a_large_mean_is_kept_and_a_constant_is_exact() -> None:
    moments = fit_moments(torch.tensor([[1e6, 0.1], [1e6 + 1, 0.1], [1e6 + 2, 0.1]]))
    torch.testing.assert_close(moments.std, torch.tensor([(2 / 3) ** 0.5, 1.0]))


@pytest.mark.parametrize(("missing", "filled"), [("mean", [4.0, 7.0]), ("median", [2.5, 7.0]), ("zero", [0.0, 0.0])])
def test_missing_values_are_filled_from_the_fitted_rows(missing: str, filled: list[float]) -> None:
    fitted_on = torch.tensor([[1.0, NAN], [2.0, NAN], [3.0, NAN], [10.0, NAN]])
    inputs = torch.tensor([[NAN, NAN], [5.0, 6.0]])
    result = fill_missing(inputs, fitted_on, missing, otherwise=torch.tensor([9.0, 7.0]))  # type: ignore[arg-type]
    assert result.tolist() == [filled, [5.0, 6.0]]
    assert inputs.isnan().sum() == 2


@pytest.mark.parametrize("missing", ["mean", "median"])
def test_nothing_to_fit_on_falls_back(missing: str) -> None:
    result = fill_missing(torch.tensor([[NAN]]), torch.empty(0, 1), missing, otherwise=3.0)  # type: ignore[arg-type]
    assert result.tolist() == [[3.0]]


def test_pixels_and_tokens() -> None:
    moments = given_moments(GivenScaling(mean=[0.5], std=[0.25]), (1, 1, 2))
    pixels = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    assert prepare(pixels, moments).tolist() == [[[[-2.0, 2.0]]]]
    tokens = torch.tensor([[1, 2]])
    assert prepare(tokens, None) is tokens


def test_given_scaling_is_per_feature_or_per_channel() -> None:
    moments = given_moments(GivenScaling(mean=[1.0, 2.0], std=[2.0]), (2,))
    rows = torch.tensor([[3.0, 6.0]])
    assert prepare(rows, moments).tolist() == [[1.0, 2.0]]
    assert rows.tolist() == [[3.0, 6.0]], "they are the data set's own"
    assert given_moments(GivenScaling(mean=[1, 2, 3], std=[1, 1, 1]), (3, 8, 8)).mean.shape == (3, 1, 1)
    with pytest.raises(DataError, match=r"2 numbers; expected 1, or 3: one per feature"):
        given_moments(GivenScaling(mean=[1, 2], std=[1]), (3,))


def test_held_out_counts_round_to_the_nearest_and_leave_one() -> None:
    sizes = np.array([1, 2, 5, 46, 303])
    assert held_out_counts(sizes, 0.34, keep=1).tolist() == [0, 1, 2, 16, 103]
    assert held_out_counts(sizes, 0.99, keep=1).tolist() == [0, 1, 4, 45, 300]


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    fractions=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    seed=st.integers(0, 99),
)
def test_samples_are_disjoint_and_each_class_has_its_share(
    labels: list[int], fractions: tuple[float, float], seed: int
) -> None:
    classes, size = np.array(labels), len(labels)
    counts = [int(size * fraction) for fraction in fractions]
    *samples, rest = stratified_sample(classes, size, counts, np.random.default_rng(seed))
    assert [len(sample) for sample in samples] == counts
    assert sorted(np.concatenate([*samples, rest])) == list(range(size))
    share = np.bincount(classes, minlength=5) * counts[0] / size
    assert np.all(np.abs(np.bincount(classes[samples[0]], minlength=5) - share) < 1)


def test_samples_depend_on_the_stream() -> None:
    first, second = (stratified_sample(None, 100, [10], np.random.default_rng(seed))[0].tolist() for seed in (0, 1))
    assert first != second
