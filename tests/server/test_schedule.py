import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtrain.errors import RunError
from fedtrain.experiment.clients import ClientsSection
from fedtrain.server.devices import Devices, Pace, Traffic
from fedtrain.server.schedule import Schedule, Turn, virtual_schedule
from fedtrain.server.selection import Crowd
from fedtrain.server.traces import Traces, read_traces
from fedtrain.strategies.base import Asynchrony

LOGNORMAL = {"kind": "lognormal", "seconds": 10.0, "sigma": 1.0}
EQUAL = {"kind": "devices", "slowness_sigma": 0.0, "bandwidth_sigma": 0.0, "step_seconds": 0.5, "latency": 0.25}
TRAFFIC = Traffic(down=10_000_000, up=1_000_000)  # 2 s and 1 s by the default bandwidths


def crowd(count: int = 20, **section: object) -> Crowd:
    return Crowd(ClientsSection.model_validate(section), 7, np.ones(count, dtype=np.int64))


def devices(of: Crowd, traces: Traces | None = None) -> Devices:
    """Each client takes one step more than the one before it."""
    assert of.section.duration is not None
    count = len(of.sizes)
    return Devices(
        of.section.duration,
        of.seed,
        Pace(np.arange(1, count + 1), np.ones(count, np.int64), TRAFFIC, None, traces or Traces()),
    )


def in_step(of: Crowd, memory: dict[str, Any] | None = None) -> Schedule:
    return virtual_schedule(of, devices(of) if of.section.duration else None, None, memory or {})


def buffered(of: Crowd, size: int, in_flight: int, memory: dict[str, Any] | None = None) -> Schedule:
    return virtual_schedule(of, devices(of), Asynchrony(size, in_flight), memory or {})


def seconds(of: Crowd, client: int, start: int) -> float:
    return devices(of).participation(client, start).seconds


def test_without_durations_a_round_is_everybody_who_was_drawn() -> None:
    drawn = crowd(per_round=3).draw(1).tolist()
    assert in_step(crowd(per_round=3)).turn(1) == Turn(drawn, [(client, 1) for client in drawn], wanted=3)


def test_over_selection_uses_the_first_to_finish() -> None:
    people = crowd(per_round=4, over_selection=2.0, duration=LOGNORMAL)
    turn = in_step(people).turn(1)
    times = {client: seconds(people, client, 1) for client in people.draw(1).tolist()}
    assert len(times) == 8
    assert turn.ask == sorted(sorted(times, key=times.__getitem__)[:4])
    assert turn.late == sorted(times.keys() - set(turn.ask))
    assert turn.seconds == max(times[client] for client in turn.ask)
    assert turn.wanted == 4


def test_a_deadline_drops_the_slow_and_the_round_lasts_until_it() -> None:
    people = crowd(duration=LOGNORMAL, deadline=10.0)
    turn = in_step(people).turn(1)
    assert turn.ask == [client for client in range(20) if seconds(people, client, 1) <= 10.0]
    assert 0 < len(turn.ask) < 20
    assert turn.seconds == 10.0
    assert (turn.wanted, len(turn.late)) == (20, 20 - len(turn.ask))


def test_partial_work_is_what_the_deadline_leaves_time_for() -> None:
    people = crowd(duration=LOGNORMAL, deadline=10.0, late="partial")
    turn = in_step(people).turn(1)
    assert turn.ask == list(range(20))
    assert turn.late == []
    assert turn.work == {c: 10.0 / seconds(people, c, 1) for c in range(20) if seconds(people, c, 1) > 10.0}
    assert turn.seconds == 10.0


