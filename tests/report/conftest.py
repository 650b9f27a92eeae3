"""Fake runs that look like real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtrain.experiment.sections import Experiment
from fedtrain.records import DataSummary, Heterogeneity, Manifest, PrivacySummary, RoundRecord
from fedtrain.report.view import RunView

EXPERIMENT_TEXT = """\
name = "digits-noniid"
seed = 7
rounds = 40

[task]
name = "mlp"

[data]
name = "digits"
clients = 20
partition = { kind = "dirichlet", alpha = 0.3 }
"""


def _experiment(**changes: Any) -> Experiment:
    sections: dict[str, Any] = {
        "name": "digits-noniid",
        "seed": 7,
        "rounds": 40,
        "task": {"name": "mlp"},
        "data": {"name": "digits", "clients": 20, "partition": {"kind": "dirichlet", "alpha": 0.3}},
        "clients": {"per_round": 10},
        "evaluation": {"target_metric": "accuracy", "target_value": 0.85},
    }
    return Experiment.model_validate(sections | changes)


def _manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "fedtrain": "0.1.0",
        "experiment_hash": "5f" * 32,
        "created_at": "2026-03-01T12:00:00Z",
        "status": "complete",
        "seed": 7,
        "threads": 1,
        "device": "cpu",
        "workers": 2,
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "hardware": {"platform": "Linux x86_64", "cores": "2"},
        "data_fingerprint": "ab" * 32,
        "parameters": 55_210,
    }
    return Manifest.model_validate(values | changes)


def _data(clients: int = 20, shown: int = 20) -> DataSummary:
    rng = np.random.default_rng(1)
    sizes = rng.integers(30, 200, shown)
    counts = [rng.multinomial(n, rng.dirichlet(np.full(10, 0.3))).tolist() for n in sizes]
    return DataSummary(
        source="digits",
        target="class",
        num_clients=clients,
        num_examples=1438,
        num_central_test=359,
        smallest_client=int(sizes.min()),
        median_client=float(np.median(sizes)),
        largest_client=int(sizes.max()),
        label_names=[str(digit) for digit in range(10)],
        shown_clients=[f"client-{i:02d}" for i in range(shown)],
        label_counts=counts,
        shown_sizes=sizes.tolist(),
        heterogeneity=Heterogeneity(
            l1=1.08, hellinger=0.49, jensen_shannon=0.31, labels_per_client=3.1, size_gini=0.34
        ),
    )


def _records(rounds: int = 40, clients: int = 20) -> list[RoundRecord]:
    """Accuracy from .1 to about .9; the clients' own examples in the last round."""
    rng = np.random.default_rng(2)
    names = [f"client-{i:02d}" for i in range(clients)]
    records = []
    for n in range(rounds + 1):
        accuracy = 0.9 - 0.8 * float(np.exp(-n / 9)) + (0.012 * float(rng.standard_normal()) if n else 0)
        loss = 2.4 * float(np.exp(-n / 11)) + 0.3
        per_client: dict[str, dict[str, float]] = {}
        if n == rounds:
            for i, name in enumerate(names):
                own = float(np.clip(accuracy - 0.25 * (i / clients) ** 3 + 0.04 * rng.standard_normal(), 0, 1))
                size = float(rng.integers(6, 40))
                per_client[name] = {"accuracy": own, "loss": 1.4 * (1 - own), "num_examples": size}
        held_out = {"accuracy": accuracy - 0.02, "loss": loss * 1.05}
        records.append(
            RoundRecord(
                round_number=n,
                participants=names[:10] if n else [],
                num_examples=700 if n else 0,
                train={"loss": loss * 0.6, "accuracy": min(accuracy + 0.05, 1)} if n else {},
                central={"loss": loss, "accuracy": accuracy},
                clients=held_out if n == rounds or n % 5 == 0 else {},
                per_client=per_client,
                bytes_up=2_211_000 if n else 0,
                bytes_down=2_209_500 if n else 0,
                update_norm=1.5 * float(np.exp(-n / 20)) if n else 0,
                seconds_train=0.41 if n else 0,
                seconds_evaluate=0.06,
                finished_at=f"2026-03-01T12:{n // 60 % 60:02d}:{n % 60:02d}Z",
            )
        )
    return records


def _run(**changes: Any) -> RunView:
    run = RunView(_experiment(), EXPERIMENT_TEXT, _manifest(), _records(), _data(), None)
    return replace(run, **changes)


def _promise(**changes: Any) -> PrivacySummary:
    values: dict[str, Any] = {
        "unit": "sample",
        "relation": "add/remove one",
        "delta": 1e-5,
        "accountant": "prv",
        "sampling": "Poisson",
        "planned_epsilon": 8.0,
        "noise_multiplier": (0.83, 1.42),
        "sample_rate": (0.125, 0.5),
        "steps": (3, 24),
        "participations": 22,
        "clipping": "each example's gradient to L2 norm 1 (fast)",
        "seeded": False,
        "ledgers": "ledgers",
    }
    return PrivacySummary.model_validate(values | changes)


