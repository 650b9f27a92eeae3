import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedtrain import flower, wire
from fedtrain.client.app import Site, make_client_app
from fedtrain.client.state import ClientState
from fedtrain.data.federated import PartitionedData, build
from fedtrain.errors import RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params, exchanged, snapshot
from fedtrain.rundir import RunFolder
from fedtrain.server.measuring import CentralTest
from fedtrain.simulations import workers
from fedtrain.simulations.grid import InProcess, SimulationGrid
from fedtrain.simulations.shared import Arena
from fedtrain.simulations.workers import WorkerPool, Workers
from fedtrain.tasks.registry import make_task
from fedtrain.training.loop import build_model

pytest.importorskip("sklearn")
EXPERIMENT = Experiment.model_validate(
    {
        "task": {"name": "mlp", "options": {"hidden": [8]}},
        "data": {
            "name": "digits",
            "clients": 20,
            "partition": {"kind": "dirichlet", "alpha": 0.5},
            "test": 0.2,
        },
    }
)
COUNT = 20
SITE = Site(Path(), ClientState(Path("clients")), torch.device("cpu"))  # FedAvg keeps nothing


@dataclass
class Setting:
    """The same clients in this process and in two workers."""

    data: PartitionedData
    params: Params
    here: SimulationGrid
    engine: Workers

    @property
    def there(self) -> SimulationGrid:
        return SimulationGrid(self.engine, COUNT)


@pytest.fixture(scope="module")
def data() -> PartitionedData:
    return build(EXPERIMENT.data, None, Path(), EXPERIMENT.seed)


@pytest.fixture(scope="module")
def setting(data: PartitionedData) -> Iterator[Setting]:
    pool = WorkerPool(2, threads=1)
    try:
        task = make_task(EXPERIMENT.task, data.spec, Path())
        app = make_client_app(EXPERIMENT, task, data, SITE)
        params = snapshot(exchanged(build_model(task, EXPERIMENT.seed)))
        engine = Workers(pool, (EXPERIMENT, data, SITE), Arena.size_for(params))
        yield Setting(data, params, SimulationGrid(InProcess(app, data.client_ids()), COUNT), engine)
    finally:
        pool.close()


def asking(kind: str, records: ArrayRecord | list[ArrayRecord]) -> list[Message]:
    """One message to each client; with one shared record, or one for each."""
    each = records if isinstance(records, list) else [records] * COUNT
    return [Message(wire.instruction_content(record, 1), node + 1, kind) for node, record in enumerate(each)]


def by_node(replies: Iterable[Message]) -> dict[int, RecordDict]:
    return {reply.metadata.src_node_id: reply.content for reply in replies}


def assert_equal(one: dict[int, RecordDict], other: dict[int, RecordDict]) -> None:
    assert one.keys() == other.keys()
    for node, content in one.items():
        assert content.config_records == other[node].config_records
        assert content.metric_records == other[node].metric_records
        assert content.array_records.keys() == other[node].array_records.keys()
        for key, record in content.array_records.items():
            mine, theirs = flower.tensors(record), flower.tensors(other[node].array_records[key])
            assert list(mine) == list(theirs)
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_replies_are_those_of_one_process_tensor_for_tensor(setting: Setting, kind: str) -> None:
    # Collected first: what was yielded must not change when its shared memory is written again.
    replies = list(setting.there.send_and_receive(asking(kind, flower.array_record(setting.params))))
    here = setting.here.send_and_receive(asking(kind, flower.array_record(setting.params)))
    assert_equal(by_node(replies), by_node(here))


def test_arrays_that_do_not_fit_the_arena_travel_loose(setting: Setting) -> None:
    def records() -> list[ArrayRecord]:
        return [flower.array_record({n: t + node for n, t in setting.params.items()}) for node in range(COUNT)]

    assert_equal(
        by_node(setting.there.send_and_receive(asking("train", records()))),
        by_node(setting.here.send_and_receive(asking("train", records()))),
    )


def test_an_abandoned_batch_does_not_disturb_the_next(setting: Setting) -> None:
    grid = setting.there
    far = flower.array_record({name: t + 5 for name, t in setting.params.items()})
    abandoned = iter(grid.send_and_receive(asking("train", far)))
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    replies = list(grid.send_and_receive(asking("train", flower.array_record(setting.params))))
    assert len(replies) == COUNT
    here = setting.here.send_and_receive(asking("train", flower.array_record(setting.params)))
    assert_equal(by_node(replies), by_node(here))


def test_a_clients_exception_is_an_error_reply(setting: Setting) -> None:
    def asked() -> list[Message]:
        messages = asking("train", flower.array_record(setting.params))
        messages[4].content["config"] = ConfigRecord({"server-round": "one"})
        return messages

    there, here = (
        {r.metadata.src_node_id: r.error.reason for r in grid.send_and_receive(asked()) if r.has_error()}
        for grid in (setting.there, setting.here)
    )
    assert there == here == {5: "'server-round' is wrong: got 'one'; expected an integer"}


