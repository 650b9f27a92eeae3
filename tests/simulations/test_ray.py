import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message

from fedtrain import flower, wire
from fedtrain.client.app import Site, make_client_app
from fedtrain.client.state import ClientState
from fedtrain.data.federated import PartitionedData, build
from fedtrain.errors import InputError, MissingExtraError, RunError, TaskError
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params, exchanged, snapshot
from fedtrain.simulations import ray as ours
from fedtrain.simulations.grid import Engine, InProcess, SimulationGrid
from fedtrain.simulations.ray import RayEngine, RayResources
from fedtrain.simulations.run import Setup
from fedtrain.tasks.registry import make_task
from fedtrain.training.loop import build_model

pytest.importorskip("sklearn")
ray = pytest.importorskip("ray")
COUNT = 6
EXPERIMENT = Experiment.model_validate(
    {
        "task": {"name": "mlp", "options": {"hidden": [8]}},
        "data": {"name": "digits", "clients": COUNT, "partition": {"kind": "dirichlet", "alpha": 0.5}, "test": 0.2},
        "run": {"threads": 2},
    }
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> PartitionedData:
    return build(EXPERIMENT.data, None, Path(), EXPERIMENT.seed)


@pytest.fixture(scope="module")
def params(data: PartitionedData) -> Params:
    return snapshot(exchanged(build_model(make_task(EXPERIMENT.task, data.spec, Path()), EXPERIMENT.seed)))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(Path(), ClientState(tmp_path_factory.mktemp("clients")), CPU)  # FedAvg keeps nothing


@pytest.fixture(scope="module")
def engine(data: PartitionedData, site: Site) -> Iterator[RayEngine]:
    handler = signal.getsignal(signal.SIGTERM)
    with RayEngine(RayResources(), Setup(EXPERIMENT, data, site, 0)) as engine:
        assert signal.getsignal(signal.SIGTERM) == handler
        yield engine
    assert not ray.is_initialized()


def asking(params: Params, kind: str = "train") -> list[Message]:
    record = flower.array_record(params)
    return [Message(wire.instruction_content(record, 1), node + 1, kind) for node in range(COUNT)]


def two_rounds(engine: Engine, params: Params) -> tuple[Params, list[wire.Measurement]]:
    """Two rounds of federated averaging over an engine, and what each client then measures."""
    grid = SimulationGrid(engine, COUNT)

    def replies(kind: str) -> Iterator[Message]:
        return wire.in_order(grid.send_and_receive(asking(params, kind)), grid.get_node_ids())

    for _ in range(2):
        deltas = [wire.update(reply.content).delta for reply in replies("train")]
        params = {name: t + sum(delta[name] for delta in deltas) / COUNT for name, t in params.items()}
    return params, [wire.measurement(reply.content) for reply in replies("evaluate")]


def test_training_is_that_of_one_process_bit_for_bit(
    engine: RayEngine, data: PartitionedData, site: Site, params: Params
) -> None:
    app = make_client_app(EXPERIMENT, make_task(EXPERIMENT.task, data.spec, Path()), data, site)
    mine, my_measurements = two_rounds(InProcess(app, data.client_ids()), params)
    theirs, their_measurements = two_rounds(engine, params)
    assert my_measurements == their_measurements
    assert len(my_measurements) == COUNT
    assert all(torch.equal(mine[name], theirs[name]) for name in params)
    assert not any(torch.equal(mine[name], params[name]) for name in params)


def test_a_clients_exception_is_an_error_reply(engine: RayEngine, params: Params) -> None:
    asked = asking(params)
    asked[4].content["config"] = ConfigRecord({"server-round": "one"})
    replies = SimulationGrid(engine, COUNT).send_and_receive(asked)
    reasons = {reply.metadata.src_node_id: reply.error.reason for reply in replies if reply.has_error()}
    assert reasons == {5: "'server-round' is wrong: got 'one'; expected an integer"}


def test_an_abandoned_batch_does_not_disturb_the_next(engine: RayEngine, params: Params) -> None:
    grid = SimulationGrid(engine, COUNT)
    abandoned = grid.send_and_receive(asking({name: t + 5 for name, t in params.items()}))
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    asked = asking(params, "evaluate")
    answered = [reply.metadata.reply_to_message_id for reply in grid.send_and_receive(asked)]
    assert sorted(answered) == sorted(message.metadata.message_id for message in asked)


def test_the_largest_clients_go_first(
    engine: RayEngine, data: PartitionedData, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    submit = engine._submit

    def noting(app_fn: Callable[[], object], message: Message) -> object:
        started.append(message.metadata.dst_node_id - 1)
        return submit(app_fn, message)

    monkeypatch.setattr(engine, "_submit", noting)
    list(SimulationGrid(engine, COUNT).send_and_receive(asking(params)))
    assert data.sizes()[started].tolist() == sorted(data.sizes().tolist(), reverse=True)


def run_in_an_actor(engine: RayEngine, function: Callable[[], object]) -> object:
    return engine._fetch(engine._submit(lambda: lambda **_: function(), None))


def test_actors_have_the_threads_of_the_run(engine: RayEngine) -> None:
    assert run_in_an_actor(engine, torch.get_num_threads) == EXPERIMENT.run.threads


def test_data_lie_in_memory_that_all_actors_share(engine: RayEngine, data: PartitionedData) -> None:
    one, other = ray.get(engine._setup).data, ray.get(engine._setup).data
    assert torch.equal(one.dataset.inputs, data.dataset.inputs)
    assert one.dataset.inputs.data_ptr() == other.dataset.inputs.data_ptr()
    assert one.partition.indices.ctypes.data == other.partition.indices.ctypes.data


def test_an_actor_that_cannot_build_the_app_says_why(engine: RayEngine, data: PartitionedData, site: Site) -> None:
    elsewhere = EXPERIMENT.model_copy(update={"task": EXPERIMENT.task.model_copy(update={"name": "no_such:Task"})})
    fault = engine._fetch(engine._submit(partial(ours._preparing, ray.put(Setup(elsewhere, data, site, 0))), None))
    assert isinstance(fault, TaskError)
    assert "no_such" in str(fault)


def test_more_than_a_machine_has_is_refused(engine: RayEngine) -> None:
    with pytest.raises(
        InputError, match=r"no machine of Ray has room for one client: got 100000 cores and .* has: \d+ cores"
    ):
        ours._pool(ray, RayResources(num_cpus=100_000), most=1)


@pytest.mark.parametrize(("cores", "gpus"), [(0, 0), (float("nan"), 0), (1, -1)])
def test_what_no_client_can_have_is_refused(cores: float, gpus: float) -> None:
    with pytest.raises(InputError, match="more than 0 cores"):
        RayResources(cores, gpus)


def test_a_gpu_that_clients_are_not_given_is_refused(data: PartitionedData, site: Site) -> None:
    with pytest.raises(InputError, match=r"device cuda and 0 GPUs per client.*run.device=cpu"):
        RayEngine(RayResources(), Setup(EXPERIMENT, data, replace(site, device=torch.device("cuda")), 0))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, data: PartitionedData, site: Site) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"--engine ray needs .* 'fedtrain\[ray\]'"):
        RayEngine(RayResources(), Setup(EXPERIMENT, data, site, 0))


def test_an_actor_that_dies_ends_the_run_resumably(engine: RayEngine, params: Params) -> None:
    """The last test of this module: it kills an actor."""
    os.kill(int(str(run_in_an_actor(engine, os.getpid))), signal.SIGKILL)
    with pytest.raises(RunError, match=r"an actor of Ray died: .*the same command resumes"):
        list(SimulationGrid(engine, COUNT).send_and_receive(asking(params)))