def test_rounds_on_equal_devices_by_hand() -> None:
    # 0.25 there, 2 s down, 0.5 s a step, 0.25 back, 1 s up: 4, 4.5, 5 and 5.5 s
    everybody = crowd(4, duration=EQUAL)
    assert in_step(everybody).turn(1) == Turn(
        [0, 1, 2, 3], [(0, 1), (1, 1), (2, 1), (3, 1)], wanted=4, late=[], seconds=5.5, client_seconds=19.0
    )
    first_two = crowd(4, duration=EQUAL, per_round=2, over_selection=2.0)
    assert in_step(first_two).turn(1) == Turn(
        [0, 1], [(0, 1), (1, 1)], wanted=2, late=[2, 3], seconds=4.5, client_seconds=17.5, wasted_seconds=9.0
    )
    in_time = crowd(4, duration=EQUAL, deadline=4.75)
    assert in_step(in_time).turn(1) == Turn(
        [0, 1], [(0, 1), (1, 1)], wanted=4, late=[2, 3], seconds=4.75, client_seconds=18.0, wasted_seconds=9.5
    )
    # By 4.25 s messages leave time for 0.75 s of 1, 1.5 and 2 s of work.
    partial = crowd(4, duration=EQUAL, deadline=4.25, late="partial")
    turn = in_step(partial).turn(1)
    assert (turn.ask, turn.late, turn.seconds) == ([0, 1, 2, 3], [], 4.25)
    assert turn.work == {1: 0.75, 2: 0.5, 3: 0.375}
    assert (turn.client_seconds, turn.wasted_seconds) == (16.75, 0.0)
    none = in_step(crowd(4, duration=EQUAL, deadline=3.75, late="partial")).turn(1)
    assert (none.ask, none.late) == ([], [0, 1, 2, 3])  # not even a step of 0.5 s


def test_a_round_waits_for_no_client_that_has_vanished() -> None:
    people = crowd(4, duration={**EQUAL, "dropout": 0.5})
    parts = [devices(people).participation(client, 1) for client in range(4)]
    there = [client for client in range(4) if parts[client].finished]
    assert 0 < len(there) < 4
    turn = in_step(people).turn(1)
    assert (turn.ask, turn.late, turn.wanted) == (there, sorted({0, 1, 2, 3} - set(there)), 4)
    assert turn.seconds == max(part.worked for part in parts)
    assert turn.wasted_seconds == pytest.approx(sum(part.vanishes for part in parts if not part.finished))
    assert turn.client_seconds == pytest.approx(sum(part.worked for part in parts))


def test_who_is_still_there_at_the_deadline_sends_partial_work_and_who_vanishes_before_does_not() -> None:
    people = crowd(20, duration={**EQUAL, "dropout": 0.7}, deadline=4.0, late="partial")
    parts = [devices(people).participation(client, 1) for client in range(20)]
    turn = in_step(people).turn(1)
    assert turn.ask == [c for c in range(20) if parts[c].vanishes > 4.0]
    assert any(not parts[c].finished for c in turn.ask)
    assert any(parts[c].vanishes <= 4.0 for c in turn.late)


def test_who_is_not_there_is_not_asked() -> None:
    people = crowd(300, duration={**EQUAL, "availability": {"period": 1000.0, "share": 0.3}}, per_round=10)
    schedule, now = in_step(people), 0.0
    for number in range(1, 40):
        here = devices(people).here(now)
        assert here is not None
        turn = schedule.turn(number)
        assert here[[*turn.ask, *turn.late]].all()
        assert len(turn.ask) + len(turn.late) == turn.wanted == 10
        now += turn.seconds
    assert schedule.memory() == {"now": now}


def windows(folder: Path, people: Crowd, text: str) -> Traces:
    (folder / "windows.csv").write_text("client,start,end\n" + text)
    return read_traces(people.section.duration, 7, folder, [str(client) for client in range(len(people.sizes))])


AT_TIMES = {**EQUAL, "availability": {"kind": "file", "file": "windows.csv"}}


def test_where_nobody_is_there_the_clock_goes_on_to_the_next_window(tmp_path: Path) -> None:
    people = crowd(4, duration=AT_TIMES, per_round=2)
    seen = windows(tmp_path, people, "3,100,105.5\n2,104,200\n2,300,302\n")
    schedule = virtual_schedule(people, devices(people, seen), None, {})
    turns = [schedule.turn(number) for number in (1, 2, 3)]
    # Client 3 takes 5.5 s; client 2, which is there from 104 on, 5 s.
    assert [(turn.ask, turn.late, turn.wanted) for turn in turns] == [([3], [], 1), ([2], [], 1), ([2], [], 1)]
    assert [turn.seconds for turn in turns] == [105.5, 5.0, 5.0]
    assert [turn.client_seconds for turn in turns] == [5.5, 5.0, 5.0]
    for number in range(4, 20):
        assert schedule.turn(number).ask == [2]
    assert schedule.turn(20).late == [2]  # it starts at 195.5 and has to leave at 200
    last = schedule.turn(21)
    assert (last.ask, last.late, last.client_seconds, last.wasted_seconds) == ([], [2], 2.0, 2.0)
    with pytest.raises(RunError, match=r"no client is there any more.* got second 302 .*Give its windows a period"):
        schedule.turn(22)


