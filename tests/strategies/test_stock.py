# ruff: noqa: NPY002 - flwr's strategies draw on NumPy's global generator
import gc
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flwr_strategies
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)

from fedtrain import flower
from fedtrain.errors import InputError, RunError
from fedtrain.params import Params
from fedtrain.rundir import Checkpoint, RunFolder
from fedtrain.strategies.adapter import RoundStrategy
from fedtrain.strategies.stock import StockStrategy, refuse_unsuitable
from fedtrain.wire import Update

STATELESS = {
    "FedAvg": FedAvg,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.3),
    "Krum": lambda: Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
    "Bulyan": lambda: Bulyan(num_malicious_nodes=1),
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1, q=0.5),
}
STATEFUL = {
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "FedAdagrad": FedAdagrad,
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
}
RUNNING = STATELESS | STATEFUL
REFUSED = [
    "FedProx",
    "FedXgbBagging",
    "FedXgbCyclic",
    "DifferentialPrivacyClientSideAdaptiveClipping",
    "DifferentialPrivacyClientSideFixedClipping",
    "DifferentialPrivacyServerSideAdaptiveClipping",
    "DifferentialPrivacyServerSideFixedClipping",
]
NODES = range(1, 8)  # Bulyan with one malicious client needs seven
PARAMS = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "scale": torch.tensor(1.5), "none": torch.zeros(0)}


@pytest.fixture(autouse=True)
def _in_a_run() -> Iterator[None]:
    flower.enter_run(1)
    gc.freeze()  # flwr's QFedAvg and Bulyan collect garbage for each reply: a second per round among torch's objects
    yield
    gc.unfreeze()


def stock(strategy: Strategy, seed: int = 0) -> StockStrategy:
    return StockStrategy(strategy, seed, str)


def updates(round_number: int, params: Params = PARAMS, nodes: Iterable[int] = NODES) -> Iterator[Update]:
    """Other deltas, weights and losses for each client and round."""
    for node in nodes:
        draw = torch.Generator().manual_seed(100 * round_number + node)
        delta = {name: torch.randn(t.shape, generator=draw).to(t.dtype) for name, t in params.items()}
        yield Update(str(node), round_number, delta, node * 10, {"loss": node / 7})


def run(strategy: StockStrategy, rounds: Iterable[int], params: Params = PARAMS) -> Params:
    for number in rounds:
        assert strategy.configure(number, params, NODES) == list(NODES)
        params = strategy.aggregate(number, params, updates(number))
    return params


def assert_same_bytes(params: Params, others: Params) -> None:
    assert list(params) == list(others)
    for name, t in params.items():
        assert t.dtype == others[name].dtype
        assert torch.equal(t, others[name]), name


class FlwrsGrid(flower.BaseGrid):
    """Hands out nodes as flwr's own would."""

    def get_node_ids(self) -> list[int]:
        return list(NODES)

    def push_messages(self, messages: Any) -> Any: ...
    def pull_messages(self, message_ids: Any) -> Any: ...
    def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any: ...


def driven_by_flwr(strategy: Strategy, rounds: Iterable[int]) -> Params:
    """Three rounds with flwr's own arrays and messages, as `Strategy.start` drives them."""
    arrays = ArrayRecord({name: Array(t.numpy()) for name, t in PARAMS.items()})
    for number in rounds:
        sent = {
            m.metadata.dst_node_id: m for m in strategy.configure_train(number, arrays, ConfigRecord(), FlwrsGrid(1))
        }
        replies = []
        for update in updates(number):
            node = int(update.client_id)
            trained = {
                name: Array(np.asarray(array.numpy() + update.delta[name].numpy())) for name, array in arrays.items()
            }
            metrics = MetricRecord({"num-examples": node * 10, "train_loss": node / 7})
            flower.set_message_id(sent[node], "1")
            replies.append(
                Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics}), reply_to=sent[node])
            )
        aggregated, _ = strategy.aggregate_train(number, replies)
        assert aggregated is not None
        arrays = ArrayRecord({name: Array(np.asarray(a.numpy(), np.float32)) for name, a in aggregated.items()})
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}


