"""How unlike each other the clients are: label counts, distances from the pooled distribution, uneven sizes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtrain.data.base import DataSpec
from fedtrain.data.partition import Partition
from fedtrain.measures import gini, jensen_shannon
from fedtrain.records import DataSummary, Heterogeneity

__all__ = ["label_counts", "measure", "summarize"]

_MOST_SHOWN = 200
_MOST_BINS = 10


def label_counts(partition: Partition, labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Count each client's examples of each label.

    Args:
        partition: whose rows are whose.
        labels: `(N,)` label of each row, 0 to `num_classes - 1`.
        num_classes: labels to count.

    Returns:
        `(clients, num_classes)` examples.
    """
    clients = len(partition.names)
    owner = np.repeat(np.arange(clients), partition.sizes())
    cells = owner * num_classes + labels[partition.indices]
    return np.bincount(cells, minlength=clients * num_classes).reshape(clients, num_classes)


def measure(counts: NDArray[np.int64], sizes: NDArray[np.int64]) -> Heterogeneity:
    """Measure label and quantity skew.

    Args:
        counts: `(clients, labels)` examples.
        sizes: `(clients,)` examples; a client's weight in each mean is its share of all of them.

    Returns:
        The measures, as `fedtrain.records.Heterogeneity` defines them.
    """
    weight = sizes / sizes.sum()
    pooled = counts.sum(axis=0) / counts.sum()
    own = counts / np.maximum(sizes, 1)[:, None]
    hellinger = np.sqrt(((np.sqrt(own) - np.sqrt(pooled)) ** 2).sum(axis=1) / 2)
    return Heterogeneity(
        l1=float(weight @ np.abs(own - pooled).sum(axis=1)),
        hellinger=float(weight @ hellinger),
        jensen_shannon=float(weight @ np.nan_to_num(jensen_shannon(counts))),
        labels_per_client=float((counts > 0).sum(axis=1).mean()),
        size_gini=gini(sizes),
    )


def summarize(
    source: str,
    spec: DataSpec,
    partition: Partition,
    targets: Tensor | NDArray[np.int64] | NDArray[np.float32],
    num_central_test: int,
) -> DataSummary:
    """Say how the data lies on the clients.

    Args:
        source: the data's name.
        spec: what the targets are.
        partition: whose rows are whose.
        targets: `(N,)` classes or numbers, or `(N, T)` tokens, of all the rows that were partitioned. Numbers are
            counted in up to ten quantile bins; tokens are not counted.
        num_central_test: examples of the central test set.

    Returns:
        The summary, with at most 200 clients in its label map, evenly spaced by position.
    """
    sizes = partition.sizes()
    values = np.asarray(targets)
    label_names: list[str] = []
    counts = np.empty((len(sizes), 0), dtype=np.int64)
    if spec.target == "class":
        label_names = list(spec.class_names) or [str(label) for label in range(spec.num_classes)]
        counts = label_counts(partition, values, spec.num_classes)
    elif spec.target == "number":
        labels, label_names = _bins(values)
        counts = label_counts(partition, labels, len(label_names))
    shown = np.linspace(0, len(sizes) - 1, min(len(sizes), _MOST_SHOWN)).round().astype(np.int64)
    return DataSummary(
        source=source,
        target=spec.target,
        num_clients=len(sizes),
        num_examples=int(sizes.sum()),
        num_central_test=num_central_test,
        smallest_client=int(sizes.min()),
        median_client=float(np.median(sizes)),
        largest_client=int(sizes.max()),
        label_names=label_names,
        shown_clients=[partition.names[position] for position in shown.tolist()],
        label_counts=counts[shown].tolist(),
        shown_sizes=sizes[shown].tolist(),
        heterogeneity=measure(counts, sizes) if label_names else None,
        left_out=dict(partition.left_out),
    )


def _bins(values: NDArray[np.float32]) -> tuple[NDArray[np.int64], list[str]]:
    """Cut numbers at their deciles: `(N,)` bin of each, and the bins' names; equal deciles make one bin."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    deciles = np.quantile(values, np.linspace(0, 1, _MOST_BINS + 1)[1:-1], method="higher")
    inner = np.unique(deciles[deciles > low])
    edges = [low, *inner, high]
    # As few digits as tell all edges apart.
    for digits in range(3, 18):
        texts = [f"{edge:.{digits}g}" for edge in edges]
        if len(set(texts)) == len(set(edges)):
            break
    names = [start if start == end else f"{start} to {end}" for start, end in pairwise(texts)]
    return np.searchsorted(inner, values, side="right"), names
