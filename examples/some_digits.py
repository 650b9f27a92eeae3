"""A loader of your own for anomalies: clients train on what is normal, the test set has both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedtrain.data.base import Dataset
from fedtrain.data.sources import load_dataset
from fedtrain.experiment.sections import DataSection
from fedtrain.seeds import generator


def load(normal: Sequence[int] = (0, 1, 2, 3, 4), test: int = 360) -> Dataset:
    """Images of some digits, which are normal; the test set has `test` more of them, and all images of the others."""
    data = load_dataset(DataSection(name="digits", clients=1), None, Path(), 0)
    is_normal = torch.isin(data.targets, torch.tensor(normal))
    known, anomalous = data.inputs[is_normal], data.inputs[~is_normal]
    known = known[torch.from_numpy(generator(0, "some-digits").permutation(len(known)))]
    return replace(
        data,
        spec=replace(data.spec, num_classes=2, class_names=("normal", "anomalous")),
        inputs=known[test:],
        targets=torch.zeros(len(known) - test, dtype=torch.int64),
        test_inputs=torch.cat([known[:test], anomalous]),
        test_targets=(torch.arange(test + len(anomalous)) >= test).long(),
    )