def _private_run(promise: dict[str, Any] | None = None, rounds: int = 40, **changes: Any) -> RunView:
    """Each round but the first evaluation adds 0.195 to epsilon."""
    told = {"train": {}, "num_examples": 0, "clients": {}, "per_client": {}}
    records = [record.model_copy(update=told | {"epsilon": 0.195 * record.round_number}) for record in _records(rounds)]
    return _run(**{"records": records, "privacy": _promise(**promise or {})} | changes)


def _whole_run(rounds: int = 12) -> RunView:
    """A run with a clock, bytes by client, drift, and an evaluation on the clients' examples every third round.

    The more a client's labels differ, by its place in the list, the further its updates point away; client-19 is
    always late, client-18 is quarantined once.
    """
    data = _data()
    names, counts = data.shown_clients, [[60 - 2 * i, 2 * i + i % 3] for i in range(20)]
    data = data.model_copy(
        update={"label_names": ["0", "1"], "label_counts": counts, "num_examples": sum(map(sum, counts))}
    )
    data = data.model_copy(update={"shown_sizes": [sum(row) for row in counts]})
    records = [RoundRecord(round_number=0, central={"accuracy": 0.1, "loss": 2.3})]
    for n in range(1, rounds + 1):
        used = names[:9] if n % 2 else names[9:18]
        accuracy = 0.95 - 0.8 / n
        own = {name: {"accuracy": accuracy - 0.02 * (i % 5), "num_examples": 10.0} for i, name in enumerate(names)}
        records.append(
            RoundRecord(
                round_number=n,
                participants=used,
                late=names[19:],
                quarantined={names[18]: "norm"} if n == 2 else {},
                central={"accuracy": accuracy, "loss": 1 / n},
                clients={"accuracy": accuracy} if n % 3 == 0 else {},
                per_client=own if n % 3 == 0 else {},
                client_bytes=dict.fromkeys(used, (100, 1000)) | {names[19]: (0, 1000)},
                bytes_up=900,
                bytes_down=10_000,
                drift={name: (0.9 - 0.04 * names.index(name), 1 + 0.1 * names.index(name)) for name in used},
                diversity=0.25,
                virtual_seconds=10.0 + n,
                client_seconds=100.0,
                wasted_seconds=20.0,
            )
        )
    return _run(records=records, data=data)


@pytest.fixture(scope="session")
def whole_run() -> RunView:
    return _whole_run()


@pytest.fixture(scope="session")
def make_experiment() -> Callable[..., Experiment]:
    return _experiment


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    return _manifest


@pytest.fixture(scope="session")
def make_data() -> Callable[..., DataSummary]:
    return _data


@pytest.fixture(scope="session")
def make_records() -> Callable[..., list[RoundRecord]]:
    return _records


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunView]:
    """Any field of RunView may be given in place of the fake one."""
    return _run


@pytest.fixture(scope="session")
def make_private_run() -> Callable[..., RunView]:
    """`promise` holds fields of PrivacySummary, all others are those of RunView."""
    return _private_run


@pytest.fixture(scope="session")
def hostile_run() -> RunView:
    """Clients, labels and metrics with names made to break the page; values that are not numbers."""
    script, math_text, metric = "<script>alert(1)</script>", "$\\bad{$ \u4f60\u597d", 'a"&<b>$x$\x1b[31m'
    data = _data()
    names = [script, math_text, *data.shown_clients[2:]]
    sizes = [math.nan, math.inf, -30.0, *[7.0] * 18]
    records = []
    for record in _records():
        n = record.round_number
        scores = [values["accuracy"] for values in record.per_client.values()]
        own = {"=cmd()": 0.5} | dict(zip(names, [*scores[:2], math.nan, math.inf, 1e300, *scores[5:]]))
        changes = {
            "central": {"loss": [1e300, math.nan, -math.inf][n % 3], metric: math.nan if n > 30 else 0.01 * n},
            "train": {"loss": math.nan} if n else {},
            "quarantined": {script: "delta has NaN in <b>layer</b>", "\x1b[2J": "norm"} if n == 5 else {},
            "clients": {},
            "per_client": {
                name: {metric: value, "num_examples": size} for (name, value), size in zip(own.items(), sizes) if scores
            },
        }
        records.append(record.model_copy(update=changes))
    labels = [script, "</svg>", *data.label_names[2:]]
    data = data.model_copy(update={"shown_clients": names, "label_names": labels, "source": script})
    return _run(
        experiment=_experiment(evaluation={}),
        experiment_text=f'name = "{script}"',
        manifest=_manifest(status="failed"),
        records=records,
        data=data,
    )
