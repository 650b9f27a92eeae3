"""The nouns of data: a source loads one Dataset; a partition says whose rows are whose; a client sees ClientData."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["ClientData", "DataSpec", "Dataset", "Examples", "FederatedData", "Loader"]


@dataclass(frozen=True)
class DataSpec:
    """What a task needs to know of the data to build its model.

    Attributes:
        input_shape: shape of one input without the batch, such as `(1, 28, 28)`, `(30,)` or `(80,)` for 80 tokens.
        target: "class" (int64 index), "number" (float32) or "tokens" (int64, one per position).
        num_classes: classes, or tokens of the vocabulary; 0 for numbers.
        feature_names: one per feature for tabular data, else empty.
        class_names: one per class; the vocabulary for text, else empty.
    """

    input_shape: tuple[int, ...]
    target: Literal["class", "number", "tokens"]
    num_classes: int = 0
    feature_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examples:
    """Inputs and targets of equal length, ready for a model.

    Attributes:
        inputs: `(N, *input_shape)`, float32, or int64 for tokens.
        targets: `(N,)` int64 for classes, `(N,)` float32 for numbers, `(N, T)` int64 for tokens.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class ClientData:
    """One client's examples; validation and test may be empty."""

    train: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True)
class Dataset:
    """All rows of a source as they were read: compact dtypes, missing values still NaN.

    Attributes:
        name: the source's name.
        spec: shapes and classes.
        inputs: `(N, *input_shape)`: uint8 images (0 to 255), float32 features (NaN where missing) or int64 tokens.
        targets: `(N,)` int64 or float32, or `(N, T)` int64 tokens.
        test_inputs: the source's own test set, if it has one.
        test_targets: likewise.
        client_names: natural clients' names, in a stable order; empty if there are none.
        client_index: `(N,)` int64 into `client_names`; None if there are none.
        pixel_mean: for images: mean of pixels / 255, subtracted.
        pixel_std: for images: deviation of pixels / 255, divided by.
    """

    name: str
    spec: DataSpec
    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor | None = None
    test_targets: Tensor | None = None
    client_names: tuple[str, ...] = ()
    client_index: Tensor | None = None
    pixel_mean: float = 0.0
    pixel_std: float = 1.0

    def labels(self) -> npt.NDArray[np.int64] | None:
        """`(N,)` int64 class of each row; None if targets are not classes."""
        if self.spec.target != "class":
            return None
        return self.targets.numpy()


Loader = Callable[..., Dataset]
"""A user's own loader: called with the section's options as keyword arguments, and returns a Dataset."""


class FederatedData(Protocol):
    """Data on many clients, as the client app, the server's evaluation and the simulation see it.

    An implementation must be cheap to hold for 100,000 clients, and picklable for worker processes.
    """

    spec: DataSpec

    def client_ids(self) -> Sequence[str]:
        """Stable names, in a stable order."""

    def client(self, client_id: str) -> ClientData:
        """Gather one client's rows, imputed and scaled."""

    def sizes(self) -> npt.NDArray[np.int64]:
        """`(clients,)` training examples of each client, in the order of `client_ids`."""

    def central_test(self) -> Examples:
        """The central test set; may be empty."""

    def fingerprint(self, client_id: str | None = None) -> str:
        """SHA-256 in hex over all rows as they were read and the partition, or over one client's rows alone."""
