from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor, nn

from fedtrain import flower, wire
from fedtrain.data.base import Examples
from fedtrain.experiment.optimizers import SgdSection
from fedtrain.experiment.strategies import FedAdamStrategy, FedDynStrategy, ScaffoldStrategy
from fedtrain.experiment.training import TrainingSection
from fedtrain.params import Params, exchanged, snapshot
from fedtrain.simulations.grid import InProcess, SimulationGrid
from fedtrain.strategies.adapter import AlgorithmRunner, FlowerStrategy
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.feddyn import feddyn
from fedtrain.strategies.fednova import fednova
from fedtrain.strategies.fedopt import fedadam
from fedtrain.strategies.scaffold import scaffold
from fedtrain.tasks.base import Metric
from fedtrain.training.loop import Assignment, LocalResult, Recipe, Trainer

GLOBAL = {"w": torch.tensor([1.0, 10.0])}


def ask(round_number: int, node_ids: Sequence[int]) -> Sequence[int]:
    """Two of the nodes, others in each round."""
    return [node_ids[round_number], node_ids[0]]


@pytest.fixture
def grid() -> SimulationGrid:
    from flwr.clientapp import ClientApp

    return SimulationGrid(InProcess(ClientApp(), []), num_clients=5)


def strategy(algorithm: Algorithm | None = None) -> FlowerStrategy:
    return FlowerStrategy(algorithm or fedavg().algorithm, GLOBAL, ask, lambda _, node_ids: node_ids[:1])


def configured(of: FlowerStrategy, grid: SimulationGrid, arrays: ArrayRecord | None = None) -> list[Message]:
    return list(of.configure_train(2, arrays or flower.array_record(GLOBAL), ConfigRecord(), grid))


def reply(to: Message, delta: float, num_examples: int, loss: float) -> Message:
    update = wire.Update("a", 2, {"w": torch.full((2,), delta)}, num_examples, {"loss": loss})
    return Message(wire.update_content(update), reply_to=to)


def test_the_selected_nodes_are_instructed_in_the_selectors_order(grid: SimulationGrid) -> None:
    arrays = flower.array_record(GLOBAL)
    messages = configured(strategy(), grid, arrays)
    assert [m.metadata.dst_node_id for m in messages] == [3, 1]
    assert {(m.metadata.message_type, m.metadata.group_id) for m in messages} == {("train", "2")}
    assert {wire.instruction(m).round_number for m in messages} == {2}
    assert messages[0].content is not messages[1].content
    assert all(m.content["arrays"] is arrays for m in messages)


def test_evaluation_asks_its_own_nodes(grid: SimulationGrid) -> None:
    messages = strategy().configure_evaluate(4, flower.array_record(GLOBAL), ConfigRecord(), grid)
    assert [(m.metadata.dst_node_id, m.metadata.message_type) for m in messages] == [(1, "evaluate")]


def test_updates_are_averaged_onto_the_parameters_that_were_sent(grid: SimulationGrid) -> None:
    fedavg_ = strategy()
    first, second = configured(fedavg_, grid, flower.array_record({"w": torch.tensor([100.0, 200.0])}))
    arrays, metrics = fedavg_.aggregate_train(2, [reply(first, 1.0, 1, loss=0.5), reply(second, 5.0, 3, loss=0.9)])
    assert arrays is not None
    assert flower.tensors(arrays)["w"].tolist() == [104.0, 204.0]  # (1*1 + 3*5) / 4 more
    assert metrics == {"loss": pytest.approx(0.8)}  # (1*0.5 + 3*0.9) / 4


def test_no_update_leaves_the_model(grid: SimulationGrid) -> None:
    fedavg_ = strategy()
    configured(fedavg_, grid)
    arrays, metrics = fedavg_.aggregate_train(2, [])
    assert arrays is not None
    assert flower.tensors(arrays)["w"].tolist() == GLOBAL["w"].tolist()
    assert metrics == {}


def test_state_goes_from_round_to_round_and_updates_stream(grid: SimulationGrid) -> None:
    log: list[str] = []

    def apply(state: State, params: Params, updates: Iterable[wire.Update]) -> tuple[Params, State]:
        log.extend(f"used {update.num_examples}" for update in updates)
        return params, {"rounds": state["rounds"] + 1}

    counting = strategy(Algorithm(lambda _: {"rounds": 0}, apply))
    to, _ = configured(counting, grid)

    def arriving() -> Iterable[Message]:
        for count in (1, 2):
            log.append(f"came {count}")
            yield reply(to, 0.0, count, 0.0)

    counting.aggregate_train(1, arriving())
    assert log == ["came 1", "used 1", "came 2", "used 2"]  # never two models at once
    counting.aggregate_train(2, [])
    assert counting.state == {"rounds": 2}


def test_measurements_are_averaged_by_examples(grid: SimulationGrid) -> None:
    to, _ = configured(strategy(), grid)
    measured = [wire.Measurement("a", 1, {"accuracy": 1.0}), wire.Measurement("b", 3, {"accuracy": 0.0})]
    replies = [Message(wire.measurement_content(value), reply_to=to) for value in measured]
    assert strategy().aggregate_evaluate(2, replies) == {"accuracy": 0.25}
    assert strategy().aggregate_evaluate(2, []) == {}


PARAMS = {"mean": torch.tensor([1.0]), "w": torch.tensor([-0.0]), "var": torch.tensor([-0.0])}
BUFFERS = ("var", "mean")


