"""What an update may look like: the section `[gate]`."""

from __future__ import annotations

from pydantic import Field

from fedtrain.experiment.base import Section

__all__ = ["GateSection"]


class GateSection(Section):
    """Which updates are kept away from the model."""

    norm_factor: float = Field(default=200.0, ge=0)
    """An update is refused if its L2 norm is more than this many times the median of the last accepted ones, or out
    of all proportion to the initial model; 0: its size is not checked."""
    examples_factor: float = Field(default=1000.0, ge=0)
    """An update is refused if it claims more than this many times the mean of the last accepted numbers of examples;
    0: not checked."""
    max_examples: int = Field(default=10_000_000, ge=1)
    """The most examples that a client may claim."""
    max_offences: int = Field(default=3, ge=0)
    """After so many refused updates a client is set aside for the rest of the run; 0: never. Updates that are zero,
    or of too many examples, do not count: the client may be honest."""
