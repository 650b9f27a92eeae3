import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedtrain import flower, wire
from fedtrain.client.app import CLIENT_ID, Site, make_client_app
from fedtrain.client.state import ClientState
from fedtrain.data.federated import build
from fedtrain.errors import RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.params import exchanged, snapshot
from fedtrain.simulations.grid import InProcess, SimulationGrid
from fedtrain.tasks.registry import make_task
from fedtrain.training.loop import build_model

NAMES = ["a", "b", "c"]


def grid(handle: Callable[[str], None] = lambda _: None) -> SimulationGrid:
    """Three clients that answer with their name."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name = str(context.node_config[CLIENT_ID])
        handle(name)
        return Message(RecordDict({"config": ConfigRecord({"name": name})}), reply_to=message)

    return SimulationGrid(InProcess(app, NAMES), len(NAMES))


def messages(of: SimulationGrid) -> list[Message]:
    return [of.create_message(RecordDict(), "train", node_id, "1") for node_id in of.get_node_ids()]


def name_of(reply: Message) -> str:
    return str(reply.content.config_records["config"]["name"])


def test_replies_name_their_message_their_node_and_their_run() -> None:
    three = grid()
    for sent, reply in zip(asked := messages(three), three.send_and_receive(asked), strict=True):
        assert name_of(reply) == NAMES[reply.metadata.src_node_id - 1]
        assert reply.metadata.src_node_id == sent.metadata.dst_node_id
        assert reply.metadata.reply_to_message_id == sent.metadata.message_id
        assert reply.metadata.message_id == f"reply-{sent.metadata.message_id}"
        assert reply.metadata.run_id == three.run.run_id


def test_what_is_pushed_can_be_pulled_once() -> None:
    three = grid()
    first, second, third = three.push_messages(messages(three))
    assert len({first, second, third}) == 3
    assert [name_of(reply) for reply in three.pull_messages([third, "unknown", first])] == ["c", "a"]
    assert [name_of(reply) for reply in three.pull_messages([first, second, third])] == ["b"]


def test_messages_of_all_rounds_have_names_of_their_own() -> None:
    three = grid()
    names = [name for _ in range(2) for name in three.push_messages(messages(three))]
    assert len(set(names)) == 6


def test_what_is_not_read_is_not_run() -> None:
    ran: list[str] = []
    three = grid(ran.append)
    next(iter(three.send_and_receive(messages(three))))
    assert ran == ["a"]


def fail_for_b(name: str) -> None:
    if name == "b":
        raise ValueError("no such\n  tumour")


def fail_for_c(name: str) -> None:
    if name == "c":
        raise RunError("the budget is spent", got=3)


@pytest.fixture
def replies() -> Callable[[Callable[[str], None]], Iterator[Message]]:
    return lambda handle: (three := grid(handle)).send_and_receive(messages(three))


def test_a_clients_exception_is_its_error_reply_with_the_users_line(replies: Callable[..., Iterator[Message]]) -> None:
    first, second, third = replies(fail_for_b)
    line = inspect.getsourcelines(fail_for_b)[1] + 2
    assert second.error.reason == f"failed at {__file__}, line {line}: ValueError: no such tumour"
    assert second.metadata.src_node_id == 2
    assert (name_of(first), name_of(third)) == ("a", "c")


def test_our_own_errors_speak_for_themselves(replies: Callable[..., Iterator[Message]]) -> None:
    *_, third = replies(fail_for_c)
    assert third.error.reason == "the budget is spent: got 3"


def test_a_stock_strategy_of_flwr_trains_on_it() -> None:
    pytest.importorskip("sklearn")
    experiment = Experiment.model_validate(
        {"task": {"name": "logistic"}, "data": {"name": "breast-cancer", "clients": 3, "test": 0.2}}
    )
    data = build(experiment.data, None, Path(), seed=0)
    task = make_task(experiment.task, data.spec, Path())
    site = Site(Path(), ClientState(Path("clients")), torch.device("cpu"))  # FedAvg keeps nothing
    app = make_client_app(experiment, task, data, site)
    three = SimulationGrid(InProcess(app, data.client_ids()), 3)
    params = snapshot(exchanged(build_model(task, 0)))
    stock = FedAvg(min_available_nodes=3)
    arrays = flower.array_record(params)

    replies = list(three.send_and_receive(stock.configure_train(1, arrays, ConfigRecord(), three)))
    updates = [wire.update(reply.content) for reply in replies]
    aggregated, metrics = stock.aggregate_train(1, replies)
    assert isinstance(aggregated, ArrayRecord)
    total = sum(update.num_examples for update in updates)
    for name, mean in flower.tensors(aggregated).items():
        by_hand = sum(update.delta[name] * (update.num_examples / total) for update in updates)
        torch.testing.assert_close(mean, by_hand)
    losses = [update.metrics["loss"] * update.num_examples for update in updates]
    assert metrics == {"loss": pytest.approx(sum(losses) / total)}

    asked = stock.configure_evaluate(1, arrays, ConfigRecord(), three)
    measured = stock.aggregate_evaluate(1, three.send_and_receive(asked))
    assert (measured or {}).keys() == {"loss", "accuracy"}
