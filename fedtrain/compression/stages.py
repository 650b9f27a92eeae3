"""What the three kinds of stage have in common: fewer numbers, fewer bits per number, fewer bytes.

Each stage is made for one schema and knows the length of every array it writes. Hence a chain has one layout, and reads
an encoded update by cutting it up: no lengths travel that could lie.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Array", "Coder", "Draw", "Field", "Floats", "Quantiser", "Reduced", "Reducer"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class Field(NamedTuple):
    """One array of an encoded update."""

    dtype: np.dtype[Any]
    length: int


class Draw(NamedTuple):
    """What a reducer goes by, beside the numbers.

    Attributes:
        rng: for what it draws.
        memory: what it kept from the last update; None at first.
        feedback: what is lost will be added to the next update, so there is no need to be unbiased.
    """

    rng: np.random.Generator
    memory: Tensor | None
    feedback: bool


class Reduced(NamedTuple):
    """What a reducer leaves of a vector.

    Attributes:
        numbers: for the quantiser.
        beside: arrays of `Reducer.fields`.
        memory: for the next update; None if it keeps nothing.
    """

    numbers: Floats
    beside: list[Array]
    memory: Tensor | None = None


class Reducer(ABC):
    """Makes fewer numbers of a vector.

    Attributes:
        pieces: lengths of the parts of `Reduced.numbers` that have a scale of their own.
        fields: what is sent beside the numbers.
    """

    pieces: tuple[int, ...]
    fields: tuple[Field, ...] = ()

    @abstractmethod
    def reduce(self, vector: Floats, draw: Draw) -> Reduced:
        """Leave the numbers that are sent."""

    @abstractmethod
    def restore(self, numbers: Floats, beside: Sequence[Array]) -> Floats:
        """Make a vector again.

        Raises:
            CodecError: `beside` does not come from `reduce`.
        """


class Quantiser(ABC):
    """Writes numbers in fewer bits.

    Attributes:
        fields: the arrays it writes.
    """

    fields: tuple[Field, ...]

    @abstractmethod
    def quantise(self, numbers: Floats, rng: np.random.Generator) -> list[Array]:
        """Write finite numbers as arrays of `fields`."""

    @abstractmethod
    def restore(self, arrays: Sequence[Array]) -> Floats:
        """Read the numbers; they may be infinite, if the arrays were made to say so.

        Raises:
            CodecError: the arrays do not come from `quantise`.
        """


class Coder(ABC):
    """Writes bytes as fewer bytes, without loss."""

    @abstractmethod
    def compress(self, content: bytes) -> bytes:
        """Write the bytes; the result may be longer."""

    @abstractmethod
    def decompress(self, content: bytes, size: int) -> bytes:
        """Read `size` bytes, and never more than one byte beyond.

        Raises:
            CodecError: the content is damaged, or holds another number of bytes.
        """
