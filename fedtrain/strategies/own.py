"""A user's own strategy, or any flwr Strategy, by import path or file."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedtrain.errors import FedtrainError, InputError, RunError, nearest
from fedtrain.experiment.strategies import OwnStrategy
from fedtrain.importing import load_object, raised
from fedtrain.params import Params, snapshot
from fedtrain.statefile import UnsavableStateError, copy_state
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.strategies.stock import fitted, naming_failures, refuse_unsuitable
from fedtrain.training.rules import LocalRule
from fedtrain.wire import Update

__all__ = ["load_own"]

_GUIDE = "docs/strategies.md shows how"
_KINDS = "a FederatedStrategy or an Algorithm of fedtrain, or a Strategy of flwr.serverapp"
# flwr's own default is 2 of each, and it waits without end where there are fewer.
_LEAST_NODES = {"min_train_nodes": 1, "min_evaluate_nodes": 0, "min_available_nodes": 1}
_WIRE_NAMES = {"weighted_by_key": "num-examples", "arrayrecord_key": "arrays", "configrecord_key": "config"}


def load_own(section: OwnStrategy, base: Path) -> FederatedStrategy | Strategy:
    """Build the strategy that an experiment names by path.

    Args:
        section: where it is, and its options.
        base: the experiment file's folder, against which "file.py:name" is resolved.

    Returns:
        Both halves of a strategy of fedtrain's kind, or a flwr Strategy for `StockStrategy`.

    Raises:
        InputError: no such code, wrong options, or what it makes is no strategy that can run here.
    """
    name = section.path
    loaded = load_object(name, base, InputError)
    if isinstance(loaded, Strategy | Algorithm | FederatedStrategy):
        if section.options:
            raise InputError(f"{name} is a finished strategy, which takes no options", got=", ".join(section.options))
        built: Any = copy.deepcopy(loaded)  # two runs in one process load the same object
    else:
        built = _build(loaded, section)
    if isinstance(built, Algorithm):
        built = FederatedStrategy(built)
    if isinstance(built, FederatedStrategy):
        return _checked(built, name)
    if isinstance(built, Strategy):
        return _suitable(built, name)
    old = type(built).__module__.startswith("flwr.server.")
    raise InputError(
        f"{name} made no strategy",
        got=type(built).__name__,
        expected=_KINDS,
        hint="Take the strategy of the same name from flwr.serverapp.strategy" if old else _GUIDE,
    )


def _build(loaded: Any, section: OwnStrategy) -> Any:
    name = section.path
    try:
        signature = inspect.signature(loaded)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} makes no strategy", got=type(loaded).__name__, expected=f"a function or class that makes {_KINDS}"
        ) from None
    options = section.options
    if isinstance(loaded, type) and issubclass(loaded, Strategy):
        refuse_unsuitable(loaded)
        options = {key: n for key, n in _LEAST_NODES.items() if key in signature.parameters} | options
    try:
        signature.bind(**options)
    except TypeError as exc:
        known = list(signature.parameters)
        unknown = [option for option in section.options if option not in known]
        raise InputError(
            f"the options do not suit {name}: {exc}",
            expected=f"options among {', '.join(known)}" if known else "no options",
            hint=nearest(unknown[0], known, otherwise="") if unknown else "Set it in [strategy] options",
        ) from exc
    try:
        return loaded(**options)
    except FedtrainError:
        raise
    except Exception as exc:
        raise raised(f"building strategy {name!r}", exc, InputError) from exc


def _suitable(strategy: Strategy, name: str) -> Strategy:
    refuse_unsuitable(type(strategy))
    for key, ours in _WIRE_NAMES.items():
        if (theirs := getattr(strategy, key, ours)) != ours:
            raise InputError(f"{name} has another {key} than fedtrain's messages", got=theirs, expected=ours)
    return strategy


def _checked(strategy: FederatedStrategy, name: str) -> FederatedStrategy:
    """The same strategy, whose failures in a run name the user's line."""
    algorithm, rules = strategy.algorithm, (strategy.local_rule, strategy.personal_rule)
    if not isinstance(algorithm, Algorithm) or any(not isinstance(rule, LocalRule | None) for rule in rules):
        raise InputError(
            f"{name} made an incomplete strategy",
            got=f"({', '.join(type(part).__name__ for part in (algorithm, *rules))})",
            expected="FederatedStrategy(Algorithm(init, apply), LocalRule(...) or None)",
            hint=_GUIDE,
        )

    def init(params: Params) -> State:
        with naming_failures(f"init of {name}"):
            state = algorithm.init(snapshot(params))
        return _kept(state, f"init of {name}", InputError)

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        with naming_failures(f"apply of {name}"):
            # Copies, here and of the result: what is changed in place would change in the last checkpoint too.
            result = algorithm.apply(copy_state(state), snapshot(params), _Once(updates, name))
            if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Mapping)):
                raise RunError(f"apply of {name} must return the next parameters and the next state", hint=_GUIDE)
            new, next_state = result
            return fitted(new, params, name), _kept(next_state, f"apply of {name}", RunError)

    def share(state: State) -> Params:
        with naming_failures(f"share of {name}"):
            return algorithm.share(copy_state(state))

    def extra(params: Params) -> Params:
        with naming_failures(f"extra of {name}"):
            return algorithm.extra(params)

    def objection(update: Update) -> str | None:
        try:
            return algorithm.objection(update)
        except FedtrainError:
            raise
        except Exception as exc:  # no RunError: the gate would refuse the update, as if the client were at fault
            raise raised(f"objection of {name}", exc, InputError) from exc

    named = algorithm._replace(init=init, apply=apply, share=share, extra=extra, objection=objection)
    return strategy._replace(algorithm=named)


class _Once:
    """Updates that stream by: who reads them a second time would find none, and take the round for an empty one."""

    def __init__(self, updates: Iterable[Update], name: str) -> None:
        self._updates, self._name, self._read = iter(updates), name, False

    def __iter__(self) -> Iterator[Update]:
        if self._read:
            raise RunError(
                f"apply of {self._name} reads the updates twice, and they stream by once",
                hint="Add up in one loop, as RunningMean does, or keep them: updates = list(updates)",
            )
        self._read = True
        return self._updates

    def __next__(self) -> Update:
        self._read = True
        return next(self._updates)


def _kept(state: State, what: str, error: type[FedtrainError]) -> State:
    """Copy a state, of which the strategy may keep tensors, or refuse it while its round can be named."""
    try:
        return copy_state(state)
    except UnsavableStateError as exc:
        raise error(f"{what} gave what no checkpoint can hold: {exc}", hint=_GUIDE) from exc
