"""Data on many clients: one data set, index arrays that say whose rows are whose, and the rest made when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtrain.data.base import ClientData, Dataset, Examples
from fedtrain.data.heterogeneity import summarize
from fedtrain.data.partition import Partition, RowFacts, make_partition
from fedtrain.data.prepare import (
    Moments,
    Preparation,
    fit_moments,
    given_moments,
    held_out_counts,
    prepare,
    stratified_fold,
    stratified_sample,
)
from fedtrain.data.sources import load_dataset
from fedtrain.errors import DataError, nearest
from fedtrain.experiment.sections import DataSection, GivenScaling
from fedtrain.records import DataSummary
from fedtrain.seeds import generator

__all__ = ["PartitionedData", "build"]


def build(section: DataSection, data_root: Path | None, base: Path, seed: int) -> PartitionedData:
    """Load a data section's rows and spread them over clients.

    Args:
        section: the data section of the experiment.
        data_root: folder of the built-in sources' files; None if none was named.
        base: the experiment file's folder.
        seed: the experiment's seed.

    Returns:
        The clients' data.

    Raises:
        DataError: the data is missing or damaged, or does not fit the section.
        MissingExtraError: the package that reads it is not installed.
    """
    dataset = load_dataset(section, data_root, base, seed)
    if section.classes:
        dataset = _with_classes(dataset, tuple(section.classes))
    if section.missing == "drop":
        dataset = _drop_incomplete(dataset)
    if dataset.test_targets is None and section.central_test > 0:
        dataset = _set_apart(dataset, section.central_test, seed)
    num_rows = len(dataset.targets)
    if section.clients is not None and section.clients > num_rows:
        raise DataError(
            "there are more clients than examples",
            got=f"data.clients = {section.clients}",
            expected=f"at most {num_rows}",
            hint="Lower data.clients",
        )
    rows = RowFacts(
        num_rows=num_rows,
        labels=dataset.labels(),
        num_classes=dataset.spec.num_classes,
        features=dataset.inputs.numpy() if section.partition.kind == "fcube" else None,
        client_names=dataset.client_names,
        client_index=None if dataset.client_index is None else dataset.client_index.numpy(),
    )
    partition = make_partition(section.partition, section.clients, rows, generator(seed, "partition"))
    return PartitionedData(dataset, partition, section, seed)


class PartitionedData:
    """A data set that is spread over clients; implements `FederatedData`.

    Args:
        dataset: all rows, and the central test set if there is one.
        partition: whose rows are whose.
        section: splits, missing values and scaling.
        seed: the experiment's seed; each client's split and noise depend on it and the client's name alone.
    """

    def __init__(self, dataset: Dataset, partition: Partition, section: DataSection, seed: int) -> None:
        self.dataset, self.partition, self.section, self.seed = dataset, partition, section, seed
        self.spec = dataset.spec
        sizes = partition.sizes()
        self._test = self._test_counts(sizes)
        self._validation = held_out_counts(sizes, section.validation, keep=1 + self._test)
        if partition.noise_variance is not None and dataset.inputs.dtype == torch.int64:
            raise DataError('the partition "feature-noise" needs features or pixels, and these are tokens')
        self.preparation = Preparation(
            spec=dataset.spec,
            dtype=str(dataset.inputs.dtype).removeprefix("torch."),
            missing=section.missing,
            scaled_per_client=section.scaling == "client",
            moments=self._fixed_moments(),
        )

    def client_ids(self) -> Sequence[str]:
        """Stable names, in a stable order."""
        return self.partition.names

    def sizes(self) -> NDArray[np.int64]:
        """`(clients,)` training examples of each client."""
        return self.partition.sizes() - self._test - self._validation

    def client(self, client_id: str) -> ClientData:
        """Gather one client's rows, split, filled and scaled.

        Raises:
            DataError: there is no such client.
        """
        position = self._position(client_id)
        rows = torch.from_numpy(self.partition.rows(position))
        # index_select copies whole rows: three times as fast as indexing.
        inputs, targets = (t.index_select(0, rows) for t in (self.dataset.inputs, self.dataset.targets))
        test, validation, train = self._split(position)
        # A client that never trains is scaled by its own rows all the same, as it would be once it uses the model.
        inputs = self.preparation.apply(inputs, fitted_on=inputs if len(train) in (0, len(rows)) else inputs[train])
        if self.partition.noise_variance is not None:
            rng = generator(self.seed, "feature-noise", client_id)
            noise = torch.from_numpy(rng.standard_normal(inputs.shape, dtype=np.float32))
            inputs = inputs + noise * float(np.sqrt(self.partition.noise_variance[position]))
        whole = Examples(inputs, targets)
        if len(train) == len(rows):
            nothing = _take(whole, test)
            return ClientData(whole, nothing, nothing)
        return ClientData(_take(whole, train), _take(whole, validation), _take(whole, test))

    def central_test(self) -> Examples:
        """The source's own test set, else the rows set apart, else all clients' test examples in client order."""
        if self.dataset.test_inputs is not None and self.dataset.test_targets is not None:
            return Examples(self.preprocess(self.dataset.test_inputs), self.dataset.test_targets)
        parts = [self.client(self.partition.names[position]).test for position in np.flatnonzero(self._test).tolist()]
        if not parts:
            nothing = torch.empty(0, dtype=torch.int64)
            return _take(Examples(prepare(self.dataset.inputs[nothing], None), self.dataset.targets), nothing)
        return Examples(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))

    def preprocess(self, inputs: Tensor) -> Tensor:
        """Apply to other rows what training applied; what each client fits on its own is fitted on these rows.

        Args:
            inputs: `(N, *input_shape)`, raw: as in the `Dataset`.

        Returns:
            What the model takes.

        Raises:
            DataError: the shape, the dtype or a value does not fit the data trained on.
        """
        self.preparation.check(inputs)
        return self.preparation.apply(inputs, fitted_on=inputs)

    def summary(self) -> DataSummary:
        """Say how the data lies on the clients, before splits."""
        own_test = self.dataset.test_targets
        num_central_test = int(self._test.sum()) if own_test is None else len(own_test)
        return summarize(self.dataset.name, self.spec, self.partition, self.dataset.targets, num_central_test)

    def fingerprint(self, client_id: str | None = None) -> str:
        """SHA-256 in hex over all rows as they were read and the partition, or over one client's rows alone."""
        digest = hashlib.sha256()

        def take(*tensors: Tensor | None) -> None:
            for tensor in tensors:
                if tensor is not None:
                    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                    digest.update(tensor.contiguous().numpy().data)

        dataset = self.dataset
        if client_id is not None:
            rows = torch.from_numpy(self.partition.rows(self._position(client_id)))
            take(dataset.inputs[rows], dataset.targets[rows])
            return digest.hexdigest()
        take(dataset.inputs, dataset.targets, dataset.test_inputs, dataset.test_targets)
        digest.update("\n".join(self.dataset.client_names).encode())
        for array in (self.partition.indices, self.partition.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def held_out(self) -> list[int]:
        """Positions of the clients that never train."""
        return [self._position(name) for name in self.section.held_out]

    def _test_counts(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        counts = held_out_counts(sizes, self.section.test, keep=1)
        if fold := self.section.fold:
            most = int(np.delete(sizes, self.held_out()).max(initial=0))
            if len(sizes) > 1 and fold.of > most:  # one site alone may be small
                raise DataError(
                    "data.fold has more parts than any client that trains has examples: some parts would be empty",
                    got=f"of = {fold.of}",
                    expected=f"at most {most}",
                )
            # A client's only row stays with its training.
            counts = np.minimum((sizes - fold.number + fold.of) // fold.of, np.maximum(sizes - 1, 0))
        counts[self.held_out()] = sizes[self.held_out()]
        if self.section.held_out and not (sizes - counts).any():
            raise DataError("data.held_out leaves no client to train", got=", ".join(self.section.held_out))
        return counts

    def _position(self, client_id: str) -> int:
        try:
            return self.partition.names.index(client_id)
        except ValueError as exc:
            hint = nearest(client_id, self.partition.names)
            raise DataError("there is no such client", got=client_id, hint=hint) from exc

    def _split(self, position: int) -> list[NDArray[np.int64]]:
        """Test, validation and training positions within the client's rows."""
        rows = self.partition.rows(position)
        counts = [int(self._test[position]), int(self._validation[position])]
        if not any(counts):
            return [np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.arange(len(rows))]
        every, name = self.dataset.labels(), self.partition.names[position]
        labels = None if every is None else every[rows]
        fold = self.section.fold
        if fold is None or counts[0] == len(rows):
            return stratified_sample(labels, len(rows), counts, generator(self.seed, "split", name))
        rng = generator(self.seed, "folds", name)
        test, rest = stratified_fold(labels, len(rows), (fold.number, fold.of), rng)
        chosen, left = stratified_sample(None if labels is None else labels[rest], len(rest), counts[1:], rng)
        return [test, rest[chosen], rest[left]]

    def _fixed_moments(self) -> Moments | None:
        """The scaling that is the same on all clients; None if there is none, or each client fits its own."""
        scaling, inputs = self.section.scaling, self.dataset.inputs
        if isinstance(scaling, GivenScaling) and inputs.dtype != torch.int64:
            return given_moments(scaling, tuple(inputs.shape[1:]))
        if inputs.dtype == torch.uint8 and scaling == "none":
            return Moments(torch.tensor(self.dataset.pixel_mean), torch.tensor(self.dataset.pixel_std))
        if inputs.dtype != torch.float32 and scaling != "none":
            kind = (
                "tokens" if inputs.dtype == torch.int64 else "images, which are scaled by their own mean and deviation"
            )
            raise DataError("data.scaling is for features", got=f"{self.dataset.name} has {kind}", hint="Leave it out")
        if scaling != "pooled":
            return None
        held_out = np.flatnonzero(self._test + self._validation)
        rows = self.partition.indices
        if len(held_out):
            clients = range(len(self._test))
            rows = np.concatenate([self.partition.rows(client)[self._split(client)[2]] for client in clients])
        return fit_moments(inputs[torch.from_numpy(rows)])


def _take(examples: Examples, positions: NDArray[np.int64] | Tensor) -> Examples:
    index = torch.as_tensor(positions)
    return Examples(examples.inputs[index], examples.targets[index])


def _with_classes(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    """Number the classes as given, whether there are examples of each or not."""
    spec = dataset.spec
    if spec.target != "class":
        raise DataError("data.classes is for targets that are classes", got=spec.target, hint="Leave it out")
    here = spec.class_names or tuple(str(number) for number in range(spec.num_classes))
    if unknown := sorted(set(here) - set(classes)):
        raise DataError("the data have a class that data.classes does not name", got=unknown[0])
    numbers = torch.tensor([classes.index(name) for name in here], dtype=torch.int64)
    return replace(
        dataset,
        spec=replace(spec, num_classes=len(classes), class_names=classes),
        targets=numbers[dataset.targets],
        test_targets=None if dataset.test_targets is None else numbers[dataset.test_targets],
    )


def _drop_incomplete(dataset: Dataset) -> Dataset:
    """Leave out rows with a missing feature, in the test set too."""
    if dataset.inputs.dtype != torch.float32:
        return dataset
    kept = ~dataset.inputs.flatten(1).isnan().any(dim=1)
    if not kept.any():
        raise DataError(
            f"every row of {dataset.name} has a missing feature", hint='Set data.missing = "mean" or drop columns'
        )
    dataset = _select(dataset, kept)
    if dataset.test_inputs is None or dataset.test_targets is None:
        return dataset
    kept = ~dataset.test_inputs.flatten(1).isnan().any(dim=1)
    return replace(dataset, test_inputs=dataset.test_inputs[kept], test_targets=dataset.test_targets[kept])


def _set_apart(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Move a stratified part of the rows to the central test set."""
    num_rows = len(dataset.targets)
    count = int(held_out_counts(np.array([num_rows]), fraction, keep=1)[0])
    test, rest = stratified_sample(dataset.labels(), num_rows, [count], generator(seed, "central-test"))
    test_rows = torch.from_numpy(test)
    return replace(
        _select(dataset, torch.from_numpy(rest)),
        test_inputs=dataset.inputs[test_rows],
        test_targets=dataset.targets[test_rows],
    )


def _select(dataset: Dataset, rows: Tensor) -> Dataset:
    index = dataset.client_index
    return replace(
        dataset,
        inputs=dataset.inputs[rows],
        targets=dataset.targets[rows],
        client_index=None if index is None else index[rows],
    )