@pytest.mark.parametrize("name", RUNNING)
def test_three_rounds_are_those_of_flwr(name: str) -> None:
    result = run(stock(RUNNING[name]()), (1, 2, 3))
    assert not torch.equal(result["w"], PARAMS["w"])
    assert_same_bytes(result, driven_by_flwr(RUNNING[name](), (1, 2, 3)))


def test_the_round_loop_can_drive_it() -> None:
    driven: RoundStrategy = stock(FedAvg())
    assert (driven.share(), driven.extra(PARAMS), driven.objection(next(updates(1)))) == ({}, {}, None)


def test_every_strategy_of_flwr_runs_or_is_refused() -> None:
    assert {*RUNNING, *REFUSED} == set(flwr_strategies.__all__) - {"Strategy", "Result"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_do_something_else_is_refused(name: str) -> None:
    kind = getattr(flwr_strategies, name)
    with pytest.raises(InputError, match=f"flwr's {name} cannot run here: it"):
        refuse_unsuitable(type("Heir", (kind,), {}))


@pytest.mark.parametrize("name", RUNNING)
def test_a_checkpoint_brings_the_state_back_to_the_last_bit(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    first = stock(RUNNING[name]())
    halfway = run(first, (1, 2))
    folder.write_checkpoint(Checkpoint(2, halfway, first.state))
    whole = run(first, (3, 4), halfway)

    read = folder.latest_checkpoint(pytest.fail)
    assert read is not None
    resumed, forgetful = stock(RUNNING[name]()), stock(RUNNING[name]())
    resumed.state = read.state
    assert_same_bytes(run(resumed, (3, 4), read.params), whole)
    assert torch.equal(run(forgetful, (3, 4), read.params)["w"], whole["w"]) == (name in STATELESS)


def test_a_state_is_a_copy() -> None:
    adam = stock(FedAdam())
    params = run(adam, (1,))
    state = adam.state
    before = state["m_t"]["dict"]["values"]["0"]["array"].clone()
    run(adam, (2,), params)
    assert torch.equal(state["m_t"]["dict"]["values"]["0"]["array"], before)


class Keeper(FedAvg):
    """Keeps one of each kind of value."""

    def __init__(self, inner: Strategy | None = None) -> None:
        super().__init__(train_metrics_aggr_fn=lambda _records, _key: MetricRecord())
        self.values = [None, True, 3, 0.1, "text", (1, 2), {7: "by node", "x": [np.float64(0.1)]}]
        self.tensor, self.path, self.inner = torch.tensor([1, 2]), Path("x"), inner
        self.arrays = ArrayRecord({"b": Array(np.float32([0])), "a": Array(np.float32([0]))})


def test_values_of_every_kind_and_wrapped_strategies_round_trip() -> None:
    source, target = Keeper(inner=FedAdam()), Keeper(inner=FedAdam())
    source.values[2], source.tensor = 4, torch.tensor([5, 6])
    source.inner.v_t = {"w": np.float32(0.25)}
    source.arrays = ArrayRecord({"b": Array(np.float32([2])), "a": Array(np.float32([1]))})
    stock(target).state = stock(source).state
    assert target.values == source.values
    assert [type(value) for value in target.values] == [type(value) for value in source.values]
    assert target.values[-1]["x"][0].dtype == np.float64  # a Python float would not promote float32
    assert target.tensor.tolist() == [5, 6]
    assert target.inner.v_t["w"].dtype == np.float32
    assert [(name, array.numpy().tolist()) for name, array in target.arrays.items()] == [("b", [2]), ("a", [1])]


@pytest.mark.parametrize("value", [{1, 2}, np.random.default_rng(0), np.array(["text"]), {(1, 2): 3}, [object()]])
def test_what_no_checkpoint_can_hold_is_refused_at_once(value: object) -> None:
    strategy = FedAvg()
    strategy.memory = value
    with pytest.raises(RunError, match=r"FedAvg\.memory cannot be saved in a checkpoint"):
        stock(strategy)


def test_the_strategy_draws_its_fraction_from_the_seed_and_the_round() -> None:
    half = stock(FedAvg(fraction_train=0.5), seed=3)
    random.seed(1)
    before = random.getstate()
    drawn = [half.configure(number, PARAMS, range(10, 30)) for number in range(1, 6)]
    assert random.getstate() == before
    assert all(len(nodes) == 10 and nodes == sorted(nodes) and set(nodes) <= set(range(10, 30)) for nodes in drawn)
    assert len({tuple(nodes) for nodes in drawn}) == 5
    random.seed(2)
    assert [stock(FedAvg(fraction_train=0.5), seed=3).configure(5, PARAMS, range(10, 30))] == drawn[4:]
    assert stock(FedAvg(fraction_train=0.5), seed=4).configure(5, PARAMS, range(10, 30)) != drawn[4]


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvg(min_available_nodes=8),
        FedAvg(min_train_nodes=8),
        FedAvg(fraction_train=1.2),
        Keeper(FedAvg(min_train_nodes=8)),
    ],
)
def test_it_is_not_left_to_wait_for_nodes_that_never_come(strategy: Strategy) -> None:
    with pytest.raises(
        RunError, match="would wait for more clients than take part in round 1: got 7 clients; expected 8"
    ):
        stock(strategy).configure(1, PARAMS, NODES)


