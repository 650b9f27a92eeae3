from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from rich.console import Console

from fedtrain.cli.members import Change, Comings, member_table, watching
from fedtrain.link.roster import Member


def member(name: str = "a", **more: Any) -> Member:
    known = {"connected": True, "text": "round 3: trains", "group": "3", "last_seen": 1.0}
    facts = {"device": "cuda:0", "num_examples": 1200}
    return Member(**{"name": name, "facts": facts, "bytes_up": 0, "bytes_down": 2_500_000, **known, **more})


def drawn(*members: Member, width: int = 80, height: int = 24) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=width).print(member_table(members, width, height))
    return [line.rstrip() for line in screen.getvalue().splitlines()]


def test_a_row_per_client() -> None:
    assert [line.split() for line in drawn(member(), member("b", connected=False, last_seen=7200))] == [
        ["client", "state", "round", "device", "examples", "seen", "up", "down"],
        ["a", "trains", "3", "cuda:0", "1,200", "now", "0", "B", "2.5", "MB"],
        ["b", "away", "3", "cuda:0", "1,200", "2", "h", "0", "B", "2.5", "MB"],
    ]


def test_sizes_that_privacy_does_not_tell_have_no_column() -> None:
    header, row = drawn(member(facts={"device": "cpu", "num_examples": None}))
    assert "examples" not in header
    assert "cpu" in row


@pytest.mark.parametrize("width", [80, 120])
def test_what_clients_say_cannot_leave_its_cell(width: int) -> None:
    evil = "\x1b[2J\x1b]8;;http://x\x07[red]\u202eclick[/red]\n" + "x" * 900
    bad = member("n" * 64, text=evil, group="9" * 64, facts={"device": evil, "num_examples": -1}, bytes_up=10**15)
    _, row = drawn(bad, width=width)
    assert len(row) <= width
    assert "[red]" in row
    assert row.isprintable()
    assert drawn(member(facts={"device": ["cpu"], "num_examples": True}))[1].split()[2:4] == ["3", "now"]


def test_clients_that_do_not_fit_are_counted() -> None:
    many = [member(f"c{n:03}", connected=n % 2 == 0) for n in range(100)]
    lines = drawn(*many, height=20)
    assert len(lines) == 15
    assert lines[-2].startswith("c012")
    assert lines[-1].startswith("and 87 more    43 here, 44 away")


@pytest.mark.parametrize(
    ("seconds", "connected", "seen"),
    [(3, True, "now"), (3, False, "3 s"), (42, True, "42 s"), (99 * 60, False, "99 min"), (10**6, False, "12 d")],
)
def test_last_seen(seconds: float, connected: bool, seen: str) -> None:
    assert f" {seen} " in drawn(member(last_seen=seconds, connected=connected))[1]


def test_who_comes_and_goes_is_told_once() -> None:
    comings, away = Comings(), member(connected=False)
    assert comings.changes([away]) == []
    assert [change.line() for change in comings.changes([member(), member("b", facts={})])] == [
        "a is here (cuda:0, 1,200 examples); 2 clients are here",
        "b is here; 2 clients are here",
    ]
    looks = [comings.changes([away, member("b")]) for _ in range(6)]
    assert [len(changes) for changes in looks] == [0, 0, 0, 1, 0, 0]
    assert looks[3][0].line() == "a is away; 1 client is here"
    assert [change.event() for change in comings.changes([member(), member("b")])] == [
        {"event": "client", "name": "a", "connected": True, "device": "cuda:0", "num_examples": 1200, "clients": 2}
    ]


def test_who_is_back_at_once_was_never_away() -> None:
    comings = Comings()
    comings.changes([member()])
    for _ in range(3):
        assert comings.changes([member(connected=False)]) == []
        assert comings.changes([member()]) == []


def test_what_a_client_says_cannot_forge_a_line() -> None:
    (change,) = Comings().changes([member(facts={"device": "cpu\nb is here", "num_examples": "1\n"})])
    assert change == Change("a", True, "cpu\N{REPLACEMENT CHARACTER}b is …", None, 1)


def test_watching_looks_until_it_ends() -> None:
    shown, twice = [], threading.Semaphore(0)

    def show(members: object) -> None:
        shown.append(members)
        twice.release()

    with watching(lambda: [member()], show):
        assert twice.acquire(timeout=60)
        assert twice.acquire(timeout=60)
    count = len(shown)
    assert shown == [[member()]] * count
    assert "fedtrain-members" not in {thread.name for thread in threading.enumerate()}


def test_a_reader_that_is_gone_ends_the_watch() -> None:
    def show(_: object) -> None:
        raise BrokenPipeError

    with watching(list, show):
        pass
