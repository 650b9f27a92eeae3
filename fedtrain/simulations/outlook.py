"""What a run will cost in bytes and in time, before its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedtrain.compression.exchange import make_exchange
from fedtrain.data.federated import PartitionedData
from fedtrain.experiment.compression import CompressionSection
from fedtrain.experiment.sections import Experiment
from fedtrain.params import exchanged, is_private, snapshot
from fedtrain.server.cohort import Cohort
from fedtrain.server.devices import Pace, Traffic, needs_a_measured_step, pace_of
from fedtrain.server.forecast import Forecast, forecast
from fedtrain.server.prices import Prices
from fedtrain.server.traces import read_traces
from fedtrain.simulations.calibration import measure_step
from fedtrain.strategies.adapter import AlgorithmRunner, RoundStrategy
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.registry import make_strategy
from fedtrain.strategies.stock import StockStrategy
from fedtrain.tasks.base import Task
from fedtrain.training.device import find_device
from fedtrain.training.loop import build_model
from fedtrain.training.metrics.pooled import common_scaling, make_metrics

__all__ = ["Outlook", "make_pace", "outlook"]

Sizes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outlook:
    """What is known of a run's bytes and time.

    Attributes:
        sure: "exact" if every client answers; "most" where messages can be smaller; "about" where who takes part, or
            what they measure, is not known beforehand.
        traffic: bytes of one client's messages of a round, down and up; clients' names may differ by some bytes.
        plain: likewise without compression.
        rounds: bytes up and down of each round.
        measuring: of all these, the bytes of evaluations on clients.
        starved: the first round with fewer updates than clients.quorum wants, by the clock; None if there is none.
        forecast: of the virtual clock; None without one.
    """

    sure: Literal["exact", "most", "about"]
    traffic: Traffic
    plain: Traffic
    rounds: Sequence[tuple[int, int]]
    measuring: int
    starved: int | None
    forecast: Forecast | None


def outlook(experiment: Experiment, base: Path, data: PartitionedData, sizes: Sizes, task: Task) -> Outlook:
    """Play a run's schedule, and price its messages.

    Args:
        experiment: what would be run.
        base: the experiment file's folder.
        data: of the clients.
        sizes: `(clients,)` training examples; 0 for those that are not to be asked.
        task: model, loss and metrics.

    Raises:
        InputError: a file of the clock does not fit.
        RunError: no client will be there.
    """
    names, model = data.client_ids(), build_model(task, experiment.seed)
    private = experiment.personalization.private
    initial = snapshot({name: t for name, t in exchanged(model).items() if not is_private(name, private)})
    strategy = make_strategy(experiment, int(np.count_nonzero(sizes)), base)
    exchange, personal, asynchrony = make_exchange(experiment, model), False, None
    runner: RoundStrategy
    if isinstance(strategy, FederatedStrategy):
        runner = AlgorithmRunner(strategy.algorithm, initial, exchange.buffers)
        asynchrony, personal = strategy.asynchrony, strategy.personal_rule is not None
    else:
        runner = StockStrategy(strategy, experiment.seed, lambda node: names[node - 1])
    metrics = ["loss", *task.metrics()]
    pooled = make_metrics(experiment.evaluation, data.spec, common_scaling(data))
    prices = Prices(experiment, exchange, runner.share(), runner.extra(initial), metrics, personal, pooled)
    bare = experiment.model_copy(update={"compression": CompressionSection()})
    plain = Prices(bare, make_exchange(bare, model), runner.share(), runner.extra(initial), metrics, personal, pooled)
    device = find_device(experiment.run.device)
    pace = make_pace(prices, base, names, sizes, lambda: measure_step(experiment, task, data, device))
    cohort = Cohort(experiment, sizes, asynchrony, pace=pace, held_out=data.held_out())
    cohort.begin(runner, initial, {})
    turns = {number: cohort.turn(number) for number in range(1, experiment.rounds + 1)}
    privacy, evaluators = experiment.privacy, cohort.evaluators()
    quorum = 0.0 if privacy and privacy.unit == "client" else experiment.clients.quorum  # as in the round loop
    rounds = [prices.round(number, turn, evaluators, names.__getitem__) for number, turn in turns.items()]
    training = sum(sum(prices.round(number, turn, (), names.__getitem__)) for number, turn in turns.items())
    starving = (number for number, turn in turns.items() if len(turn.use) < turn.wanted * quorum - 1e-9)
    return Outlook(
        sure=_sure(prices, data, strategy, evaluators),
        traffic=_traffic(prices, names),
        plain=_traffic(plain, names),
        rounds=rounds,
        measuring=sum(map(sum, rounds)) - training,
        starved=next(starving, None),
        forecast=forecast(experiment, sizes, pace, asynchrony) if experiment.clients.duration else None,
    )


def _sure(
    prices: Prices, data: PartitionedData, strategy: object, evaluators: Sequence[int]
) -> Literal["exact", "most", "about"]:
    experiment, names = prices.experiment, data.client_ids()
    drawn = experiment.privacy is not None and experiment.privacy.unit == "client"  # by coins that nobody foresees
    if drawn or experiment.clients.sampling == "power-of-choice" or not isinstance(strategy, FederatedStrategy):
        return "about"
    if not all(len(data.client(names[client]).test) for client in evaluators):
        return "most"
    return "exact" if prices.exact and experiment.training.early_stopping is None else "most"


def make_pace(prices: Prices, base: Path, names: Sequence[str], sizes: Sizes, measure: Callable[[], float]) -> Pace:
    """Find out what a participation consists of.

    Args:
        prices: what messages weigh.
        base: the experiment file's folder.
        names: of the clients.
        sizes: `(clients,)` training examples; 0 for those that are not to be asked.
        measure: times one local step in seconds; called where the experiment asks for it.

    Raises:
        InputError: a file of the clock cannot be read, or does not fit the clients.
    """
    experiment, section = prices.experiment, prices.experiment.clients.duration
    step = measure() if needs_a_measured_step(section) else None
    return pace_of(experiment, sizes, _traffic(prices, names), step, read_traces(section, experiment.seed, base, names))


def _traffic(prices: Prices, names: Sequence[str]) -> Traffic:
    return Traffic(prices.down, prices.up(max(names, key=lambda name: len(name.encode()))))
