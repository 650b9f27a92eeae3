"""Rounds over clients that take a time of their own: who answers first is used."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Error, Message

from fedtrain import flower, wire
from fedtrain.cli.progress import RunObserver
from fedtrain.compression.exchange import Exchange
from fedtrain.experiment.clients import ClientsSection
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import FedBuffStrategy
from fedtrain.records import RoundRecord
from fedtrain.rundir import Checkpoint, RunFolder
from fedtrain.server.cohort import Cohort
from fedtrain.server.live import Live, LiveBuffer
from fedtrain.server.mail import Mail
from fedtrain.server.prices import Prices
from fedtrain.server.rounds import Server
from fedtrain.server.selection import Crowd
from fedtrain.simulations.grid import SimulationGrid
from fedtrain.strategies.adapter import AlgorithmRunner
from fedtrain.strategies.base import Asynchrony, FederatedStrategy
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.fedbuff import fedbuff

FEDBUFF = FedBuffStrategy(name="fedbuff", buffer_size=2, max_in_flight=3)


def crowd(count: int = 10, **section: object) -> Crowd:
    return Crowd(ClientsSection.model_validate(section), 7, np.ones(count, dtype=np.int64))


def test_over_selection_asks_more_than_it_waits_for() -> None:
    turn = Live(crowd(per_round=4, over_selection=1.5), {}).turn(1)
    assert len(turn.ask) == 6
    assert (turn.wanted, turn.enough) == (4, 4)


def test_the_clock_of_a_simulation_does_not_count() -> None:
    slow = {"kind": "lognormal", "seconds": 100.0, "sigma": 1.0}
    turn = Live(crowd(per_round=4, duration=slow, deadline=1.0), {}).turn(1)
    assert len(turn.ask) == 4
    assert not turn.late
    assert turn.seconds == 0


def test_partial_work_fits_the_time_that_a_client_took_before() -> None:
    live = Live(crowd(4, deadline=10.0, late="partial"), {})
    first = live.turn(1)
    assert first.work == {}
    live.answered(first, 0, 5.0)
    live.answered(first, 1, 30.0)
    live.missed(first, [1, 2])  # 1 has answered, with what the gate refused
    again = Live(crowd(4, deadline=10.0, late="partial"), json.loads(json.dumps(live.memory())))
    second = again.turn(2)
    assert second.work == pytest.approx({1: 0.3, 2: 0.45})
    again.answered(second, 1, 12.0)  # for three tenths of its work
    assert again.turn(3).work[1] == pytest.approx(9 / 40)


def test_a_client_trains_on_one_model_at_most_once() -> None:
    buffer = LiveBuffer(crowd(4), Asynchrony(2, 3), {})
    turn = buffer.turn(1)
    started = buffer.start(1)
    assert len(started) == 3
    for client in started:
        buffer.answered(turn, client, 1.0)
    (last,) = buffer.start(1)
    assert last not in started
    buffer.turn(2)
    assert len(buffer.start(2)) == 2
    assert set(buffer.under_way().values()) == {1, 2}


def test_who_was_at_work_when_the_server_ended_is_asked_first() -> None:
    buffer = LiveBuffer(crowd(), Asynchrony(2, 3), {})
    buffer.turn(1)
    started = buffer.start(1)
    again = LiveBuffer(crowd(), Asynchrony(2, 3), json.loads(json.dumps(buffer.memory())))
    again.turn(2)
    assert set(again.start(2)) == set(started)


class Hall:
    """An engine whose clients go on from call to call, and answer in an order of the test's.

    Args:
        order: of the node ids, of which the first at work answers next.
        slow: one that is passed over `times` times.
        away: those of which nothing is heard.
        bad: those that send what cannot be used.
    """

    def __init__(
        self, order: Sequence[int], slow: int = 0, times: int = 0, away: Sequence[int] = (), bad: Sequence[int] = ()
    ) -> None:
        self._order, self._slow, self._times, self._away, self._bad = order, slow, times, away, bad
        self._at_work: dict[int, Message] = {}

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        self._at_work |= {message.metadata.dst_node_id: message for message in messages}
        while self._at_work:
            node = next(
                node for node in self._order if node in self._at_work and (node != self._slow or not self._times)
            )
            self._times = max(0, self._times - 1)
            message = self._at_work.pop(node)
            if node in self._away:
                yield Message(Error(flower.CLIENT_AWAY, "no progress"), reply_to=message)
                continue
            number = wire.instruction(message).round_number
            update = wire.Update(
                f"c{node}", number, {"w": torch.tensor([math.nan if node in self._bad else 1.0])}, 1, {"loss": 1.0}
            )
            yield Message(wire.update_content(update), reply_to=message)


def run(path: Path, hall: Hall, strategy: FederatedStrategy, rounds: int, **clients: object) -> Sequence[RoundRecord]:
    """Run a server over four clients, c1 to c4, and give the records of its rounds."""
    flower.enter_run(1)
    folder = RunFolder(path)
    folder.checkpoints.mkdir(parents=True)
    data = {"name": "digits", "clients": 4}
    experiment = Experiment.model_validate({"data": data, "rounds": rounds, "clients": clients})
    start = {"w": torch.tensor([10.0])}
    runner = AlgorithmRunner(strategy.algorithm, start)
    cohort = Cohort(experiment, np.ones(4, dtype=np.int64), strategy.asynchrony, live=True)
    grid = SimulationGrid(hall, 4)
    prices = Prices(experiment, Exchange(experiment.compression, start, (), 0), {}, {}, ["loss"])
    mail = Mail(prices, runner, cohort, folder, lambda node: f"c{node}")
    server = Server(experiment, runner, cohort, grid, folder, lambda _: {}, RunObserver(), mail)
    server.run(Checkpoint(0, start, runner.state))
    return folder.read_rounds()[1:]


def test_a_round_ends_with_the_first_who_answer(tmp_path: Path) -> None:
    (record,) = run(tmp_path, Hall([3, 1, 4, 2]), fedavg(), 1, per_round=2, over_selection=2.0)
    assert record.participants == ["c1", "c3"]  # the sum is in client order all the same
    assert record.late == ["c2", "c4"]


def test_what_the_gate_refuses_does_not_fill_a_round(tmp_path: Path) -> None:
    (record,) = run(tmp_path, Hall([3, 1, 4, 2], bad=[3, 1]), fedavg(), 1, per_round=2, over_selection=2.0)
    assert record.participants == ["c2", "c4"]
    assert sorted(record.quarantined) == ["c1", "c3"]


def test_a_buffer_takes_what_comes_whatever_round_it_started_in(tmp_path: Path) -> None:
    buffer = LiveBuffer(crowd(4), Asynchrony(2, 3), {})
    buffer.turn(1)
    slow = buffer.start(1)[0] + 1
    records = run(tmp_path, Hall([1, 2, 3, 4], slow, times=6), fedbuff(FEDBUFF), 4)
    assert [len(record.participants) for record in records] == [2] * 4
    assert [f"c{slow}" in record.participants for record in records] == [False, False, False, True]
    assert records[3].staleness >= 1.5  # one of two is three rounds old
    assert not any(record.late or record.quarantined for record in records)


def test_who_makes_no_progress_makes_room(tmp_path: Path) -> None:
    records = run(tmp_path, Hall([2, 1, 3, 4], away=[2]), fedbuff(FEDBUFF), 3)
    assert [len(record.participants) for record in records] == [2] * 3
    assert not any("c2" in record.participants for record in records)
    assert any(record.late == ["c2"] for record in records)