def test_a_buffer_by_hand() -> None:
    # Three of three train, a buffer of two: whoever finishes starts anew on the newest model.
    people = crowd(3, duration={"kind": "constant", "seconds": 1.0})
    schedule = buffered(people, 2, 3)
    first = schedule.turn(1)
    # All end at second 1; the first two by position fill the buffer, and who has trained on this model does not again.
    assert first == Turn([0, 1, 2], [(0, 1), (1, 1)], wanted=2, late=[], seconds=1.0, client_seconds=3.0)
    second = schedule.turn(2)
    # Client 2 comes in at second 1 with an old update and starts anew; client 0 follows at second 2.
    assert second == Turn([0, 1, 2], [(2, 1), (0, 2)], wanted=2, late=[], seconds=1.0, client_seconds=3.0)
    third = schedule.turn(3)
    assert third == Turn([0, 1], [(1, 2), (2, 2)], wanted=2, late=[], seconds=0.0)


def test_no_more_than_the_limit_train_at_once_and_slow_ones_become_stale() -> None:
    people = crowd(50, duration=LOGNORMAL)
    schedule = buffered(people, 5, 10)
    training: set[tuple[int, int]] = set()
    stale = []
    for number in range(1, 40):
        turn = schedule.turn(number)
        assert len(turn.use) == 5
        training |= {(client, number) for client in turn.ask}
        assert training.issuperset(turn.use)
        training -= set(turn.use)
        assert len(training) <= 10
        stale += [number - start for _, start in turn.use]
    assert min(stale) == 0
    assert max(stale) > 2


def test_a_place_is_taken_when_somebody_comes(tmp_path: Path) -> None:
    people = crowd(4, duration=AT_TIMES)
    seen = windows(tmp_path, people, "0,10,50\n1,11,50\n2,12,14\n")
    schedule = virtual_schedule(people, devices(people, seen), Asynchrony(buffer_size=2, max_in_flight=3), {})
    turn = schedule.turn(1)
    # 0 works from 10 to 14, 1 from 11 to 15.5, and 2 vanishes at 14. Nobody starts twice on one model.
    assert (turn.ask, turn.late, turn.use) == ([0, 1], [2], [(0, 1), (1, 1)])
    assert (turn.seconds, turn.client_seconds, turn.wasted_seconds) == (15.5, 10.5, 2.0)
    second = schedule.turn(2)
    assert (second.ask, second.use, second.seconds) == ([0, 1], [(0, 2), (1, 2)], 4.5)
    for number in range(3, 9):
        schedule.turn(number)
    assert schedule.turn(9).use == []  # both vanish at 50
    with pytest.raises(RunError, match="no client is there any more"):
        schedule.turn(10)


def test_places_of_the_vanished_are_taken_by_others() -> None:
    people = crowd(200, duration={**LOGNORMAL_DEVICES, "dropout": 0.4})
    schedule, asked, worked, wasted, gone, used = buffered(people, 5, 10), 0, 0.0, 0.0, 0, 0
    for number in range(1, 200):
        turn = schedule.turn(number)
        assert not set(turn.ask) & set(turn.late)
        assert turn.client_seconds == pytest.approx(10 * turn.seconds)  # all places are taken at any time
        assert 0 <= turn.wasted_seconds <= turn.client_seconds
        asked, gone, used = asked + len(turn.ask), gone + len(turn.late), used + len(turn.use)
        worked, wasted = worked + turn.client_seconds, wasted + turn.wasted_seconds
    assert used == 5 * 199
    assert gone / (asked + gone) == pytest.approx(0.4, abs=0.06)
    # A dropout comes after half of the time: 0.4 * 0.5 of 0.6 + 0.4 * 0.5 wholes.
    assert wasted / worked == pytest.approx(0.25, abs=0.05)


LOGNORMAL_DEVICES = {"kind": "devices", "step_seconds": 0.5}
CLOCKS: dict[str, Any] = {
    "drawn once": LOGNORMAL,
    "drawn each round": {**LOGNORMAL, "drawn": "round"},
    "stragglers": {"kind": "stragglers", "fraction": 0.5},
    "devices": {**LOGNORMAL_DEVICES, "dropout": 0.2, "availability": {"period": 70.0, "share": 0.4}},
}


