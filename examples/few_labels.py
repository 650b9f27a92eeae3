"""A loader of your own around a built-in source: it hides the labels of most training examples."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from fedtrain.data.base import Dataset
from fedtrain.data.sources import load_dataset
from fedtrain.experiment.sections import DataSection
from fedtrain.seeds import generator


def load(source: str = "digits", labelled: float = 0.05, unlabelled: str = "keep", test: int = 400) -> Dataset:
    """Images of which a share has a label; the others belong to the class "unlabelled".

    Args:
        source: a built-in source; those with files are read from the folder FEDTRAIN_DATA.
        labelled: share of the training examples that keep their label.
        unlabelled: "keep" the others; "drop" them, and their class; or "empty" that class alone, so that a model of the
            labelled examples is a start for one of all.
        test: examples set apart, with their labels, where the source has no test set of its own.
    """
    if unlabelled not in ("keep", "drop", "empty"):
        raise ValueError(f"unlabelled is keep, drop or empty, and not {unlabelled}")
    root = os.environ.get("FEDTRAIN_DATA")
    data = load_dataset(DataSection(name=source, clients=1), Path(root) if root else None, Path(), 0)
    rng = generator(0, "few-labels")
    if data.test_targets is None:
        order = torch.from_numpy(rng.permutation(len(data.targets)))
        first, rest = order[:test], order[test:]
        data = replace(
            data,
            inputs=data.inputs[rest],
            targets=data.targets[rest],
            test_inputs=data.inputs[first],
            test_targets=data.targets[first],
        )
    known = torch.from_numpy(rng.permutation(len(data.targets)))[: round(labelled * len(data.targets))]
    if unlabelled == "drop":
        return replace(data, inputs=data.inputs[known], targets=data.targets[known])
    names = (*data.spec.class_names, "unlabelled")
    data = replace(data, spec=replace(data.spec, num_classes=len(names), class_names=names))
    if unlabelled == "empty":
        return replace(data, inputs=data.inputs[known], targets=data.targets[known])
    targets = torch.full_like(data.targets, len(names) - 1)
    targets[known] = data.targets[known]
    return replace(data, targets=targets)
