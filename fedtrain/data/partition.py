"""Partitions: which client holds which rows, as index arrays alone.

Every kind gives each row one owner; nothing is copied and no row is used twice. A client that ends up with fewer than
`min_examples` rows is repaired: the largest clients are cut down to a common level and give up rows evenly spaced over
what they hold, so that their own label mix stays as it was. The repair draws nothing at random, and comes last: a
repaired client may hold labels that its kind of partition would not have given it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtrain.data.names import GivenNames, NumberedNames
from fedtrain.errors import DataError
from fedtrain.experiment.partitions import (
    DirichletPartition,
    FcubePartition,
    FeatureNoisePartition,
    IidPartition,
    LabelQuantityPartition,
    LabelsPartition,
    NaturalPartition,
    PartitionSection,
    QuantityPartition,
    ShardsPartition,
    SizesPartition,
)

__all__ = ["Partition", "RowFacts", "make_partition"]


@dataclass(frozen=True, eq=False)
class RowFacts:
    """What a partition may look at.

    Attributes:
        num_rows: N, the rows to spread.
        labels: `(N,)` class of each row; None if targets are not classes.
        num_classes: classes; 0 if targets are not classes.
        features: `(N, d)`; needed by "fcube" alone.
        client_names: natural clients; empty if there are none.
        client_index: `(N,)` into `client_names`; None if there are none.
    """

    num_rows: int
    labels: NDArray[np.int64] | None
    num_classes: int
    features: NDArray[np.float32] | None
    client_names: Sequence[str]
    client_index: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Partition:
    """Whose rows are whose.

    Attributes:
        indices: `(rows,)` all clients' rows, one client after another, ascending within each.
        offsets: `(clients + 1,)` where each client's rows start; the last entry is the number of rows used.
        names: `(clients,)`; `names.index(name)` is the client's position.
        noise_variance: `(clients,)` variance of the Gaussian noise to add to scaled features; None for none.
        left_out: natural clients with fewer than `min_examples` rows -> their rows.
    """

    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]
    names: Sequence[str]
    noise_variance: NDArray[np.float32] | None
    left_out: Mapping[str, int] = field(default_factory=dict)

    def rows(self, position: int) -> NDArray[np.int64]:
        """`(examples,)` rows of the client at a position, as a view."""
        return self.indices[self.offsets[position] : self.offsets[position + 1]]

    def sizes(self) -> NDArray[np.int64]:
        """`(clients,)` examples of each client."""
        return np.diff(self.offsets)


def make_partition(
    section: PartitionSection, clients: int | None, rows: RowFacts, rng: np.random.Generator
) -> Partition:
    """Spread rows over clients.

    Args:
        section: the kind of partition and its parameters.
        clients: number of clients; None for "natural", which brings its own.
        rows: what is known of the rows.
        rng: the stream to draw from; "natural" and "fcube" draw nothing.

    Returns:
        A partition that uses every row once, save two stated exceptions: rows of natural clients below
        `min_examples`, and rows whose label no client was given (only where clients x labels_per_client < classes).

    Raises:
        DataError: the rows lack what the kind needs, or are too few for it.
    """
    if isinstance(section, NaturalPartition):
        return _natural(section, rows)
    assert clients is not None, "the experiment's check asks for clients with every other kind"
    owner = _repair(_owners(section, clients, rows, rng), clients, section.min_examples)
    noise_variance = None
    if isinstance(section, FeatureNoisePartition):
        noise_variance = (section.sigma * np.arange(1, clients + 1) / clients).astype(np.float32)
    return Partition(*_grouped(owner, clients), NumberedNames(clients), noise_variance)


def _owners(section: PartitionSection, clients: int, rows: RowFacts, rng: np.random.Generator) -> NDArray[np.int64]:
    """`(N,)` client of each row, -1 where it has none."""
    match section:
        case IidPartition() | FeatureNoisePartition():
            return _by_size(_equal(rows.num_rows, clients), rng)
        case QuantityPartition():
            return _quantity(section, clients, rows, rng)
        case SizesPartition():
            return _sizes(section, clients, rows, rng)
        case DirichletPartition():
            return _dirichlet(section, clients, rows, rng)
        case ShardsPartition():
            return _shards(section, clients, rows, rng)
        case LabelsPartition():
            return _labels(section, clients, rows, rng)
        case LabelQuantityPartition():
            return _label_quantity(section, clients, rows, rng)
        case FcubePartition():
            return _fcube(clients, rows)
        case _:
            raise AssertionError(f"no owners for {section.kind}")


def _natural(section: NaturalPartition, rows: RowFacts) -> Partition:
    """Keep the data's own clients, without those below `min_examples`."""
    if rows.client_index is None:
        raise DataError(
            'the partition "natural" needs data that names its clients, and these rows have no names',
            hint='Set data.client_column to the column that names them, or choose another partition, such as "iid"',
        )
    sizes = np.bincount(rows.client_index, minlength=len(rows.client_names))
    kept = sizes >= section.min_examples
    if not kept.any():
        raise DataError(
            "no natural client is left",
            got=f"{len(sizes)} clients, the largest with {sizes.max(initial=0)} examples",
            expected=f"one or more with at least min_examples = {section.min_examples}",
        )
    new_position = np.where(kept, np.cumsum(kept) - 1, -1)
    names = GivenNames(name for name, keep in zip(rows.client_names, kept) if keep)
    left_out = {rows.client_names[small]: int(sizes[small]) for small in np.flatnonzero(~kept).tolist()}
    return Partition(*_grouped(new_position[rows.client_index], len(names)), names, None, left_out)


