import json

import numpy as np
import pytest

from fedtrain.experiment.clients import ClientsSection
from fedtrain.server.schedule import Buffered, InStep, Turn, duration
from fedtrain.server.selection import Crowd
from fedtrain.strategies.base import Asynchrony

LOGNORMAL = {"kind": "lognormal", "seconds": 10.0, "sigma": 1.0}


def crowd(count: int = 20, **section: object) -> Crowd:
    return Crowd(ClientsSection.model_validate(section), 7, np.ones(count, dtype=np.int64))


def seconds(of: Crowd, client: int, start: int) -> float:
    assert of.section.duration is not None
    return duration(of.section.duration, of.seed, client, start)


def test_without_durations_a_round_is_everybody_who_was_drawn() -> None:
    drawn = crowd(per_round=3).draw(1).tolist()
    assert InStep(crowd(per_round=3)).turn(1) == Turn(drawn, [(client, 1) for client in drawn], wanted=3)


def test_over_selection_uses_the_first_to_finish() -> None:
    people = crowd(per_round=4, over_selection=2.0, duration=LOGNORMAL)
    turn = InStep(people).turn(1)
    times = {client: seconds(people, client, 1) for client in people.draw(1).tolist()}
    assert len(times) == 8
    assert turn.ask == sorted(sorted(times, key=times.__getitem__)[:4])
    assert turn.late == sorted(times.keys() - set(turn.ask))
    assert turn.seconds == max(times[client] for client in turn.ask)
    assert turn.wanted == 4


def test_a_deadline_drops_the_slow_and_the_round_lasts_until_it() -> None:
    people = crowd(duration=LOGNORMAL, deadline=10.0)
    turn = InStep(people).turn(1)
    assert turn.ask == [client for client in range(20) if seconds(people, client, 1) <= 10.0]
    assert 0 < len(turn.ask) < 20
    assert turn.seconds == 10.0
    assert (turn.wanted, len(turn.late)) == (20, 20 - len(turn.ask))


def test_partial_work_is_what_the_deadline_leaves_time_for() -> None:
    people = crowd(duration=LOGNORMAL, deadline=10.0, late="partial")
    turn = InStep(people).turn(1)
    assert turn.ask == list(range(20))
    assert turn.late == []
    assert turn.work == {c: 10.0 / seconds(people, c, 1) for c in range(20) if seconds(people, c, 1) > 10.0}
    assert turn.seconds == 10.0


def test_stragglers_are_a_fraction_and_their_part_is_uniform() -> None:
    people = crowd(duration={"kind": "stragglers", "seconds": 5.0, "fraction": 0.9})
    parts = np.array([5.0 / seconds(people, client, start) for client in range(20) for start in range(100)])
    assert np.mean(parts < 1) == pytest.approx(0.9, abs=0.035)  # five standard errors
    assert np.mean(parts[parts < 1]) == pytest.approx(0.5, abs=0.035)


def test_a_duration_is_the_clients_own_or_drawn_each_round() -> None:
    own, each = crowd(duration=LOGNORMAL), crowd(duration={**LOGNORMAL, "drawn": "round"})
    assert seconds(own, 3, 1) == seconds(own, 3, 2) != seconds(own, 4, 1)
    assert seconds(each, 3, 1) == seconds(each, 3, 1) != seconds(each, 3, 2)
    median = np.median([seconds(own, client, 1) for client in range(2000)])
    assert median == pytest.approx(10.0, rel=0.15)  # five standard errors of 1.25 / sqrt(2000)


def test_a_buffer_by_hand() -> None:
    # Three of three train, a buffer of two: whoever finishes starts anew on the newest model.
    people = crowd(3, duration={"kind": "constant", "seconds": 1.0})
    schedule = Buffered(people, Asynchrony(buffer_size=2, max_in_flight=3), {})
    first = schedule.turn(1)
    # All end at second 1; the first two by position fill the buffer, and who has trained on this model does not again.
    assert first == Turn([0, 1, 2], [(0, 1), (1, 1)], wanted=2, seconds=1.0)
    second = schedule.turn(2)
    # Client 2 comes in at second 1 with an old update and starts anew; client 0 follows at second 2.
    assert second == Turn([0, 1, 2], [(2, 1), (0, 2)], wanted=2, seconds=1.0)
    third = schedule.turn(3)
    assert third == Turn([0, 1], [(1, 2), (2, 2)], wanted=2, seconds=0.0)


def test_no_more_than_the_limit_train_at_once_and_slow_ones_become_stale() -> None:
    people = crowd(50, duration=LOGNORMAL)
    schedule = Buffered(people, Asynchrony(buffer_size=5, max_in_flight=10), {})
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


def test_a_buffer_goes_on_from_its_memory() -> None:
    people = crowd(50, duration=LOGNORMAL)
    whole = Buffered(people, Asynchrony(5, 10), {})
    turns = [whole.turn(number) for number in range(1, 7)]
    first = Buffered(people, Asynchrony(5, 10), {})
    for number in range(1, 4):
        first.turn(number)
    resumed = Buffered(people, Asynchrony(5, 10), json.loads(json.dumps(first.memory())))
    assert [resumed.turn(number) for number in range(4, 7)] == turns[3:]
