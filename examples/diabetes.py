"""A loader of your own: a number to predict, from a data set that comes with scikit-learn.

`fedtrain` calls `load(**options)` with the options of [data] in regression.toml.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes

from fedtrain.data.base import Dataset, DataSpec


def load() -> Dataset:
    """442 patients with ten measurements; the target is how far their diabetes has come a year later, 25 to 346."""
    bunch = load_diabetes(scaled=False)
    inputs = torch.tensor(bunch.data, dtype=torch.float32)
    targets = torch.tensor(bunch.target, dtype=torch.float32)
    return Dataset("diabetes", DataSpec((10,), "number", feature_names=tuple(bunch.feature_names)), inputs, targets)
