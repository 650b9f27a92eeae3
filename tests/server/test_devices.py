import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from fedtrain.errors import InputError
from fedtrain.experiment import Experiment
from fedtrain.experiment.clients import DurationSection
from fedtrain.server.devices import Devices, Pace, Participation, Traffic, needs_a_measured_step, pace_of
from fedtrain.server.traces import Windows, read_traces

COUNT = 400
TRAFFIC = Traffic(down=1_000_000, up=200_000)


def section(**fields: Any) -> DurationSection:
    return TypeAdapter(DurationSection).validate_python({"kind": "devices", **fields})


def pace(count: int = COUNT, step_seconds: float | None = None) -> Pace:
    return Pace(np.arange(1, count + 1), np.full(count, 10), TRAFFIC, step_seconds)


def devices(count: int = COUNT, **fields: Any) -> Devices:
    return Devices(section(**{"step_seconds": 0.5, **fields}), 7, pace(count))


EQUAL = {"slowness_sigma": 0.0, "bandwidth_sigma": 0.0}


def test_equal_devices_take_what_their_steps_and_bytes_take() -> None:
    same = devices(**EQUAL, bandwidth_down=1e6, bandwidth_up=1e5, latency=0.25)
    # 0.25 there, 1 s down, three steps of 0.5 s, 0.25 back, 2 s up
    assert same.participation(2, 1) == Participation(5.0, math.inf, moving=3.5, step=0.5)
    assert same.participation(2, 9) == same.participation(2, 1)


def test_speeds_and_links_are_drawn_once_with_these_medians_and_spreads() -> None:
    spread = {
        "slowness_sigma": 1.0,
        "bandwidth_sigma": 0.25,
        "latency": 0.0,
        "bandwidth_down": 2e6,
        "bandwidth_up": 1e6,
    }
    many = devices(20_000, **spread)
    parts = [many.participation(client, 1) for client in range(20_000)]
    steps, moving = np.log([[part.step, part.moving] for part in parts]).T
    # five standard errors of a median, 1.25 / sqrt(20000) of the spread
    assert np.median(steps) == pytest.approx(math.log(0.5), abs=0.045)
    assert np.median(moving) == pytest.approx(math.log(1e6 / 2e6 + 2e5 / 1e6), abs=0.012)
    assert (np.std(steps), np.std(moving)) == (pytest.approx(1.0, rel=0.03), pytest.approx(0.25, rel=0.03))
    assert abs(np.corrcoef(steps, moving)[0, 1]) < 0.04


def test_a_client_is_the_same_however_many_there_are() -> None:
    fields = {"dropout": 0.5, "availability": {"share": 0.3}}
    few, many = devices(10, **fields), devices(300, **fields)
    assert [few.participation(c, 2) for c in range(10)] == [many.participation(c, 2) for c in range(10)]


def test_who_drops_out_does_so_after_a_uniform_part_of_its_time() -> None:
    some = devices(dropout=0.3)
    parts = [some.participation(client, start) for start in range(50) for client in range(COUNT)]
    gone = np.array([part.vanishes / part.seconds for part in parts if not part.finished])
    assert len(gone) / len(parts) == pytest.approx(0.3, abs=0.0165)  # five standard errors
    assert np.quantile(gone, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.035)
    assert all(part.worked == part.vanishes < part.seconds for part in parts if not part.finished)
    assert all(part.worked == part.seconds for part in parts if part.finished)


def test_a_client_is_there_for_its_share_of_each_period() -> None:
    half = devices(availability={"period": 100.0, "share": 0.4})
    times = np.arange(0.0, 1000.0)
    here = np.array([half.here(now) for now in times])
    assert here.mean(axis=0) == pytest.approx(np.full(COUNT, 0.4), abs=0.011)
    assert here.mean(axis=1) == pytest.approx(np.full(len(times), 0.4), abs=0.125)  # five standard errors
    assert (here[:100] == here[500:600]).all()


def test_a_client_that_has_to_leave_while_it_works_has_vanished() -> None:
    some = devices(availability={"period": 1000.0, "share": 0.5})
    here = some.here(5.0)
    assert here is not None
    parts = {client: some.participation(client, 1, 5.0) for client in np.flatnonzero(here).tolist()}
    assert {part.finished for part in parts.values()} == {True, False}
    for client, part in parts.items():
        before, after = some.here(5.0 + part.vanishes - 1e-6), some.here(5.0 + part.vanishes + 1e-6)
        assert before is not None
        assert after is not None
        assert before[client]
        assert not after[client]