def sent(setting: Setting, window: int) -> list[int]:
    """Positions of the clients in the order in which they were sent to the workers."""
    positions: list[int] = []
    send = Workers._send

    def noting(engine: Workers, to: Any, parcel: Any) -> None:
        positions.append(parcel.message.metadata.dst_node_id - 1)
        send(engine, to, parcel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_WINDOW", window // 2)  # for each of two workers
        patch.setattr(Workers, "_send", noting)
        asked = asking("evaluate", flower.array_record(setting.params))
        assert len(list(setting.there.send_and_receive(asked))) == COUNT
    return positions


def test_the_largest_clients_go_first(setting: Setting) -> None:
    sizes = setting.data.sizes()
    assert sizes[sent(setting, window=COUNT)].tolist() == sorted(sizes.tolist(), reverse=True)


def test_no_client_goes_far_ahead_of_the_oldest_unfinished_one(setting: Setting) -> None:
    order, sizes = sent(setting, window=2), setting.data.sizes()
    assert sorted(order) == list(range(COUNT))
    assert sizes[order[0]] == sizes[:2].max()
    assert all(set(range(position - 1)) <= set(order[:turn]) for turn, position in enumerate(order))


def test_a_worker_that_was_killed_while_idle_is_named(data: PartitionedData, setting: Setting) -> None:
    others = set(multiprocessing.active_children())
    pool = WorkerPool(1, threads=1)
    try:
        engine = Workers(pool, (EXPERIMENT, data, SITE), Arena.size_for(setting.params))
        (worker,) = set(multiprocessing.active_children()) - others
        worker.kill()
        worker.join()
        asked = asking("train", flower.array_record(setting.params))
        with pytest.raises(RunError, match=r"a worker process died: got exit code -9.*the same command resumes"):
            list(SimulationGrid(engine, COUNT).send_and_receive(asked))
    finally:
        pool.close()


MEASURED = Experiment.model_validate(
    {
        **EXPERIMENT.model_dump(),
        "evaluation": {
            "batch_size": 50,
            "metrics": ["auroc", "calibration-error", "perplexity"],
            "attack": {"name": "pgd", "epsilon": 0.3, "steps": 2},
        },
    }
)


@dataclass
class Central:
    """The central test set, measured in this process and by two workers."""

    alone: CentralTest
    spread: CentralTest
    engine: Workers


@pytest.fixture
def central(setting: Setting) -> Iterator[Central]:
    task, examples = make_task(MEASURED.task, setting.data.spec, Path()), setting.data.central_test()
    alone, spread = (CentralTest(MEASURED, task, setting.data, SITE.device, examples) for _ in range(2))
    pool = WorkerPool(2, threads=1)
    try:
        engine = Workers(pool, (MEASURED, setting.data, SITE), Arena.size_for(setting.params), spread)
        yield Central(alone, spread, engine)
    finally:
        pool.close()


def test_workers_measure_the_central_test_alike(setting: Setting, central: Central) -> None:
    """To the last bit, although they share its batches, and the attack draws for each of them."""
    found = []
    for params in (setting.params, {name: t * 2 for name, t in setting.params.items()}, setting.params):
        with mock.patch.object(central.spread, "part", side_effect=AssertionError("the main process measures nothing")):
            found.append(central.spread.measure(params))
        assert found[-1] == central.alone.measure(params)
    assert found[0] == found[2] != found[1]
    assert {"loss", "auroc", "perplexity", "adversarial-accuracy"} < {*found[0]}


def test_what_nobody_reads_any_more_is_passed_over(setting: Setting, central: Central) -> None:
    other = {name: t * 2 for name, t in setting.params.items()}
    asked = asking("train", flower.array_record(setting.params))
    for _ in range(3):  # answers to the first are under way when the second asks
        next(iter(central.engine.measure(other, range(0, 300, 50))))
        assert central.spread.measure(setting.params) == central.alone.measure(setting.params)
        next(iter(central.engine.measure(other, range(0, 300, 50))))
        assert len(list(SimulationGrid(central.engine, COUNT).send_and_receive(asked))) == COUNT
        next(iter(SimulationGrid(central.engine, COUNT).send_and_receive(asked)))
        assert central.spread.measure(setting.params) == central.alone.measure(setting.params)


def test_a_simulation_leaves_measuring_to_its_workers(
    tiny: Path, simulated: Callable[..., tuple[Path, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("rounds=1", "evaluation.batch_size=50")
    alone, _ = simulated(tiny, "alone", *small, "run.workers=0")
    monkeypatch.setattr(CentralTest, "part", mock.Mock(side_effect=AssertionError("not in this process")))
    spread, _ = simulated(tiny, "spread", *small, "run.workers=1")
    assert [r.central for r in RunFolder(spread).read_rounds()] == [r.central for r in RunFolder(alone).read_rounds()]


def test_a_task_that_fails_on_the_central_test_ends_the_run(setting: Setting, tmp_path: Path) -> None:
    code = """
from torch import nn
from fedtrain.tasks import Classification

class Odd(Classification):
    def __init__(self, spec):
        pass

    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def loss(self, outputs, targets):
        return 1 // 0
"""
    (tmp_path / "odd.py").write_text(code)
    experiment = MEASURED.model_copy(
        update={"task": MEASURED.task.model_copy(update={"name": "odd.py:Odd", "options": {}})}
    )
    site = Site(tmp_path, SITE.states, SITE.device)
    task = make_task(experiment.task, setting.data.spec, tmp_path)
    central = CentralTest(experiment, task, setting.data, SITE.device, setting.data.central_test())
    pool = WorkerPool(1, threads=1)
    try:
        params = snapshot(exchanged(build_model(task, 1)))
        Workers(pool, (experiment, setting.data, site), Arena.size_for(params), central)
        for _ in range(3):  # a place in the queue that is not given back would be missed
            with pytest.raises(RunError, match=r"evaluating on the central test set .*odd\.py"):
                central.measure(params)
    finally:
        pool.close()
