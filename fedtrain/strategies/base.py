"""The two halves of a strategy: what the server does with updates, and how clients train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fedtrain.params import Params
from fedtrain.training.rules import LocalRule
from fedtrain.wire import Update

__all__ = ["Algorithm", "Asynchrony", "FederatedStrategy", "State"]

State = Mapping[str, Any]
"""A plain mapping of names to tensors, numbers, or mappings of such: a checkpoint saves it with no code of its own."""


def _nothing(_: State | Params) -> Params:
    return {}


def _no_objection(_: Update) -> str | None:
    return None


class Algorithm(NamedTuple):
    """The server half, as pure functions; what most strategies do without has a default."""

    init: Callable[[Params], State]
    """(initial parameters) -> state."""
    apply: Callable[[State, Params, Iterable[Update]], tuple[Params, State]]
    """(state, parameters, updates) -> (next parameters, next state). Called once per round.

    Updates come in client order; if asynchronous, in order of arrival on the virtual clock. The iterable is read once,
    and all of it. Where the mathematics allows it, updates are added up as they pass, so that memory does not grow with
    their number. No update leaves the parameters and the state as they are. Fewer updates than the mathematics needs
    raise RunError."""
    share: Callable[[State], Params] = _nothing
    """(state) -> tensors that clients are sent beside the parameters, such as SCAFFOLD's control variate."""
    extra: Callable[[Params], Params] = _nothing
    """(parameters) -> names, shapes and dtypes of the tensors that an update must bring beside its delta."""
    objection: Callable[[Update], str | None] = _no_objection
    """(update) -> why the algorithm cannot use it, in one line; it has passed the gate's own checks."""
    takes_buffers: bool = False
    """Whether the functions above are given the model's buffers too (running means and variances), as robust means
    want. Else they see the trained parameters alone, and buffers are averaged by examples: a server's optimiser would
    step along them, and a variance become negative."""


class Asynchrony(NamedTuple):
    """How clients train while the server goes on: no round waits for its slowest client."""

    buffer_size: int  # updates that make a round
    max_in_flight: int  # clients that train at any time


class FederatedStrategy(NamedTuple):
    """Both halves."""

    algorithm: Algorithm
    local_rule: LocalRule | None = None  # None: plain local training
    personal_rule: LocalRule | None = None  # by which each client trains a model of its own, beside the global one
    asynchrony: Asynchrony | None = None  # None: in rounds
