"""Bad replies among good ones: quarantined with a reason, and the model is that of the good ones to the byte."""

import functools
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import TypeAdapter
from torch import Tensor

from fedtrain.errors import RunError
from fedtrain.experiment.gate import GateSection
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import StrategySection
from fedtrain.server.gate import Gate
from fedtrain.strategies.base import Algorithm
from fedtrain.strategies.registry import STRATEGIES, Setting
from fedtrain.wire import Update, update, update_content

ROUND, GOOD = 7, 11
PARAMS = {"w": torch.tensor([0.5, -1.0, 2.0]), "b": torch.tensor([0.25]), "s": torch.tensor(-0.75)}
NAN, INF, LONG = float("nan"), float("inf"), "x" * 10_000_000
ESCAPE = "\x1b]0;owned\x07\x1b[31mred\n\u202e"

Change = Callable[[Update], RecordDict | Update]  # what is no RecordDict cannot be one, and meets the gate all the same


def client_update(name: str, seed: int, extra: Mapping[str, Tensor]) -> Update:
    rng = torch.Generator().manual_seed(seed)
    delta = {n: torch.randn(t.shape, generator=rng) for n, t in PARAMS.items()}
    ones = {n: torch.ones_like(t) for n, t in extra.items()}
    return Update(name, ROUND, delta, 20 + seed, {"loss": 0.5}, ones)


def delta(**tensors: Tensor) -> Change:
    return lambda good: update_content(replace(good, delta={**good.delta, **tensors}))