def test_windows_by_hand() -> None:
    # Client 0 is there from 10 to 20 and from 90 to 105, over the period's end; 1 always; 2 never.
    client, start, end = np.array([0, 0, 0, 1]), np.array([90.0, 10.0, 0.0, 0.0]), np.array([100.0, 20.0, 5.0, 100.0])
    windows = Windows(client, start, end, 3, period=100.0)
    assert windows.here(0.0).tolist() == [True, True, False]
    assert windows.here(5.0).tolist() == [False, True, False]
    assert [windows.left(0, now) for now in (0.0, 4.0, 5.0, 12.0, 95.0, 390.0)] == [5.0, 1.0, 0.0, 8.0, 10.0, 15.0]
    assert (windows.left(1, 7.0), windows.left(2, 7.0)) == (math.inf, 0.0)
    assert [windows.opening(now, np.array([0, 2])) for now in (3.0, 5.0, 20.0, 106.0)] == [3.0, 10.0, 90.0, 110.0]
    assert windows.opening(3.0, np.array([2])) == math.inf
    assert windows.opening(7.0, np.array([0, 1])) == 7.0


def test_without_a_period_nobody_comes_after_the_last_window() -> None:
    once = Windows(np.array([0]), np.array([10.0]), np.array([20.0]), 1, period=math.inf)
    assert [once.opening(now, np.array([0])) for now in (0.0, 15.0, 20.0)] == [10.0, 15.0, math.inf]


def test_whoever_waits_for_an_opening_finds_somebody_there() -> None:
    rng = np.random.default_rng(1)
    rare = devices(availability={"period": 0.7e5 / 3, "share": 0.001})
    for now in rng.uniform(0, 1e9, 300):
        among = rng.choice(COUNT, 3, replace=False)
        at = rare.opening(now, among)
        here = rare.here(at)
        assert here is not None
        assert here[among].any()
        assert at >= now
        assert rare.participation(int(among[here[among]][0]), 1, at).vanishes > 0


def test_partial_work_is_what_messages_and_deadline_leave_time_for() -> None:
    part = Participation(seconds=10.0, vanishes=math.inf, moving=4.0, step=2.0)
    assert [part.share_by(deadline) for deadline in (10.0, 7.0, 6.0, 5.9, 3.0)] == [1.0, 0.5, 1 / 3, 0.0, 0.0]


def test_what_a_participation_consists_of_is_counted() -> None:
    document = {"data": {"name": "digits", "clients": 3}, "training": {"batch_size": 8, "local_epochs": 2}}
    sizes = np.array([0, 5, 20])
    counted = pace_of(Experiment.model_validate(document), sizes, TRAFFIC)
    assert (counted.steps.tolist(), counted.batch.tolist()) == ([0, 2, 6], [0, 5, 8])
    twice = pace_of(Experiment.model_validate({**document, "strategy": {"name": "ditto"}}), sizes, TRAFFIC)
    assert twice.steps.tolist() == [0, 4, 12]


IDS = ["a", "b", "c", "d"]
FILE = "client,computation,communication\na,10,800\nb,20,1600\nd,40,80\nc,30,8000\n"


def from_file(folder: Path, text: str, measured: float | None = None, **fields: Any) -> Devices:
    (folder / "devices.csv").write_text(text)
    wanted = section(**{"kind": "device-file", "file": "devices.csv", "latency": 0.0, **fields})
    traces = read_traces(wanted, 7, folder, IDS)
    return Devices(wanted, 7, Pace(np.full(4, 6), np.full(4, 10), Traffic(102_400, 51_200), measured, traces))


def test_fedscales_columns_are_milliseconds_and_kilobits(tmp_path: Path) -> None:
    found = from_file(tmp_path, FILE, step_seconds="file")
    # FedScale: 3 * batch * steps * computation / 1000, and kbit (bytes / 1024 * 8) of both messages / communication
    computing = [3 * 10 * 6 * ms / 1000 for ms in (10, 20, 30, 40)]
    moving = [(102_400 + 51_200) / 1024 * 8 / kbits for kbits in (800, 1600, 8000, 80)]
    seconds = [found.participation(client, 1).seconds for client in range(4)]
    assert seconds == pytest.approx(np.add(computing, moving).tolist())


def test_a_step_is_scaled_by_the_files_median_device(tmp_path: Path) -> None:
    for found in (
        from_file(tmp_path, FILE, step_seconds=0.5),
        from_file(tmp_path, FILE, measured=0.5),
    ):
        assert [found.participation(client, 1).step for client in range(4)] == [0.2, 0.4, 0.6, 0.8]


def test_the_links_may_differ_by_direction(tmp_path: Path) -> None:
    text = "computation,communication,upload\n10,800,80\n"
    found = from_file(tmp_path, text, step_seconds=1.0)
    assert found.participation(0, 1).moving == pytest.approx(1.0 + 5.0)


