"""The forecast is the run's own schedule, played without training."""

from typing import Any

import numpy as np
import pytest

from fedtrain.errors import InputError, RunError
from fedtrain.experiment import Experiment
from fedtrain.server.devices import Devices, Traffic, pace_of
from fedtrain.server.forecast import Forecast, forecast
from fedtrain.server.schedule import virtual_schedule
from fedtrain.server.selection import Crowd
from fedtrain.server.traces import Traces, Windows
from fedtrain.strategies.base import Asynchrony

TRAFFIC = Traffic(down=5_000_000, up=1_000_000)
EQUAL = {"kind": "devices", "slowness_sigma": 0.0, "bandwidth_sigma": 0.0, "step_seconds": 0.5, "latency": 0.25}


def experiment(rounds: int = 50, **clients: Any) -> Experiment:
    document = {"seed": 3, "rounds": rounds, "data": {"name": "digits", "clients": 50}, "clients": clients}
    return Experiment.model_validate(document)


def sizes(count: int = 50) -> np.ndarray:
    return np.full(count, 96)  # three steps of 32


def played(asynchrony: Asynchrony | None = None, count: int = 50, **clients: Any) -> Forecast:
    wanted = experiment(**clients)
    return forecast(wanted, sizes(count), pace_of(wanted, sizes(count), TRAFFIC), asynchrony)


def test_equal_devices_in_closed_form() -> None:
    run = played(duration=EQUAL, per_round=10)
    assert run.seconds.tolist() == [4.0] * 50  # 0.25 + 1 + 1.5 + 0.25 + 1
    assert run.client_seconds.tolist() == [40.0] * 50
    assert (run.wasted_share, run.total_seconds, run.seconds_until(3)) == (0.0, 200.0, 12.0)
    assert (run.round_quantile(0.5), run.round_quantile(0.95)) == (4.0, 4.0)
    assert run.updates.sum() == 500


def test_participation_bias_by_hand() -> None:
    numbers = np.array([3.0, 1.0])
    run = Forecast(numbers, 2 * numbers, np.array([1.0, 0.0]), np.array([0, 2, 0, 2]), np.array([0, 1]))
    assert (run.never_used, run.gini, run.slowest_tenth) == (0.5, 0.5, 1.0)
    assert run.wasted_share == 1 / 8
    assert run.round_quantile(0.5) == 2.0
    alike = Forecast(numbers, numbers, numbers, np.array([2, 2, 2]), np.array([2]))
    assert (alike.never_used, alike.gini, alike.slowest_tenth) == (0.0, 0.0, 1.0)
    nobody = Forecast(numbers, 0 * numbers, 0 * numbers, np.array([0, 0]), None)
    assert (nobody.never_used, nobody.gini, nobody.slowest_tenth, nobody.wasted_share) == (1.0, 0.0, None, 0.0)


def test_over_selection_leaves_the_slow_out_and_a_buffer_does_so_less() -> None:
    spread = {"duration": {"kind": "devices", "step_seconds": 0.5, "slowness_sigma": 1.0}}
    fair = played(**spread, per_round=10, rounds=200)
    first = played(**spread, per_round=10, over_selection=2.0, rounds=200)
    flowing = played(Asynchrony(10, 20), **spread, rounds=200)
    assert fair.slowest_tenth == pytest.approx(1.0, abs=0.15)  # five standard errors of 200 updates, 0.07 each
    assert first.slowest_tenth == 0.0
    assert flowing.slowest_tenth is not None
    assert 0.2 < flowing.slowest_tenth < 0.9
    assert first.total_seconds < fair.total_seconds / 2
    assert first.wasted_share > 0.3 > fair.wasted_share == 0.0
    assert fair.gini < flowing.gini < first.gini


def test_those_who_may_not_be_asked_do_not_count() -> None:
    wanted = experiment(duration=EQUAL)
    some = np.where(np.arange(50) < 20, 96, 0)
    run = forecast(wanted, some, pace_of(wanted, some, TRAFFIC), None)
    assert (len(run.updates), run.never_used) == (20, 0.0)


@pytest.mark.parametrize("asynchrony", [None, Asynchrony(5, 10)])
def test_it_is_the_schedule_turn_by_turn(asynchrony: Asynchrony | None) -> None:
    duration = {"kind": "devices", "step_seconds": 0.5, "dropout": 0.2, "availability": {"period": 90.0, "share": 0.4}}
    wanted = experiment(duration=duration, **({} if asynchrony else {"per_round": 5, "over_selection": 1.6}))
    pace = pace_of(wanted, sizes(), TRAFFIC)
    assert wanted.clients.duration is not None
    crowd, devices = Crowd(wanted.clients, wanted.seed, sizes()), Devices(wanted.clients.duration, wanted.seed, pace)
    schedule = virtual_schedule(crowd, devices, asynchrony, {})
    turns = [schedule.turn(number) for number in range(1, 51)]
    run = forecast(wanted, sizes(), pace, asynchrony)
    assert run.seconds.tolist() == [turn.seconds for turn in turns]
    assert run.client_seconds.tolist() == [turn.client_seconds for turn in turns]
    assert run.wasted_seconds.tolist() == [turn.wasted_seconds for turn in turns]
    assert run.updates.sum() == sum(len(turn.use) for turn in turns)


def test_without_a_clock_there_is_nothing_to_forecast() -> None:
    with pytest.raises(InputError, match=r"without clients\.duration there is no time to forecast"):
        played()


def test_a_run_that_nobody_will_attend_is_told() -> None:
    wanted = experiment(duration={**EQUAL, "availability": {"kind": "file", "file": "none.csv"}})
    nobody = Windows(np.empty(0, np.int64), np.empty(0), np.empty(0), 50, period=100.0)
    pace = pace_of(wanted, sizes(), TRAFFIC, traces=Traces(windows=nobody))
    with pytest.raises(RunError, match="no client is there any more"):
        forecast(wanted, sizes(), pace, None)
