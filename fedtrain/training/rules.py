"""The client half of a strategy: how local training departs from the plain optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fedtrain.params import Params

__all__ = ["LocalEnd", "LocalRule", "LocalStart", "Tensors"]

Tensors = list[Tensor] | tuple[Tensor, ...]
"""One per trained parameter, in the model's order."""


@dataclass(frozen=True)
class LocalStart:
    """What a rule may use when a client begins its round.

    Attributes:
        names: of the trained parameters, in the model's order; those that stay private are not among them.
        values: the server's values of them; nobody writes to them.
        shared: what the algorithm sent beside the parameters (`Algorithm.share`).
        kept: what the rule itself kept on this client in its last round; empty in the first.
        lr: learning rate of the round.
        mean_loss: computes the mean loss of the server's model over the client's training examples.
    """

    names: list[str]
    values: Tensors
    shared: Params
    kept: Mapping[str, Any]
    lr: float
    mean_loss: Callable[[], float]


@dataclass(frozen=True)
class LocalEnd:
    """What a rule may use when the client has finished its steps.

    Attributes:
        values: the trained parameters now.
        steps: optimiser steps taken.
    """

    values: Tensors
    steps: int


class LocalRule(NamedTuple):
    """Three functions; `begin`'s result goes through the other two and lives for one round of one client."""

    begin: Callable[[LocalStart], Any]
    """(start) -> whatever the other two need."""
    correct_gradient: Callable[[Any, Tensors, Tensors], Tensors] | None = None
    """(begin's result, trained parameters, gradients) -> gradients to step with."""
    finish: Callable[[Any, LocalEnd], tuple[Params, Mapping[str, Any]]] | None = None
    """(begin's result, end) -> (tensors that go with the update, as `Algorithm.extra` says; what stays on the client).

    What stays is a mapping as a strategy's state is, and comes back as `LocalStart.kept`."""