def test_no_node_and_no_update_leave_everything_as_it_is() -> None:
    adam = stock(FedAdam())
    assert adam.configure(1, PARAMS, []) == []
    assert_same_bytes(adam.aggregate(1, PARAMS, iter(())), PARAMS)
    assert adam.state["m_t"] is None


def test_a_strategy_that_declines_leaves_the_model() -> None:
    bulyan = stock(Bulyan(num_malicious_nodes=1))
    bulyan.configure(1, PARAMS, NODES)
    assert_same_bytes(bulyan.aggregate(1, PARAMS, updates(1, nodes=[1, 2])), PARAMS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    params = {name: t.to(dtype) for name, t in PARAMS.items()}
    for build in RUNNING.values():
        strategy = stock(build())
        strategy.configure(1, params, NODES)
        result = strategy.aggregate(1, params, updates(1, params))
        assert {t.dtype for t in result.values()} == {dtype}


class Says(FedAvg):
    """Answers with the given arrays; asks by the given content."""

    def __init__(self, arrays: dict[str, np.ndarray] | None = None, content: RecordDict | None = None) -> None:
        super().__init__()
        self.answer = lambda: arrays
        self.content = lambda: content

    def configure_train(self, server_round: Any, arrays: Any, config: Any, grid: Any) -> Any:
        if self.content() is None:
            return super().configure_train(server_round, arrays, config, grid)
        return [Message(self.content(), node, "train") for node in grid.get_node_ids()]

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return ArrayRecord({name: Array(value) for name, value in self.answer().items()}), None


def said(**arrays: Any) -> Params:
    strategy = stock(Says({name: np.asarray(value) for name, value in arrays.items()}))
    params = {"w": torch.tensor([1.0, 2.0])}
    strategy.configure(1, params, NODES)
    return strategy.aggregate(1, params, updates(1, params))


def test_the_result_gets_the_models_dtype() -> None:
    assert_same_bytes(said(w=[3, 4]), {"w": torch.tensor([3.0, 4.0])})  # int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"v": [1.0, 2.0]}, "Says made a model with other tensors: got without w; with v"),
        ({"w": [1.0, 2.0], "v": [1.0]}, "Says made a model with other tensors: got without none; with v"),
        ({"w": [[1.0, 2.0]]}, r"Says changed the shape of w: got \(1, 2\); expected \(2,\)"),
        ({"w": [1.0, np.nan]}, "Says made NaN or infinite values in w"),
        ({"w": [1.0, 1e300]}, "Says made NaN or infinite values in w"),  # infinite in float32
    ],
)
def test_a_result_that_is_no_model_stops_the_run(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        said(**arrays)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FedProx(proximal_mu=0.1), "FedProx cannot run here: it sends clients proximal-mu, which fedtrain's"),
        (Says(content=RecordDict({"arrays": ArrayRecord()})), "Says cannot run here: it sends clients other arrays"),
        (Says(content=RecordDict({"a": flower.array_record(PARAMS)})), "it sends clients other arrays than the global"),
    ],
)
def test_instructions_that_no_client_would_hear_are_refused(strategy: Strategy, message: str) -> None:
    with pytest.raises(RunError, match=message):
        stock(strategy).configure(1, PARAMS, NODES)


