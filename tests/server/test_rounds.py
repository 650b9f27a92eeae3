import math
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedtrain import flower, wire
from fedtrain.client.app import CLIENT_ID
from fedtrain.compression.exchange import Exchange
from fedtrain.errors import InterruptedRunError, RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import FedBuffStrategy
from fedtrain.params import Params
from fedtrain.records import RoundRecord
from fedtrain.rundir import Checkpoint, RunFolder
from fedtrain.server.cohort import Cohort
from fedtrain.server.mail import Mail
from fedtrain.server.prices import Prices
from fedtrain.server.rounds import Server
from fedtrain.simulations.grid import InProcess, SimulationGrid
from fedtrain.strategies.adapter import AlgorithmRunner
from fedtrain.strategies.base import FederatedStrategy, State
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.fedbuff import fedbuff

NAMES = tuple(string.ascii_lowercase)
NAN = math.nan
START = {"w": torch.tensor([10.0])}


@dataclass
class Told:
    """What the observer was told."""

    notices: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def round_started(self, round_number: int, clients: int) -> None:
        self.events.append(f"{round_number} asks {clients}")

    def client_finished(self, round_number: int) -> None:
        self.events.append(f"{round_number} has one more")

    def round_finished(self, record: RoundRecord) -> None:
        self.events.append(f"{record.round_number} is finished")

    def notice(self, text: str) -> None:
        self.notices.append(text)


@dataclass
class Trial:
    """A server over clients that each answer with their own delta and accuracy; a delta of None is a failure.

    Client a has one example, b two, c three, d four.
    """

    path: Path
    deltas: Sequence[float | None] = (1.0, 2.0, 3.0, 4.0)
    accuracies: Sequence[float] = (1.0, 0.0, 0.0, 0.5)
    strategy: FederatedStrategy = field(default_factory=fedavg)
    central: Callable[[Params], dict[str, float]] = lambda params: {"loss": float(params["w"])}
    told: Told = field(default_factory=Told)
    encoded: Callable[[Params], Params] = lambda delta: delta

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.path)
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)

    def run(self, **sections: object) -> dict[str, list[float]]:
        """Run from the start and return the final parameters."""
        sections = {"rounds": 1, "evaluation": {"max_clients": 100}, **sections}
        data = {"name": "digits", "clients": 100, "test": 0.2}
        experiment = Experiment.model_validate({"data": data, **sections})
        runner = AlgorithmRunner(self.strategy.algorithm, START)
        cohort = Cohort(experiment, np.arange(1, len(self.deltas) + 1), self.strategy.asynchrony)
        grid = SimulationGrid(InProcess(self._app(), NAMES), len(self.deltas))
        names = lambda node_id: NAMES[node_id - 1]  # noqa: E731
        exchange = Exchange(experiment.compression, START, (), 0)
        prices = Prices(experiment, exchange, runner.share(), runner.extra(START), ["accuracy"])
        mail = Mail(prices, runner, cohort, self.folder, names)
        server = Server(experiment, runner, cohort, grid, self.folder, self.central, self.told, mail)
        start = self.folder.latest_checkpoint(self.told.notice) or Checkpoint(0, START, runner.state)
        return {name: t.tolist() for name, t in server.run(start).items()}

    def record(self, round_number: int = 1) -> RoundRecord:
        return self.folder.read_rounds()[round_number]

    def kept(self) -> int:
        """The round of the newest checkpoint."""
        checkpoint = self.folder.latest_checkpoint(self.told.notice)
        assert checkpoint is not None
        return checkpoint.round_number

    def _app(self) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            name = str(context.node_config[CLIENT_ID])
            delta = self.deltas[NAMES.index(name)]
            if delta is None:
                raise RunError("the clinic is closed")
            update = wire.Update(
                name,
                wire.instruction(message).round_number,
                self.encoded({"w": torch.tensor([delta])}),
                examples(name),
                {"loss": 1.0},
            )
            return Message(wire.update_content(update), reply_to=message)

        @app.evaluate()
        def measure(message: Message, context: Context) -> Message:
            name = str(context.node_config[CLIENT_ID])
            measurement = wire.Measurement(name, examples(name), {"accuracy": self.accuracies[NAMES.index(name)]})
            return Message(wire.measurement_content(measurement), reply_to=message)

        return app


def examples(name: str) -> int:
    return NAMES.index(name) + 1


@pytest.fixture
def trial(tmp_path: Path) -> Callable[..., Trial]:
    return lambda **changes: Trial(tmp_path / "run", **changes)