def test_without_names_devices_are_drawn_by_lot(tmp_path: Path) -> None:
    (tmp_path / "devices.csv").write_text("computation,communication\n1,8\n2,8\n3,8\n")
    wanted = section(kind="device-file", file="devices.csv")
    names = [f"client {n}" for n in range(3000)]
    drawn, again, other = (read_traces(wanted, seed, tmp_path, names).capacities for seed in (7, 7, 8))
    assert drawn is not None
    assert again is not None
    assert other is not None
    assert (drawn.computation == again.computation).all()
    assert (drawn.computation != other.computation).any()
    assert np.bincount(drawn.computation.astype(int))[1:] / 3000 == pytest.approx([1 / 3] * 3, abs=0.043)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("client,computation\na,1\n", "no column 'communication'"),
        ("client,computation,comunication\n", "Did you mean comunication"),
        ("computation,communication\n", "has no device"),
        ("computation,communication\n1,2\n1,fast\n", r"line 3, column communication: got fast; expected a number g"),
        ("computation,communication\n0,2\n", r"line 2, column computation: got 0"),
        ("computation,communication\n1\n", r"line 2, column communication: got nothing"),
        ("computation,communication\ninf,2\n", r"line 2, column computation: got inf"),
        (FILE + "a,1,1\n", "two devices for a client: got a"),
        (FILE + "aa,1,1\n", "names clients that there are not: got aa.*Did you mean a?"),
        ("client,computation,communication\na,1,1\n", "no device for a client: got b. Give each client a line"),
    ],
)
def test_a_wrong_file_of_devices_is_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        from_file(tmp_path, text)


def windows_of(folder: Path, text: str, **fields: Any) -> Windows:
    (folder / "windows.csv").write_text(text)
    wanted = section(availability={"kind": "file", "file": "windows.csv", **fields})
    windows = read_traces(wanted, 7, folder, IDS).windows
    assert windows is not None
    return windows


def test_windows_come_from_a_file(tmp_path: Path) -> None:
    read = windows_of(tmp_path, "client,start,end\nb,5,9\na,20,30\na,0,10\nb,8,12\n", period=100.0)
    assert read.here(108.0).tolist() == [True, True, False, False]
    assert read.left(1, 5.0) == 7.0  # two windows that overlap are one
    assert not windows_of(tmp_path, "client,start,end\n").here(0.0).any()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("client,start\n", "no column 'end'"),
        ("client,start,end\nA,0,1\n", "availability.file names clients that there are not: got A"),
        ("client,start,end\na,-1,1\n", "line 2, column start: got -1; expected a number from 0"),
        ("client,start,end\na,0,3\na,4,4\n", "a window of no use: got a: 4 to 4; expected an end after the start"),
        ("client,start,end\na,4,60\n", "a: 4 to 60; expected .* within availability.period = 50"),
    ],
)
def test_a_wrong_file_of_windows_is_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        windows_of(tmp_path, text, period=50.0)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clients\.duration\.file cannot be read .*none\.csv"):
        read_traces(section(kind="device-file", file="none.csv"), 7, tmp_path, IDS)


def test_a_step_is_measured_where_the_experiment_says_so() -> None:
    assert needs_a_measured_step(section())
    assert needs_a_measured_step(section(kind="device-file", file="devices.csv"))
    assert not needs_a_measured_step(section(step_seconds=0.1))
    assert not needs_a_measured_step(section(kind="constant"))
    assert not needs_a_measured_step(None)
    slow = Devices(section(slowness_sigma=0.0), 7, pace(step_seconds=3.0))
    assert slow.participation(0, 1).step == 3.0


LOGNORMAL = {"kind": "lognormal", "seconds": 10.0, "sigma": 1.0}


def seconds(client: int, start: int, **fields: Any) -> float:
    return Devices(section(**fields), 7).participation(client, start).seconds


def test_stragglers_are_a_fraction_and_their_part_is_uniform() -> None:
    slow = Devices(section(kind="stragglers", seconds=5.0, fraction=0.9), 7)
    parts = np.array([5.0 / slow.participation(client, start).seconds for client in range(20) for start in range(100)])
    assert np.mean(parts < 1) == pytest.approx(0.9, abs=0.035)  # five standard errors
    assert np.mean(parts[parts < 1]) == pytest.approx(0.5, abs=0.035)


def test_a_duration_is_the_clients_own_or_drawn_each_round() -> None:
    each = {**LOGNORMAL, "drawn": "round"}
    assert seconds(3, 1, **LOGNORMAL) == seconds(3, 2, **LOGNORMAL) != seconds(4, 1, **LOGNORMAL)
    assert seconds(3, 1, **each) == seconds(3, 1, **each) != seconds(3, 2, **each)
    own = Devices(section(**LOGNORMAL), 7).own_seconds(np.arange(2000))
    assert own is not None
    assert np.median(own) == pytest.approx(10.0, rel=0.15)  # five standard errors of 1.25 / sqrt(2000)
    assert own[3] == seconds(3, 1, **LOGNORMAL)
    assert Devices(section(**each), 7).own_seconds(np.arange(3)) is None