class Custom(FedAvg):
    """Sends by itself, breaks, meddles and draws, as told."""

    def __init__(self, doing: str) -> None:
        super().__init__()
        self.doing, self.seen = doing, []

    def configure_train(self, server_round: Any, arrays: Any, config: Any, grid: Any) -> Any:
        if self.doing == "send":
            grid.send_and_receive([])
        if self.doing == "meddle":
            arrays["w"].numpy()[:] = 99
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Sequence[Message]) -> Any:
        self.seen = [reply.metadata.src_node_id for reply in replies]
        if self.doing == "break":
            raise ValueError("no idea")
        arrays, metrics = super().aggregate_train(server_round, replies)
        if self.doing == "draw":
            arrays = ArrayRecord(
                {n: Array(np.asarray(a.numpy() + np.random.rand() + random.random())) for n, a in arrays.items()}
            )
        return arrays, metrics


def test_it_may_send_no_messages_of_its_own() -> None:
    with pytest.raises(RunError, match="can send no messages of its own"):
        stock(Custom("send")).configure(1, PARAMS, NODES)


def test_it_cannot_change_the_servers_own_model() -> None:
    params = {"w": torch.ones(2)}
    stock(Custom("meddle")).configure(1, params, NODES)
    assert params["w"].tolist() == [1, 1]


def test_what_it_raises_is_named_with_its_line() -> None:
    with pytest.raises(
        RunError, match=r"Custom\.aggregate_train in round 1 failed at .*test_stock.py, line \d+: ValueError: no"
    ):
        run(stock(Custom("break")), (1,))


def test_replies_come_from_the_nodes_that_were_asked() -> None:
    strategy = Custom("")
    driven = StockStrategy(strategy, 0, lambda node: f"hospital {node}")
    driven.configure(1, {"w": torch.ones(2)}, [5, 9])
    sent = [Update(f"hospital {node}", 1, {"w": torch.ones(2)}, 1, {}) for node in (5, 9)]
    assert driven.aggregate(1, {"w": torch.ones(2)}, sent)["w"].tolist() == [2, 2]
    assert strategy.seen == [5, 9]


def test_global_generators_are_seeded_for_it_and_put_back() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    first = run(stock(Custom("draw")), (1,))
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(2)
    assert_same_bytes(run(stock(Custom("draw")), (1,)), first)


def test_flwrs_progress_stays_off_the_console_and_its_warnings_do_not(caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("flwr").level
    run(stock(FedAdam()), (1,))
    assert caplog.records == []
    bulyan = stock(Bulyan(num_malicious_nodes=1))
    bulyan.configure(1, PARAMS, NODES)
    bulyan.aggregate(1, PARAMS, updates(1, nodes=[1]))
    assert ["Insufficient replies" in record.getMessage() for record in caplog.records] == [True]
    assert logging.getLogger("flwr").level == level


def test_a_flwr_strategy_that_asks_a_part_of_those_drawn_has_its_quorum_of_these(
    tiny: Path, simulated: Callable[..., tuple[Path, list[str]]]
) -> None:
    of = 'strategy={name="flwr.serverapp.strategy:FedAvg", options={fraction_train=0.34}}'
    folder, _ = simulated(tiny, "part", of, "clients.per_round=6", "clients.quorum=1.0")
    assert [len(record.participants) for record in RunFolder(folder).read_rounds()] == [0, 2, 2, 2, 2]