def content(params: Params) -> list[tuple[str, bytes]]:
    return [(name, t.numpy().tobytes()) for name, t in params.items()]


@pytest.mark.parametrize(("takes_buffers", "names"), [(False, ["w"]), (True, ["mean", "w", "var"])])
def test_buffers_are_for_algorithms_that_take_them(takes_buffers: bool, names: list[str]) -> None:
    given: list[list[str]] = []

    def note(params: Params) -> Params:
        given.append(list(params))
        return params

    def apply(state: State, params: Params, updates: Iterable[wire.Update]) -> tuple[Params, State]:
        note(params)
        for update in updates:
            note(update.delta)
        return dict(reversed(params.items())), state

    def objection(update: wire.Update) -> None:
        note(update.delta)

    algorithm = Algorithm(note, apply, extra=note, objection=objection, takes_buffers=takes_buffers)
    runner = AlgorithmRunner(algorithm, PARAMS, BUFFERS)
    update = wire.Update("a", 1, PARAMS, 1)
    runner.extra(PARAMS)
    runner.objection(update)
    new = runner.aggregate(1, PARAMS, [update])
    assert given == [names] * 5
    assert list(new) == list(PARAMS)
    assert float(new["mean"]) == (1.0 if takes_buffers else 2.0)


def test_no_update_leaves_every_byte() -> None:
    runner = AlgorithmRunner(fedavg().algorithm, PARAMS, BUFFERS)
    assert content(runner.aggregate(1, PARAMS, iter(()))) == content(PARAMS)


def variances(algorithm: Algorithm) -> list[float]:
    """A running variance over rounds in which clients of 3 and 1 examples measure 0.01 and 0.05: 0.02 in the mean."""
    params: Params = {"var": torch.tensor(1.0), "w": torch.tensor(1.0)}
    runner = AlgorithmRunner(algorithm, params, ["var"])
    seen = []
    for number in range(1, 21):
        updates = [
            wire.Update("a", number, {"var": 0.01 - params["var"], "w": torch.tensor(1.0)}, 3),
            wire.Update("b", number, {"var": 0.05 - params["var"], "w": torch.tensor(1.0)}, 1),
        ]
        params = runner.aggregate(number, params, updates)
        seen.append(float(params["var"]))
    return seen


def test_a_variance_is_averaged_and_not_stepped_along() -> None:
    algorithm = fedadam(FedAdamStrategy(name="fedadam", server_lr=0.1)).algorithm
    assert variances(algorithm) == pytest.approx([0.02] * 20)
    assert min(variances(algorithm._replace(takes_buffers=True))) < 0


class Normed:
    """A regression by a network with BatchNorm."""

    channels_last = False

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs.flatten(), targets, reduction="none")

    def metrics(self) -> Mapping[str, Metric]:
        return {}


TRAINING = TrainingSection(local_epochs=2, batch_size=4, optimizer=SgdSection(lr=0.1))
TRAINED = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
RUNNING = ["1.running_mean", "1.running_var"]


@pytest.mark.parametrize(
    ("strategy", "extra"),
    [
        (scaffold(ScaffoldStrategy(name="scaffold"), num_clients=2), TRAINED),
        (fednova(TRAINING), ["normalizer"]),
        (feddyn(FedDynStrategy(name="feddyn", alpha=0.1), num_clients=2), []),
    ],
    ids=["scaffold", "fednova", "feddyn"],
)
def test_batch_norm_through_three_rounds(strategy: FederatedStrategy, extra: list[str]) -> None:
    rng = torch.Generator().manual_seed(1)
    data = {  # of unlike scales, and so unlike variances
        who: Examples(scale * torch.randn(size, 2, generator=rng), torch.randn(size, generator=rng))
        for who, size, scale in (("a", 8, 1.0), ("b", 24, 3.0))
    }
    trainer = Trainer(Normed(), Recipe(TRAINING, strategy.local_rule), 5, torch.device("cpu"))
    params: Params = snapshot(exchanged(trainer.model))
    runner = AlgorithmRunner(strategy.algorithm, params, RUNNING)
    kept: dict[str, Mapping[str, Any]] = {}
    for number in (1, 2, 3):
        results: list[LocalResult] = []
        for who, examples in data.items():
            assignment = Assignment(number, who, params, runner.share(), kept.get(who, {}))
            results.append(trainer.train(assignment, examples))
            kept[who] = results[-1].kept
        updates = [wire.Update("c", number, r.delta, r.num_examples, extra=r.extra) for r in results]
        assert [list(update.extra) for update in updates] == [extra, extra] == [list(runner.extra(params))] * 2
        assert [runner.objection(update) for update in updates] == [None, None]
        new = runner.aggregate(number, params, updates)
        for name in RUNNING:
            mean = (8 * results[0].delta[name] + 24 * results[1].delta[name]) / 32
            torch.testing.assert_close(new[name], params[name] + mean)
        params = new
    assert sorted(params) == sorted(TRAINED + RUNNING)
    assert all(t.isfinite().all() for t in params.values())
    assert (params["1.running_var"] > 0).all()
    assert all(list(tensors) == TRAINED for tensors in runner.state.values())


def test_a_flower_server_may_name_the_buffers_too() -> None:
    algorithm = Algorithm(lambda params: {"names": list(params)}, fedavg().algorithm.apply)
    assert FlowerStrategy(algorithm, PARAMS, ask, ask, buffers=BUFFERS).state == {"names": ["w"]}
