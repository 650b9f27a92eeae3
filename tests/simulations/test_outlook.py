"""What is planned is what is measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtrain.data.federated import build
from fedtrain.experiment import load
from fedtrain.records import RoundRecord
from fedtrain.simulations.outlook import Outlook, outlook
from fedtrain.tasks.registry import make_task

pytest.importorskip("sklearn")

BUSY = 'clients.duration={kind="devices", step_seconds=0.5, dropout=0.2, availability={period=90, share=0.5}}'
FIXED = ["fp16", "bf16", "int8", "int4", "qsgd:5", "sign", "topk:0.05", "randk:0.05", "stc:0.02", "powersgd:2"]


def planned(file: Path, *overrides: str) -> Outlook:
    experiment = load(file, overrides)
    data = build(experiment.data, None, file.parent, experiment.seed)
    task = make_task(experiment.task, data.spec, file.parent)
    return outlook(experiment, file.parent, data, data.sizes(), task)


def measured(simulated: Callable[..., Any], file: Path, *overrides: str) -> list[RoundRecord]:
    folder, _ = simulated(file, "out", *overrides)
    lines = (folder / "rounds.jsonl").read_text().splitlines()[1:]
    return [RoundRecord.model_validate_json(line) for line in lines]


@pytest.mark.parametrize(
    "overrides",
    [
        *((f'compression.up=["{stage}"]',) for stage in FIXED),
        ('compression.up=["topk:0.05", "int4"]', 'compression.down=["fp16"]', "evaluation.clients_every=2"),
        (
            'compression.down=["int8"]',
            "compression.down_of=change",
            'compression.up=["bf16"]',
            "compression.up_of=full",
        ),
        ("strategy.name=scaffold", 'compression.up=["powersgd:2"]'),
        ("strategy={name='ditto', mu=0.1}", "personalization.private=['fc2*']", "evaluation.clients_every=1"),
        ("personalization.fine_tune_epochs=1", "clients.sampling=poisson", "clients.quorum=0"),
    ],
)
def test_bytes_are_exact(tiny: Path, simulated: Callable[..., Any], overrides: tuple[str, ...]) -> None:
    plan = planned(tiny, *overrides)
    assert plan.sure == "exact"
    assert [(r.bytes_up, r.bytes_down) for r in measured(simulated, tiny, *overrides)] == list(plan.rounds)
    if "compression" in overrides[0]:
        assert sum(plan.traffic) < sum(plan.plain)


@pytest.mark.parametrize("coder", ["zstd", "deflate"])
def test_bytes_are_bounded_where_an_entropy_coder_ends_the_chain(
    tiny: Path, simulated: Callable[..., Any], coder: str
) -> None:
    overrides = (f'compression.up=["int4", "{coder}"]', f'compression.down=["{coder}"]')
    plan = planned(tiny, *overrides)
    assert plan.sure == "most"
    for record, (up, down) in zip(measured(simulated, tiny, *overrides), plan.rounds):
        assert 0.3 * up < record.bytes_up <= up
        assert 0.5 * down < record.bytes_down <= down


@pytest.mark.parametrize(
    "overrides",
    [
        ("clients.over_selection=1.6", "clients.deadline=9", "clients.late=partial", "clients.quorum=0"),
        ("clients={}", "strategy={name='fedbuff', buffer_size=2, max_in_flight=3}", "clients.quorum=0"),
    ],
)
def test_the_clock_is_as_forecast(tiny: Path, simulated: Callable[..., Any], overrides: tuple[str, ...]) -> None:
    overrides = (*overrides, BUSY) if "clients={}" not in overrides else (overrides[0], BUSY, *overrides[1:])
    overrides = (*overrides, "rounds=8", "evaluation.central_every=0", 'compression.up=["int8"]')
    found = planned(tiny, *overrides)
    records = measured(simulated, tiny, *overrides)
    assert found.forecast
    assert [r.virtual_seconds for r in records] == found.forecast.seconds.tolist()
    assert [r.client_seconds for r in records] == found.forecast.client_seconds.tolist()
    assert [r.wasted_seconds for r in records] == found.forecast.wasted_seconds.tolist()
    assert np.all(found.forecast.client_seconds > 0)
    assert sum(len(r.participants) for r in records) == found.forecast.updates.sum() > 0
    assert any(r.late for r in records)
    assert [(r.bytes_up, r.bytes_down) for r in records] == list(found.rounds)


def test_a_run_ends_before_its_byte_budget(tiny: Path, simulated: Callable[..., Any]) -> None:
    plan = planned(tiny)
    each = [sum(one) for one in plan.rounds]
    records = measured(simulated, tiny, f"compression.max_bytes={each[0] + each[1]}")
    assert len(records) == 2
    assert sum(r.bytes_up + r.bytes_down for r in records) == each[0] + each[1]
