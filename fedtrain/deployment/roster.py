"""Clients that bring their own data: what the server knows of it, and the order in which it counts them."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtrain.data.base import Dataset, DataSpec
from fedtrain.data.federated import PartitionedData
from fedtrain.data.names import GivenNames
from fedtrain.data.partition import Partition
from fedtrain.disk import atomic_write
from fedtrain.errors import DataError, RunFolderError
from fedtrain.experiment.sections import Experiment
from fedtrain.records import DataSummary

__all__ = ["RemoteData", "Roster", "checked_kind", "num_examples"]


_Name = Annotated[str, Field(max_length=200)]


class _Kind(BaseModel):
    """The kind of a client's data, as it tells."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_shape: list[Annotated[int, Field(ge=1, le=1 << 20)]] = Field(min_length=1, max_length=8)
    target: Literal["class", "number", "tokens"]
    num_classes: int = Field(ge=0, le=1 << 20)
    feature_names: list[_Name]
    class_names: list[_Name]
    dtype: Literal["uint8", "float32", "int64"]

    def spec(self) -> DataSpec:
        shape, names = tuple(self.input_shape), tuple(self.feature_names)
        return DataSpec(shape, self.target, self.num_classes, names, tuple(self.class_names))


class Roster(BaseModel):
    """`roster.json` of a run's folder: a resumed run has the same name, and the same clients in the same order.

    Attributes:
        run: names the run; 32 hexadecimal digits.
        kind: of the clients' own data: fields of a `DataSpec`, and the dtype of the inputs; empty for data that the
            server has itself.
        sizes: training examples of clients with data of their own, in the order of their positions.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    run: str = Field(default_factory=lambda: secrets.token_hex(16))
    kind: dict[str, Any] = {}
    sizes: dict[str, int] = {}

    @classmethod
    def read(cls, path: Path) -> Roster:
        """Read it; a new one where there is none.

        Raises:
            RunFolderError: it is damaged.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as error:
            raise RunFolderError("the run's list of clients is damaged", got=path) from error

    def write(self, path: Path) -> None:
        """Replace it."""
        atomic_write(path, lambda file: file.write(self.model_dump_json(indent=2).encode()))


class RemoteData(PartitionedData):
    """Data that stay with the clients: their kind and their sizes, and no rows.

    Args:
        experiment: with its [data].
        roster: of the run, with at least one client.

    Raises:
        DataError: the experiment needs all rows in one place.
    """

    def __init__(self, experiment: Experiment, roster: Roster) -> None:
        section = experiment.data
        if section.scaling == "pooled":
            raise DataError(
                "clients with data of their own have no pooled scaling",
                hint='Set data.scaling = "client", or give numbers: { mean = [...], std = [...] }',
            )
        kind = _Kind.model_validate(roster.kind)
        spec, dtype = kind.spec(), getattr(torch, kind.dtype)
        names, counts = tuple(roster.sizes), np.array([*roster.sizes.values()], dtype=np.int64)
        inputs = torch.empty((0, *spec.input_shape), dtype=dtype)
        targets = torch.empty((0, *spec.input_shape) if spec.target == "tokens" else 0, dtype=torch.int64)
        dataset = Dataset("the clients' own data", spec, inputs, targets, client_names=names)
        nothing = np.zeros(len(names) + 1, dtype=np.int64)
        partition = Partition(np.empty(0, dtype=np.int64), nothing, GivenNames(names), None)
        super().__init__(dataset, partition, section, experiment.seed)
        self._counts, self._roster = counts, roster

    def sizes(self) -> NDArray[np.int64]:
        """`(clients,)` training examples, as each client told."""
        return self._counts

    def summary(self) -> DataSummary:
        """What the server knows: sizes."""
        sizes = self._counts
        return DataSummary(
            source=self.dataset.name,
            target=self.spec.target,
            num_clients=len(sizes),
            num_examples=int(sizes.sum()),
            num_central_test=0,
            smallest_client=int(sizes.min()),
            median_client=float(np.median(sizes)),
            largest_client=int(sizes.max()),
            label_names=[],
            shown_clients=list(self.client_ids())[:200],
            label_counts=[[] for _ in sizes[:200]],
            shown_sizes=sizes[:200].tolist(),
            heterogeneity=None,
        )

    def fingerprint(self, client_id: str | None = None) -> str:
        """SHA-256 in hex over the kind of the data; the rows are not here."""
        return hashlib.sha256(json.dumps(self._roster.kind, sort_keys=True).encode()).hexdigest()


def checked_kind(kind: object) -> dict[str, Any]:
    """The kind of data that a client told, if it is one.

    Raises:
        DataError: it is none.
    """
    try:
        return _Kind.model_validate(kind).model_dump()
    except ValidationError as error:
        raise DataError("it does not describe its data") from error


def num_examples(facts: Mapping[str, Any]) -> int:
    """The size that a client told, which the strategy may weigh it by.

    Raises:
        DataError: it is no such number.
    """
    size = facts.get("num_examples")
    if type(size) is not int or not 1 <= size <= 10**9:
        raise DataError("it does not say how many examples it has")
    return size