def test_a_round_by_hand(trial: Callable[..., Trial]) -> None:
    run = trial()
    assert run.run() == {"w": [13.0]}  # 10 + (1*1 + 2*2 + 3*3 + 4*4) / 10
    untrained, record = run.folder.read_rounds()
    assert (untrained.round_number, untrained.central) == (0, {"loss": 10.0})
    assert (record.participants, record.num_examples, record.quarantined) == (["a", "b", "c", "d"], 10, {})
    assert (record.central, record.update_norm) == ({"loss": 13.0}, 3.0)
    assert record.clients == {"accuracy": pytest.approx(0.3)}  # (1*1 + 4*0.5) / 10
    assert record.per_client["d"] == {"accuracy": 0.5, "num_examples": 4}
    assert run.told.events == ["0 is finished", "1 asks 4", *["1 has one more"] * 4, "1 is finished"]
    assert run.kept() == 1


@pytest.mark.parametrize(("fault", "reason"), [(None, "the clinic is closed"), (NAN, "NaN, infinite")])
def test_a_bad_client_is_recorded_and_the_sum_is_of_the_others(
    trial: Callable[..., Trial], fault: float | None, reason: str
) -> None:
    run = trial(deltas=(1.0, fault, 3.0, 4.0))
    assert run.run() == {"w": [13.25]}  # 10 + (1*1 + 3*3 + 4*4) / 8
    assert run.record().participants == ["a", "c", "d"]
    assert run.record().num_examples == 8
    assert reason in run.record().quarantined["b"]
    assert run.told.notices == [f"round 1: update of b not used: {run.record().quarantined['b']}"]


def test_as_many_as_the_quorum_are_enough(trial: Callable[..., Trial]) -> None:
    assert trial(deltas=(None, None, 3.0, 4.0)).run(clients={"quorum": 0.5}) == {"w": [pytest.approx(10 + 25 / 7)]}


def test_one_fewer_than_the_quorum_ends_the_run_with_the_first_reason(trial: Callable[..., Trial]) -> None:
    run = trial(deltas=(None, None, 3.0, 4.0))
    with pytest.raises(RunError, match=r"got 2 of 4 .* clients\.quorum = 0\.51 of them\. a: the clinic is closed"):
        run.run(clients={"quorum": 0.51})
    assert [record.round_number for record in run.folder.read_rounds()] == [0]
    assert run.kept() == 0


def test_the_quorum_is_met_exactly_where_a_product_would_round_up(trial: Callable[..., Trial]) -> None:
    assert 0.28 * 25 > 7
    run = trial(deltas=[1.0] * 7 + [None] * 18, accuracies=[0.0] * 25)
    assert run.run(clients={"quorum": 0.28}) == {"w": [11.0]}


def test_nobody_was_drawn(trial: Callable[..., Trial]) -> None:
    run = trial(deltas=(1.0, 1.0))
    run.run(rounds=8, clients={"quorum": 1.0, "per_round": 1, "sampling": "poisson"})
    drawn = [record.participants for record in run.folder.read_rounds()[1:]]
    empty = drawn.index([]) + 1
    assert f"round {empty}: no client was drawn; the model stays as it is" in run.told.notices
    assert (run.record(empty).update_norm, run.record(empty).bytes_up) == (0.0, 0)
    assert ["a", "b"] in drawn


def test_the_bytes_of_evaluation_are_counted(trial: Callable[..., Trial]) -> None:
    run = trial()
    run.run(rounds=2, evaluation={"clients_every": 0})  # on the clients after the last round alone
    without, with_ = run.record(1), run.record(2)
    content = [
        wire.measurement_content(wire.Measurement(name, examples(name), {"accuracy": accuracy}))
        for name, accuracy in zip(NAMES, run.accuracies, strict=False)
    ]
    assert with_.bytes_up - without.bytes_up == sum(map(wire.size, content))
    assert with_.bytes_down == 2 * without.bytes_down > 0  # the same instructions once more
    assert (without.clients, without.per_client) == ({}, {})


def test_a_measurement_that_is_not_a_number_is_not_used(trial: Callable[..., Trial]) -> None:
    run = trial(accuracies=(1.0, NAN, 0.0, 0.5))
    run.run()
    assert run.record().clients == {"accuracy": 0.375}  # (1*1 + 4*0.5) / 8
    assert run.record().per_client.keys() == {"a", "c", "d"}
    assert run.told.notices == ["round 1: evaluation of b not used: accuracy is not a number"]


