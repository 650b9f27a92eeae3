"""What every strategy owes the server, whichever it is."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from fedtrain.errors import RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import StrategySection
from fedtrain.params import Params, add
from fedtrain.rundir import Checkpoint, RunFolder
from fedtrain.strategies.base import Algorithm, State
from fedtrain.strategies.registry import STRATEGIES, Setting
from fedtrain.wire import Update


@dataclass(frozen=True)
class Case:
    """One strategy, and what its mathematics promises."""

    options: Mapping[str, Any]  # of its section
    identical: Literal["the update", "one step", "their number"] = "the update"
    """What identical updates return: themselves; what one of them would; or it depends on how many they are."""
    weighted: bool = True  # by examples
    streaming: bool = True  # memory does not grow with the number of updates
    quorum: int = 1  # fewer updates are refused
    extra: Sequence[float] = (1.0,)  # fills the tensors beside the delta, of one update after another


CASES = {
    "fedavg": Case({}),
    "fedavgm": Case({"server_lr": 0.5}, identical="one step"),
    "fedadagrad": Case({}, identical="one step"),
    "fedadam": Case({}, identical="one step"),
    "fedyogi": Case({}, identical="one step"),
    "fedopt": Case({"optimizer": "AdamW", "options": {"lr": 0.1}}, identical="one step"),
    "fedprox": Case({}),
    "scaffold": Case({}, weighted=False, extra=(0.5, -1.0)),
    "fednova": Case({}, extra=(1.0, 8.0, 3.0)),
    "feddyn": Case({}, identical="their number", weighted=False),
    "qfedavg": Case({"q": 0.5}, identical="one step", weighted=False, extra=(0.5, 2.0)),
    "median": Case({}, weighted=False, streaming=False),
    "trimmed-mean": Case({}, weighted=False, streaming=False),
    "krum": Case({}, weighted=False, streaming=False, quorum=5),
    "multi-krum": Case({}, weighted=False, streaming=False, quorum=5),
    "bulyan": Case({}, weighted=False, streaming=False, quorum=7),
    "geometric-median": Case({}, streaming=False),
    "centered-clipping": Case({}, weighted=False),
    "norm-bounding": Case({"max_norm": 100.0}),
    "ditto": Case({}),
    "fedbuff": Case({}, weighted=False),
}
EXPERIMENT = Experiment.model_validate({"data": {"name": "digits", "clients": 20}, "training": {"local_steps": 8}})

PARAMS = {
    "weight": torch.tensor([[0.5, -1.0, 2.0], [-0.0, 0.25, 1.5]]),
    "scale": torch.tensor(-0.75),
    "empty": torch.zeros(0),
    "running_mean": torch.tensor([0.125, -0.5], dtype=torch.float64),
}


def algorithm_of(name: str) -> Algorithm:
    section = TypeAdapter(StrategySection).validate_python({"name": name, **CASES[name].options})
    return STRATEGIES[name](section, Setting(EXPERIMENT, num_clients=20)).algorithm


def updates_for(name: str, count: int, round_number: int = 1) -> list[Update]:
    """So many different updates, none of which the algorithm objects to."""
    algorithm, rng = algorithm_of(name), torch.Generator().manual_seed(round_number)
    updates = []
    for i in range(count):
        delta = {n: torch.randn(t.shape, dtype=t.dtype, generator=rng) for n, t in PARAMS.items()}
        value = CASES[name].extra[i % len(CASES[name].extra)]
        extra = {n: torch.full_like(t, value) for n, t in algorithm.extra(PARAMS).items()}
        updates.append(Update(f"client {i}", round_number, delta, num_examples=1 + i, extra=extra))
    assert [algorithm.objection(update) for update in updates] == [None] * count
    return updates


def first_step(name: str, updates: Iterable[Update]) -> Params:
    algorithm = algorithm_of(name)
    return algorithm.apply(algorithm.init(PARAMS), PARAMS, iter(updates))[0]


def close(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=0, atol=1e-6) for n in one)


def content(value: Any) -> Any:
    """Everything down to the bytes, to compare with ==."""
    if isinstance(value, Mapping):
        return {name: content(inner) for name, inner in value.items()}
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, Tensor) else value


def test_every_strategy_has_its_case() -> None:
    sections = get_args(get_args(StrategySection)[0])
    names = {name for section in sections for name in get_args(section.model_fields["name"].annotation)}
    assert CASES.keys() == STRATEGIES.keys() == names - {"own"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_identical_updates(name: str) -> None:
    case, update = CASES[name], updates_for(name, 1)[0]
    fewest, more = (first_step(name, [update] * count) for count in (case.quorum, case.quorum + 2))
    assert close(fewest, add(PARAMS, update.delta)) == (case.identical == "the update")
    assert close(fewest, more) == (case.identical != "their number")


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_updates_does_not_matter(name: str) -> None:
    updates = updates_for(name, CASES[name].quorum + 4)
    assert close(first_step(name, updates), first_step(name, reversed(updates)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_three_examples_weigh_as_three_clients_or_not_at_all(name: str) -> None:
    case = CASES[name]
    first, *others = (replace(update, num_examples=1) for update in updates_for(name, case.quorum + 2))
    same_as = [first] * (3 if case.weighted else 1) + others
    assert close(first_step(name, [replace(first, num_examples=3), *others]), first_step(name, same_as))


@pytest.mark.parametrize("name", STRATEGIES)
def test_tensors_keep_their_shapes_and_dtypes(name: str) -> None:
    new = first_step(name, updates_for(name, CASES[name].quorum + 1))
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in PARAMS.items()}
    assert all(t.isfinite().all() for t in new.values())


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_update_leaves_model_and_state_and_too_few_are_refused(name: str) -> None:
    algorithm, quorum = algorithm_of(name), CASES[name].quorum
    state = algorithm.init(PARAMS)
    assert [content(v) for v in algorithm.apply(state, PARAMS, iter(()))] == [content(PARAMS), content(state)]
    params, state = algorithm.apply(state, PARAMS, iter(updates_for(name, quorum)))
    assert [content(v) for v in algorithm.apply(state, params, iter(()))] == [content(params), content(state)]
    for count in range(1, quorum):
        with pytest.raises(RunError, match=str(quorum)):
            algorithm.apply(state, params, iter(updates_for(name, count)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_that_is_given_changes(name: str) -> None:
    algorithm = algorithm_of(name)
    params, state = algorithm.apply(algorithm.init(PARAMS), PARAMS, updates_for(name, CASES[name].quorum))
    updates = updates_for(name, CASES[name].quorum, round_number=2)

    def given() -> list[Any]:
        return [content(params), content(state), *[(content(u.delta), content(u.extra)) for u in updates]]

    before = given()
    algorithm.apply(state, params, iter(updates))
    assert given() == before


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_goes_on_byte_equal(name: str, tmp_path: Path) -> None:
    def rounds(start: tuple[Params, State], *numbers: int) -> tuple[Params, State]:
        algorithm = algorithm_of(name)  # anew, as after a kill
        params, state = start
        for number in numbers:
            params, state = algorithm.apply(state, params, updates_for(name, CASES[name].quorum + 2, number))
        return params, state

    params, state = rounds((PARAMS, algorithm_of(name).init(PARAMS)), 1, 2)
    folder = RunFolder(tmp_path)
    with folder.locked():
        folder.write_checkpoint(Checkpoint(2, params, state))
    saved = folder.latest_checkpoint(warn=pytest.fail)
    assert saved is not None
    assert content(saved.state) == content(state)
    resumed, uninterrupted = rounds((saved.params, saved.state), 3, 4), rounds((params, state), 3, 4)
    assert [content(v) for v in resumed] == [content(v) for v in uninterrupted]
    assert not close(uninterrupted[0], params)


@pytest.mark.parametrize("name", STRATEGIES)
def test_memory_grows_with_the_updates_only_where_it_must(name: str) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def arriving() -> Iterator[Update]:
        for _ in range(CASES[name].quorum + 4):
            [update] = updates_for(name, 1)
            seen.append(weakref.ref(update.delta["weight"]))
            alive.append(sum(ref() is not None for ref in seen))
            yield update
            del update

    first_step(name, arriving())
    assert (max(alive) <= 2) == CASES[name].streaming  # the one in hand and the one that comes