def _quantity(section: QuantityPartition, clients: int, rows: RowFacts, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the sizes from a Dirichlet distribution.

    References:
        Li, Diao, Chen, He: Federated Learning on Non-IID Data Silos. ICDE 2022, section IV-C.
    """
    shares = rng.dirichlet(np.full(clients, section.alpha))
    return _by_size(_cut(shares, rows.num_rows), rng)


def _sizes(section: SizesPartition, clients: int, rows: RowFacts, rng: np.random.Generator) -> NDArray[np.int64]:
    """Let the size of client i (from 1) grow with i, i squared or exp(i).

    References:
        Beutel et al.: Flower: A Friendly Federated Learning Research Framework. arXiv 2007.14390, 2020; the linear,
        square and exponential partitioners of its data sets.
    """
    i = np.arange(1.0, clients + 1)
    # Relative to the last client: exp(i) itself overflows from i = 710.
    profiles = {"linear": i, "square": i**2, "exponential": np.exp(i - clients)}
    return _by_size(_cut(profiles[section.profile], rows.num_rows), rng)


def _dirichlet(
    section: DirichletPartition, clients: int, rows: RowFacts, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw, for each class, its shares over the clients from Dir(alpha): sizes come out uneven too.

    This is the per-class draw of Yurochkin et al. and NIID-Bench, without the step in their code that stops filling a
    client at the mean size: that makes the mix more uneven than alpha says. Hsu et al. draw per client over classes,
    with equal sizes.

    References:
        Yurochkin et al.: Bayesian Nonparametric Federated Learning of Neural Networks. ICML 2019, section 4.
        Li, Diao, Chen, He: Federated Learning on Non-IID Data Silos. ICDE 2022, section IV-A.
        Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution. arXiv 1909.06335, 2019.
    """
    owner = np.full(rows.num_rows, -1, dtype=np.int64)
    concentration = np.full(clients, section.alpha)
    for members in _shuffled_groups(_classes(rows, section.kind), rows.num_classes, rng):
        owner[members] = _spread(rng.dirichlet(concentration), len(members), rng)
    return owner


def _shards(section: ShardsPartition, clients: int, rows: RowFacts, rng: np.random.Generator) -> NDArray[np.int64]:
    """Sort the rows by label, cut them into equal shards and deal each client as many.

    References:
        McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data. AISTATS 2017,
        section 3.
    """
    shards = clients * section.shards_per_client
    groups = _shuffled_groups(_classes(rows, section.kind), rows.num_classes, rng)
    if shards > rows.num_rows:
        raise DataError(
            "there are more shards than examples",
            got=f"{clients} clients x {section.shards_per_client} shards = {shards}",
            expected=f"at most {rows.num_rows}",
            hint="Lower data.clients or shards_per_client",
        )
    holder = rng.permutation(shards) % clients
    owner = np.empty(rows.num_rows, dtype=np.int64)
    owner[np.concatenate(groups)] = np.repeat(holder, _equal(rows.num_rows, shards))
    return owner


def _labels(section: LabelsPartition, clients: int, rows: RowFacts, rng: np.random.Generator) -> NDArray[np.int64]:
    """Give client i label i mod classes and k - 1 others at random; split each label evenly over its holders (#C=k).

    With fewer clients than classes, label c goes first to client c mod clients: none is left out while k allows it.

    References:
        Li, Diao, Chen, He: Federated Learning on Non-IID Data Silos. ICDE 2022, section IV-A.
    """
    k, classes = section.labels_per_client, rows.num_classes
    groups = _shuffled_groups(_classes(rows, section.kind), classes, rng)
    if k > classes:
        raise DataError("labels_per_client asks for more labels than there are", got=k, expected=f"at most {classes}")
    rank = rng.random((clients, classes), dtype=np.float32)
    rank[np.arange(clients), np.arange(clients) % classes] -= 1
    rank[np.arange(classes) % clients, np.arange(classes)] -= 1
    held = np.argpartition(rank, k - 1, axis=1)[:, :k]
    owner = np.full(rows.num_rows, -1, dtype=np.int64)
    for members, slots in zip(groups, _shuffled_groups(held.ravel(), classes, rng)):
        if len(slots):
            owner[members] = np.repeat(slots // k, _equal(len(members), len(slots)))
    return owner


def _label_quantity(
    section: LabelQuantityPartition, clients: int, rows: RowFacts, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw each client's size and its label mix, both Dirichlet, and fit the two to the labels that there are.

    The table size x mix is scaled in turn to the drawn sizes and to the label totals; the last scaling is to the
    totals, so every row is used and the sizes hold approximately.

    References:
        Li, Diao, Chen, He: Federated Learning on Non-IID Data Silos. ICDE 2022, sections IV-A and IV-C.
        Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution. arXiv 1909.06335, 2019.
        Sinkhorn, Knopp: Concerning Nonnegative Matrices and Doubly Stochastic Matrices. Pacific J. Math. 21, 1967.
    """
    groups = [g for g in _shuffled_groups(_classes(rows, section.kind), rows.num_classes, rng) if len(g)]
    totals = np.array([len(members) for members in groups]) / rows.num_rows
    # A small alpha draws exact zeros, by which the scaling would divide.
    floor = 1e-12
    sizes = rng.dirichlet(np.full(clients, section.size_alpha))[:, None] + floor
    table = sizes * (rng.dirichlet(np.full(len(groups), section.label_alpha), size=clients) + floor)
    for _ in range(20):
        table *= sizes / table.sum(axis=1, keepdims=True)
        table *= totals / table.sum(axis=0)
    owner = np.empty(rows.num_rows, dtype=np.int64)
    for members, shares in zip(groups, table.T):
        owner[members] = _spread(shares, len(members), rng)
    return owner


def _fcube(clients: int, rows: RowFacts) -> NDArray[np.int64]:
    """Give each of four clients an octant of the cube and its mirror at the origin.

    References:
        Li, Diao, Chen, He: Federated Learning on Non-IID Data Silos. ICDE 2022, section IV-B.
    """
    if rows.features is None or rows.features.shape[1:] != (3,) or clients != 4:
        raise DataError(
            'the partition "fcube" does not fit the data',
            got=f"{clients} clients, features of shape {None if rows.features is None else rows.features.shape[1:]}",
            expected="4 clients, features of shape (3,)",
            hint='Use it with data.name = "fcube"',
        )
    octant: NDArray[np.int64] = (rows.features > 0) @ np.array([4, 2, 1])
    return np.minimum(octant, 7 - octant)


def _classes(rows: RowFacts, kind: str) -> NDArray[np.int64]:
    """`(N,)` class of each row; an error if targets are not classes."""
    if rows.labels is None:
        raise DataError(
            f'the partition "{kind}" needs targets that are classes, and these are not',
            hint='Choose "iid", "quantity", "sizes", "feature-noise" or "natural", or set data.target_type = "class"',
        )
    return rows.labels


def _shuffled_groups(labels: NDArray[np.int64], num_classes: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Positions of each label, in random order."""
    order = rng.permutation(len(labels))
    by_label = order[np.argsort(labels[order], kind="stable")]
    return np.split(by_label, np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def _by_size(sizes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Deal shuffled rows out in the given sizes."""
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


def _spread(shares: NDArray[np.float64], total: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`(total,)` client of each of `total` rows, in the given shares.

    The clients stand in random order, or with few rows per client the same ones would be rounded up in every class.
    """
    order = rng.permutation(len(shares))
    return np.repeat(order, _cut(shares[order], total))


def _cut(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole sizes in the given shares that add up to `total`."""
    ends = np.cumsum(shares)
    sizes: NDArray[np.int64] = np.diff(np.rint(ends / ends[-1] * total).astype(np.int64), prepend=0)
    return sizes


def _equal(total: int, parts: int) -> NDArray[np.int64]:
    """Whole sizes that add up to `total` and differ by at most one."""
    sizes: NDArray[np.int64] = np.diff(np.arange(parts + 1) * total // parts)
    return sizes


def _grouped(owner: NDArray[np.int64], clients: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices and offsets of a Partition."""
    unused = int(np.count_nonzero(owner < 0))
    ends = np.cumsum(np.bincount(owner + 1, minlength=clients + 1)) - unused
    return np.argsort(owner, kind="stable")[unused:], ends


def _repair(owner: NDArray[np.int64], clients: int, min_examples: int) -> NDArray[np.int64]:
    """Bring every client to `min_examples` with rows of the largest; see the module's docstring."""
    indices, offsets = _grouped(owner, clients)
    sizes = np.diff(offsets)
    if clients * min_examples > len(indices):
        raise DataError(
            "there are too few examples for so many clients",
            got=f"{len(indices)} examples",
            expected=f"at least {clients} clients x min_examples {min_examples} = {clients * min_examples}",
            hint="Lower data.clients or data.partition.min_examples",
        )
    missing = np.maximum(min_examples - sizes, 0)
    if not missing.any():
        return owner
    given = _levelled(sizes, int(missing.sum()), min_examples)
    holder = owner[indices]
    rank = np.arange(len(indices)) - offsets[holder]
    # Of a client's s rows, g are given: those at which the whole part of rank * g / s steps up.
    give, size = given[holder], sizes[holder]
    moved = indices[(rank + 1) * give // size > rank * give // size]
    repaired = owner.copy()
    repaired[moved] = np.repeat(np.arange(clients), missing)
    return repaired


def _levelled(sizes: NDArray[np.int64], total: int, least: int) -> NDArray[np.int64]:
    """`(clients,)` rows to give so that the largest clients come down to one level, and `total` rows in all."""
    levels = range(least, int(sizes.max()) + 1)
    level = levels[bisect_left(levels, True, key=lambda at: np.maximum(sizes - at, 0).sum() < total) - 1]
    given: NDArray[np.int64] = np.maximum(sizes - level, 0)
    # At this level a few rows more than needed come free; the first of the donors keep one each.
    given[np.flatnonzero(given)[: given.sum() - total]] -= 1
    return given