def test_a_round_without_a_valid_update_leaves_the_model_and_says_so(trial: Callable[..., Trial]) -> None:
    run = trial(deltas=(NAN, None, NAN, NAN))
    assert run.run(clients={"quorum": 0.0}) == {"w": [10.0]}
    assert run.told.notices[-1] == "round 1: no valid update came in time; the model stays as it is"
    assert (run.record().participants, run.record().train, run.record().update_norm) == ([], {}, 0.0)


def test_who_offends_too_often_is_asked_no_more(trial: Callable[..., Trial]) -> None:
    run = trial(deltas=(1.0, NAN, 3.0, None))
    run.run(rounds=4, gate={"max_offences": 2})
    assert [record.set_aside for record in run.folder.read_rounds()] == [[], [], ["b"], [], []]
    assert [sorted(record.quarantined) for record in run.folder.read_rounds()[1:]] == [["b", "d"]] * 2 + [["d"]] * 2
    assert "b is set aside for the rest of the run" in run.told.notices  # d only failed, and may recover


def test_who_must_not_be_asked_is_not_asked_to_evaluate(trial: Callable[..., Trial]) -> None:
    run = trial(deltas=(1.0, NAN, 3.0, 4.0))
    run.run(rounds=2, gate={"max_offences": 1}, evaluation={"clients_every": 1, "max_clients": 100})
    assert run.record(1).per_client.keys() == run.record(2).per_client.keys() == {"a", "c", "d"}


def test_only_training_is_sent_what_the_strategy_shares(trial: Callable[..., Trial]) -> None:
    sections = {"strategy": {"name": "scaffold"}, "training": {"optimizer": {"name": "sgd"}}}
    shared, plain = trial(strategy=sharing()), trial()
    shared.run(**sections)
    sent = shared.record().bytes_down
    (shared.path / "rounds.jsonl").unlink()
    for path in shared.folder.checkpoints.iterdir():
        path.unlink()
    plain.run()
    extra = wire.instruction_content(flower.array_record(START), 1, flower.array_record(START))
    each = wire.size(extra) - wire.size(wire.instruction_content(flower.array_record(START), 1))
    assert sent - plain.record().bytes_down == 4 * each


def sharing() -> FederatedStrategy:
    plain = fedavg().algorithm
    return FederatedStrategy(plain._replace(share=lambda _: START))


def test_a_strategy_that_leaves_updates_unread_is_told(trial: Callable[..., Trial]) -> None:
    def hasty(state: State, params: Params, updates: Iterable[wire.Update]) -> tuple[Params, State]:
        next(iter(updates))
        return params, state

    run = trial(strategy=FederatedStrategy(fedavg().algorithm._replace(apply=hasty)))
    with pytest.raises(RunError, match="must read all updates of a round: got 1 of 4"):
        run.run()


def test_who_does_not_answer_does_not_crowd_out_the_others(trial: Callable[..., Trial]) -> None:
    run = trial(deltas=[None, None, None, *[1.0] * 7], accuracies=[0.0] * 10)
    clients = {"per_round": 4, "sampling": "power-of-choice", "candidates": 10, "quorum": 0.0}
    run.run(rounds=12, clients=clients, evaluation={"max_clients": 0})
    used = [len(record.participants) for record in run.folder.read_rounds()[1:]]
    assert sum(used[3:]) > 18  # of 36, where without end the same three would take three places of four


def test_offences_are_remembered_over_a_resumption(trial: Callable[..., Trial]) -> None:
    first = trial(deltas=(1.0, NAN, 3.0, 4.0), central=raising(KeyboardInterrupt(), 19.0))
    with pytest.raises(InterruptedRunError):
        first.run(rounds=4)
    assert first.kept() == 2
    second = trial(deltas=(1.0, NAN, 3.0, 4.0))
    second.run(rounds=4)
    assert second.folder.read_rounds()[-1].quarantined == {}


def test_a_deadline_leaves_out_the_late_who_were_sent_the_model_all_the_same(trial: Callable[..., Trial]) -> None:
    slow = {"deadline": 1.0, "duration": {"kind": "lognormal", "sigma": 1.0}, "quorum": 0.0}
    run, all_ = trial(), trial()
    run.run(clients=slow, evaluation={"max_clients": 0})
    record = run.record()
    assert record.late
    assert sorted(record.late + record.participants) == ["a", "b", "c", "d"]
    assert record.virtual_seconds == 1.0
    (run.path / "rounds.jsonl").unlink()
    for path in run.folder.checkpoints.iterdir():
        path.unlink()
    all_.run(evaluation={"max_clients": 0})
    assert record.bytes_down == all_.record().bytes_down
    assert record.bytes_up < all_.record().bytes_up