@settings(max_examples=60)
@given(clock=st.sampled_from(sorted(CLOCKS)), asynchronous=st.booleans(), at=st.integers(0, 11), data=st.data())
def test_a_schedule_goes_on_from_its_memory(clock: str, asynchronous: bool, at: int, data: st.DataObject) -> None:
    section: dict[str, Any] = {"duration": CLOCKS[clock]}
    if not asynchronous:
        deadline = data.draw(st.none() | st.just(12.0))
        section |= {"per_round": 5, "over_selection": 1.5}
        section |= {"deadline": deadline, "late": data.draw(st.sampled_from(["drop", "partial"]))} if deadline else {}
    people = crowd(40, **section)

    def schedule(memory: dict[str, Any]) -> Schedule:
        return buffered(people, 5, 10, memory) if asynchronous else in_step(people, memory)

    whole, first = schedule({}), schedule({})
    turns = [whole.turn(number) for number in range(1, 13)]
    assert [first.turn(number) for number in range(1, at + 1)] == turns[:at]
    resumed = schedule(json.loads(json.dumps(first.memory())))
    assert [resumed.turn(number) for number in range(at + 1, 13)] == turns[at:]
    assert resumed.memory() == whole.memory()


def expected_smallest(k: int, n: int, survival: npt.NDArray[np.float64], times: npt.NDArray[np.float64]) -> float:
    """E of the k-th smallest of n: the integral of P(fewer than k of them have come)."""
    come = 1 - survival
    fewer = sum(math.comb(n, j) * come**j * survival ** (n - j) for j in range(k))
    return float(np.trapezoid(fewer, times))


@pytest.mark.parametrize(("k", "n"), [(10, 10), (10, 13), (5, 20)])
def test_a_round_takes_as_long_as_the_kth_smallest_of_n_lognormals(k: int, n: int) -> None:
    duration = {**LOGNORMAL, "sigma": 0.6, "drawn": "round"}
    schedule = in_step(crowd(n, per_round=k, over_selection=n / k, duration=duration))
    mean = np.mean([schedule.turn(number).seconds for number in range(1, 2500)])
    times = np.linspace(1e-9, 500, 100_000)
    survival = np.array([0.5 * math.erfc(z) for z in np.log(times / 10) / 0.6 / math.sqrt(2)])
    assert mean == pytest.approx(expected_smallest(k, n, survival, times), rel=0.02)


@pytest.mark.parametrize(("k", "n"), [(10, 10), (10, 13), (5, 20)])
def test_a_round_takes_as_long_as_the_kth_smallest_of_n_exponentials(k: int, n: int, tmp_path: Path) -> None:
    # A file may hold devices of any kind: here those whose steps take exponential times.
    steps = -np.log((np.arange(20_000) + 0.5) / 20_000)
    lines = "".join(f"{value},1e9\n" for value in steps)
    (tmp_path / "devices.csv").write_text("computation,communication\n" + lines)
    people = crowd(
        20_000,
        per_round=k,
        over_selection=n / k,
        duration={"kind": "device-file", "file": "devices.csv", "step_seconds": "file", "latency": 0.0},
    )
    traces = read_traces(people.section.duration, 7, tmp_path, ["client"] * 20_000)
    pace = Pace(np.full(20_000, 1000), np.full(20_000, 1), Traffic(0, 0), None, traces)
    assert people.section.duration is not None
    schedule = virtual_schedule(people, Devices(people.section.duration, 7, pace), None, {})
    mean = np.mean([schedule.turn(number).seconds for number in range(1, 2500)])
    times = np.linspace(0, 100, 100_000)
    assert mean == pytest.approx(expected_smallest(k, n, np.exp(-times / 3), times), rel=0.02)


def test_a_buffer_fills_as_fast_as_those_in_flight_finish() -> None:
    people = crowd(500, duration={**LOGNORMAL, "sigma": 0.6, "drawn": "round"})
    schedule = buffered(people, 10, 40)
    for number in range(1, 20):  # all start at once, and only later at any time
        schedule.turn(number)
    turns = [schedule.turn(number) for number in range(20, 1000)]
    throughput = sum(len(turn.use) for turn in turns) / sum(turn.seconds for turn in turns)
    assert throughput == pytest.approx(40 / (10 * math.exp(0.6**2 / 2)), rel=0.02)
