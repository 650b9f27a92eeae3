"""The quality report: each figure on rows whose faults are known."""

import math
import warnings

import numpy as np
import pytest
import torch

from fedtrain.data.base import Dataset, DataSpec
from fedtrain.data.partition import Partition
from fedtrain.data.quality import label_noise, outliers, quality
from fedtrain.data.sources import load_dataset
from fedtrain.experiment.sections import DataSection
from fedtrain.seeds import generator

NAN = math.nan


def partition(*sizes: int) -> Partition:
    offsets = np.cumsum([0, *sizes])
    return Partition(np.arange(offsets[-1]), offsets, [f"site-{n}" for n in range(len(sizes))], None)


def table(inputs, targets, *sizes, names=("age", "dose", "flag")):
    spec = DataSpec((len(names),), "class", 3, tuple(names), ("a", "b", "c"))
    dataset = Dataset("table", spec, torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets))
    return quality(dataset, partition(*sizes), 0)


def test_figures_of_a_small_table():
    rows = [
        [1.0, 5.0, 0.0],
        [2.0, NAN, 0.0],
        [2.0, NAN, 0.0],  # a duplicate: what is missing is equal too
        [3.0, 5.0, -0.0],
        # the second client
        [3.0, 5.0, 0.0],  # the first one has it
        [4.0, 5.0, 7.0],
        [4.0, 5.0, 7.0],  # its target differs: no duplicate
    ]
    first, second = table(rows, [0, 1, 1, 2, 2, 0, 1], 4, 3)
    assert (first.client, first.rows, first.duplicates, first.elsewhere) == ("site-0", 4, 1, 1)
    assert first.missing == pytest.approx(2 / 12)
    assert first.missing_of == {"dose": 0.5}
    assert first.constant == ["dose", "flag"]
    assert (first.classes, first.largest_class, first.label_noise) == (3, 0.5, None)
    assert (second.duplicates, second.elsewhere, second.missing, second.missing_of) == (0, 1, 0.0, {})
    assert second.constant == ["dose"]
    assert second.largest_class == pytest.approx(1 / 3)


def test_a_missing_text_is_counted_once_for_its_column():
    (only,) = table([[NAN, NAN, 1.0], [1.0, 0.0, 2.0]], [0, 1], 2, names=("job=clerk", "job=cook", "age"))
    assert only.missing_of == {"job": 0.5}


def test_outliers_are_five_robust_deviations_from_the_median():
    # The median is 5, the distances' median 3: the limit lies 5 * 1.4826 * 3 = 22.239 from 5.
    values = np.array([*range(9), 27.2, 27.3, NAN], dtype=np.float32)
    empty, flag = np.full(12, NAN, dtype=np.float32), np.array([0] * 11 + [99], dtype=np.float32)
    marked = outliers(np.stack([values, 10 - values, empty, flag], 1))
    assert np.argwhere(marked).tolist() == [[10, 0], [10, 1]]  # of the flag more than half are equal


def flipped(targets: torch.Tensor, classes: int, rate: float, rng: np.random.Generator) -> torch.Tensor:
    wrong = torch.from_numpy(rng.random(len(targets)) < rate)
    shift = torch.from_numpy(rng.integers(1, classes, len(targets)))
    return torch.where(wrong, (targets + shift) % classes, targets)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("source", ["digits", "breast-cancer"])
def test_flipped_labels_are_estimated_within_three_points(source, rate, tmp_path):
    dataset = load_dataset(DataSection(name=source, clients=1), None, tmp_path, 0)
    dataset = Dataset(
        source, dataset.spec, dataset.inputs, flipped(dataset.targets, dataset.spec.num_classes, rate, generator(1))
    )
    (found,) = quality(dataset, partition(len(dataset.targets)), 0)
    assert found.label_noise == pytest.approx(rate, abs=0.03)


def test_label_noise_where_every_fold_knows():
    # Two points: neighbours are all of one's own class but for the wrong ones, 12 of 120.
    inputs = torch.tensor([[0.0], [1.0]]).repeat(60, 1)
    targets = torch.tensor([0, 1]).repeat(60)
    targets[:12] = 1 - targets[:12]
    assert label_noise(inputs, targets, generator(0)) == pytest.approx(0.1, abs=0.02)
    assert label_noise(inputs, torch.tensor([0, 1]).repeat(60), generator(0)) == 0


@pytest.mark.parametrize("targets", [[0, 1] * 24, [0] * 200, [0] * 195 + [1] * 5])
def test_too_little_for_an_estimate_is_none(targets):
    assert label_noise(torch.randn(len(targets), 2), torch.tensor(targets), generator(0)) is None


def test_the_estimate_is_of_the_seed_alone():
    spec = DataSpec((2,), "class", 2)
    rng = torch.Generator().manual_seed(0)
    dataset = Dataset("t", spec, torch.randn(3000, 2, generator=rng), torch.randint(2, (3000,), generator=rng))
    first, again, other = (quality(dataset, partition(3000), seed)[0].label_noise for seed in (0, 0, 1))
    assert first == again != other


def test_pixels_tokens_and_numbers_have_what_makes_sense():
    pixels = torch.zeros(60, 1, 4, 4, dtype=torch.uint8)
    pixels[30:] = 255
    labels = torch.tensor([0, 1]).repeat_interleave(30)
    (image,) = quality(Dataset("p", DataSpec((1, 4, 4), "class", 2), pixels, labels), partition(60), 0)
    assert (image.duplicates, image.label_noise, image.largest_class) == (58, 0.0, 0.5)
    assert image.missing is image.outliers is image.constant is None
    tokens = torch.tensor([[1, 2], [1, 2], [2, 3]])
    (text,) = quality(Dataset("t", DataSpec((2,), "tokens", 5), tokens, tokens), partition(3), 0)
    assert text.duplicates == 1
    assert text.missing is text.classes is text.label_noise is None
    (number,) = quality(
        Dataset("n", DataSpec((1,), "number"), torch.ones(3, 1), torch.tensor([0.5, 0.5, 1.5])), partition(3), 0
    )
    assert (number.duplicates, number.constant, number.classes) == (1, ["value 1"], None)


def test_an_empty_client_and_an_empty_column_are_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty, other = table([[1.0, NAN, 2.0], [2.0, NAN, 2.0]], [0, 1], 0, 2)
    assert (empty.rows, empty.missing, empty.label_noise) == (0, None, None)
    assert other.constant == ["dose", "flag"]