def test_a_buffer_takes_updates_of_earlier_rounds_and_holds_back_those_on_their_way(
    trial: Callable[..., Trial],
) -> None:
    buffered = {"name": "fedbuff", "buffer_size": 2, "max_in_flight": 4}
    run = trial(strategy=fedbuff(FedBuffStrategy(**buffered)))
    clients = {"duration": {"kind": "lognormal", "sigma": 2.0, "drawn": "round"}}
    sections = {"strategy": buffered, "clients": clients, "rounds": 12, "evaluation": {"max_clients": 0}}
    final = run.run(**sections)
    records = run.folder.read_rounds()[1:]
    assert [len(record.participants) for record in records] == [2] * 12
    assert max(record.staleness for record in records) > 0
    assert all(later.virtual_seconds >= 0 for later in records)
    assert final["w"][0] > 10.0


def raising(error: BaseException, loss: float) -> Callable[[Params], dict[str, float]]:
    """A central evaluation that raises once the model has come so far."""

    def central(params: Params) -> dict[str, float]:
        if float(params["w"]) >= loss:
            raise error
        return {}

    return central


def test_an_interrupt_in_round_1_keeps_the_start(trial: Callable[..., Trial]) -> None:
    run = trial(central=raising(KeyboardInterrupt(), 13.0))
    with pytest.raises(InterruptedRunError, match=r"interrupted; 0 of 3 rounds are kept\. Run the same command again"):
        run.run(rounds=3)
    assert run.kept() == 0


@pytest.mark.parametrize("error", [RunError("no such tumour"), ValueError("a fault of ours")])
def test_the_last_finished_round_is_kept_at_an_error(trial: Callable[..., Trial], error: Exception) -> None:
    run = trial(central=raising(error, 19.0))  # the third round's model
    with pytest.raises(type(error), match=str(error)):
        run.run(rounds=4, run={"checkpoint_seconds": 1000.0})
    assert [record.round_number for record in run.folder.read_rounds()] == [0, 1, 2]
    assert run.kept() == 2


def test_checkpoints_come_when_they_are_due(trial: Callable[..., Trial]) -> None:
    always, seldom = trial(), trial()
    always.run(rounds=3, run={"checkpoint_seconds": 0.0})
    assert sorted(path.name for path in always.folder.checkpoints.iterdir()) == [
        "round-0000002.safetensors",
        "round-0000003.safetensors",
    ]
    for path in always.folder.checkpoints.iterdir():
        path.unlink()
    seldom.run(rounds=3, run={"checkpoint_seconds": 1000.0})
    assert [path.name for path in seldom.folder.checkpoints.iterdir()] == ["round-0000003.safetensors"]


def test_what_cannot_be_decoded_is_quarantined(trial: Callable[..., Trial]) -> None:
    run = trial(encoded=lambda delta: {"encoded": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(RunError, match="too few valid updates"):
        run.run(compression={"up": ["int8"]})
    run = trial(encoded=lambda delta: {"w": torch.tensor([1.0])})
    with pytest.raises(RunError, match=r"got 0 of 4 clients.*a: the encoded tensors have other names"):
        run.run(compression={"up": ["int8"]})


@pytest.mark.parametrize("sent", [torch.ones(2000, 1), torch.tensor([True]), torch.tensor(1.0)])
def test_whole_models_of_another_shape_are_quarantined(trial: Callable[..., Trial], sent: torch.Tensor) -> None:
    run = trial(encoded=lambda delta: {"w": sent})
    with pytest.raises(RunError, match=r"got 0 of 4 clients.*the tensor 'w' is wrong"):
        run.run(compression={"up_of": "full"})


@pytest.mark.parametrize("data", [b"garbage", b""])
def test_arrays_that_cannot_be_read_are_quarantined(trial: Callable[..., Trial], data: bytes) -> None:
    run = trial()
    app = run._app()

    def spoiled(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if reply.metadata.message_type == "train":
            reply.content["arrays"] = ArrayRecord({"w": Array("float32", (1,), "numpy.ndarray", data)})
        return reply

    run._app = lambda: spoiled  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"got 0 of 4 clients.*arrays cannot be read"):
        run.run()


def test_bytes_are_told_by_client(trial: Callable[..., Trial]) -> None:
    run = trial()
    run.run()
    record = run.record()
    assert list(record.client_bytes) == ["a", "b", "c", "d"]
    assert record.bytes_up == sum(up for up, _ in record.client_bytes.values()) > 0
    assert record.bytes_down == sum(down for _, down in record.client_bytes.values()) > 0