def extra(change: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Change:
    return lambda good: update_content(replace(good, extra=change(good.extra)))


def field(**values: Any) -> Change:
    return lambda good: update_content(replace(good, **values))


def record(key: str, value: Callable[[], Any]) -> Change:
    """Replace a whole record."""
    return lambda good: RecordDict({**update_content(good), key: value()})


def without(key: str) -> Change:
    return lambda good: RecordDict({k: v for k, v in update_content(good).items() if k != key})


def metrics(**values: Any) -> Change:
    return record("metrics", lambda: MetricRecord({k.replace("_", "-"): v for k, v in values.items()}))


def config(client: Any, number: Any) -> Change:
    return record("config", lambda: ConfigRecord({"client-id": client, "server-round": number}))


@functools.cache
def many_metrics() -> MetricRecord:
    return MetricRecord({"num-examples": 20, "loss": 0.5} | {str(i): 0.5 for i in range(100_000)})


def array(data: bytes, dtype: str = "float32") -> Change:
    """Bytes that others wrote for w."""

    def change(good: Update) -> RecordDict:
        content = update_content(good)
        content.array_records["arrays"]["w"] = Array(dtype, (3,), "numpy.ndarray", data)
        return content

    return change


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


BAD: Mapping[str, Change] = {
    "NaN": delta(w=torch.tensor([0.0, NAN, 0.0])),
    "infinity": delta(s=torch.tensor(INF)),
    "1e30": delta(w=torch.full((3,), 1e30)),
    "(1,) for (3,)": delta(w=torch.ones(1)),
    "(3, 1) for (3,)": delta(w=torch.ones(3, 1)),
    "0-d for (1,)": delta(b=torch.tensor(1.0)),
    "(1,) for 0-d": delta(s=torch.ones(1)),
    "no entries": delta(w=torch.ones(0)),
    "float64": delta(w=torch.ones(3, dtype=torch.float64)),
    "float16": delta(w=torch.ones(3, dtype=torch.float16)),
    "int64": delta(w=torch.ones(3, dtype=torch.int64)),
    "complex": delta(w=torch.ones(3, dtype=torch.complex64)),
    "a tensor missing": lambda good: update_content(replace(good, delta={"w": good.delta["w"], "b": good.delta["b"]})),
    "a tensor more": delta(more=torch.ones(1)),
    "an integer buffer": delta(num_batches_tracked=torch.tensor(5)),
    "a tensor's name with escapes": delta(**{ESCAPE: torch.ones(1)}),
    "a tensor's name of 10 MB": delta(**{LONG: torch.ones(1)}),
    "no tensors": field(delta={}),
    "a zero update": field(delta={name: torch.zeros_like(t) for name, t in PARAMS.items()}),
    "an extra tensor nobody asked for": extra(lambda good: {**good, "more": torch.ones(1)}),
    "num_examples 0": field(num_examples=0),
    "num_examples -30": field(num_examples=-30),
    "num_examples 1e9": field(num_examples=10**9),
    "num_examples 10^400": field(num_examples=10**400),
    "num_examples 1e12 as a float": field(num_examples=1e12),
    "num_examples NaN": field(num_examples=NAN),
    "num_examples a list": field(num_examples=[20]),
    "num_examples a text": lambda good: replace(good, num_examples="7"),
    "num_examples True": lambda good: replace(good, num_examples=True),
    "num_examples missing": metrics(loss=0.5),
    "loss NaN": field(metrics={"loss": NAN}),
    "loss infinite": field(metrics={"loss": INF}),
    "loss a list": field(metrics={"loss": [0.5, 0.5]}),
    "loss missing": field(metrics={}),
    "a metric more": field(metrics={"loss": 0.5, "accuracy": 1.0}),
    "a list of metrics more": field(metrics={"loss": 0.5, "losses": [0.5]}),
    "100,000 metrics": record("metrics", many_metrics),
    "a metric's name of 10 MB": field(metrics={"loss": 0.5, LONG: 0.5}),
    "another client's": field(client_id="good 01"),
    "a client's name with a path": field(client_id="../../../etc/passwd"),
    "a client's name with escapes": field(client_id=ESCAPE),
    "a client's name of 10 MB": field(client_id=LONG),
    "a client's name that is a number": config(5, ROUND),
    "an old round": field(round_number=ROUND - 1),
    "a round to come": field(round_number=ROUND + 1),
    "a round that is a text": config("bad", "7"),
    "no arrays": without("arrays"),
    "no metrics": without("metrics"),
    "no config": without("config"),
    "nothing": lambda _: RecordDict(),
    "config for arrays": record("arrays", ConfigRecord),
    "metrics for config": record("config", MetricRecord),
    "arrays for metrics": record("metrics", ArrayRecord),
    "an array of text": array(npy(np.array(["a", "b", "c"])), "str"),
    "an array cut short": array(npy(np.ones(3, np.float32))[:-5]),
    "an array without bytes": array(b""),
    "an array as a pickle": array(npy(np.array([{}, {}, {}], dtype=object)), "object"),
}
BAD_EXTRA: Mapping[str, Change] = {
    "no extra tensors": extra(lambda _: {}),
    "an extra tensor missing": extra(lambda good: dict(list(good.items())[1:])),
    "extra NaN": extra(lambda good: {n: torch.full_like(t, NAN) for n, t in good.items()}),
    "extra of another shape": extra(lambda good: {n: t.expand(2, *t.shape).clone() for n, t in good.items()}),
    "extra float16": extra(lambda good: {n: t.half() for n, t in good.items()}),
}
BAD_EXTRA_VECTORS: Mapping[str, Change] = {
    "extra 1e30": extra(lambda good: {n: torch.full_like(t, 1e30) for n, t in good.items()}),
}


@functools.cache
def algorithm_of(name: str) -> Algorithm:
    options = {"optimizer": "SGD", "options": {"lr": 1.0}} if name == "fedopt" else {}
    section = TypeAdapter(StrategySection).validate_python({"name": name, **options})
    experiment = Experiment.model_validate({"data": {"name": "digits", "clients": GOOD + 1}})
    return STRATEGIES[name](section, Setting(experiment, num_clients=GOOD + 1)).algorithm


def template(name: str) -> Mapping[str, Tensor]:
    return algorithm_of(name).extra(PARAMS)


def good_replies(name: str) -> list[tuple[str, RecordDict | Update]]:
    updates = [client_update(f"good {i:02d}", i, template(name)) for i in range(GOOD)]
    return [(update.client_id, update_content(update)) for update in updates]


def aggregated(name: str, replies: list[tuple[str, RecordDict | Update]]) -> tuple[Any, dict[str, str]]:
    """Everything that a round leaves behind, down to the bytes, and the reasons of the refused."""
    algorithm = algorithm_of(name)
    gate = Gate(GateSection(), PARAMS, template(name), also=algorithm.objection)
    quarantined: dict[str, str] = {}

    def accepted() -> Iterator[Update]:
        for client_id, reply in replies:
            try:
                read = update(reply) if isinstance(reply, RecordDict) else reply
            except RunError as error:
                quarantined[client_id] = gate.refuse(client_id, error)
                continue
            if why := gate.objection(read, client_id, ROUND):
                quarantined[client_id] = why
            else:
                yield read

    left = algorithm.apply(algorithm.init(PARAMS), PARAMS, accepted())
    offenders = [name for name, why in quarantined.items() if "zero throughout" not in why]  # which may be honest
    assert gate.memory()["offences"] == dict.fromkeys(offenders, 1)
    return to_bytes((*left, gate.memory() | {"offences": {}})), quarantined


def to_bytes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: to_bytes(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [to_bytes(inner) for inner in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, Tensor) else value


def bad_replies(name: str, when: str) -> dict[str, RecordDict | Update]:
    """One per case, each from a client of its own."""
    changes = dict(BAD)
    if sizes := [t.numel() for t in template(name).values()]:
        changes |= BAD_EXTRA if max(sizes) == 1 else BAD_EXTRA | BAD_EXTRA_VECTORS
    names = {f"{when}: {case}": change for case, change in changes.items()}
    return {client: change(client_update(client, GOOD, template(name))) for client, change in names.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_replies_are_quarantined_and_leave_no_trace(strategy: str) -> None:
    good = good_replies(strategy)
    # Before and after there is a median to compare with.
    early, late = bad_replies(strategy, "early"), bad_replies(strategy, "late")
    left, quarantined = aggregated(strategy, [*early.items(), *good[:6], *late.items(), *good[6:]])
    assert quarantined.keys() == early.keys() | late.keys()
    for reason in quarantined.values():
        assert reason.isprintable()
        assert 10 < len(reason) <= 300
    assert (left, {}) == aggregated(strategy, good)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_only_looks_odd_counts_like_any_other(strategy: str) -> None:
    """Tensors in another order, written by other flwr code, beside a record that nobody reads."""
    good = good_replies(strategy)
    content = update_content(client_update("good 03", 3, template(strategy)))
    theirs = {name: Array(t.numpy()) for name, t in reversed(update(content).delta.items())}
    odd = RecordDict({**content, "arrays": ArrayRecord(theirs), "more": ConfigRecord({"a": 1})})
    assert aggregated(strategy, [*good[:3], ("good 03", odd), *good[4:]]) == aggregated(strategy, good)
