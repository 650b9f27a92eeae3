"""Clients that are really killed, at any moment, never leave a ledger that counts less than was released."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fedtrain.errors import LedgerError
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.book import Account, Book
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.policy import Policy, Request

ACCOUNT = Account("north", "f" * 64, "sample")
POLICY = Policy(max_epsilon=1e9, delta=1e-5)
STEPS = 8
Client = Callable[[Path, str], subprocess.Popen[str]]

# What a client does, and where it dies: python -c CLIENT FOLDER POINT
CLIENT = """
import os, resource, signal, sys, time
from pathlib import Path
from fedtrain.privacy.book import Account
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.policy import Policy, Request

folder, point = Path(sys.argv[1]), sys.argv[2]
policy = Policy(max_epsilon=1e9, delta=1e-5)


def request(number):
    return Request("run-1", number, "xray", "a" * 64, "cnn", 10, 40, "sample", 2.0, 0.5, 8)


def open_ledger():
    return Ledger(folder, Account("north", "f" * 64, "sample"), lambda history, delta: sum(c.steps for c in history))


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_line(file, content):
    write(file, content[: len(content) // 2])
    die()


write = os.write
if point == "first line":
    os.write = die_in_the_line
elif point == "first head":
    Path.replace = die
if point == "contend":
    for number in range(1, 21):
        while True:
            try:
                with open_ledger() as ledger:
                    ledger.reserve(request(number), policy)
                break
            except Exception as error:
                assert "another process holds" in str(error), error
                time.sleep(0.001)
    sys.exit()
ledger = open_ledger()
if point == "line":
    os.write = die_in_the_line
elif point == "after line":
    os.fsync = die
elif point == "head":
    Path.replace = die
elif point == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # in the middle of a line
if point == "loop":
    for number in range(1, 100_000):
        reservation = ledger.reserve(request(number), policy)
        print("r", reservation, flush=True)
        if number % 2:
            ledger.commit(reservation, 4)
            print("c", reservation, flush=True)
if point == "full":
    for number in range(1, 100):
        ledger.reserve(request(number), policy)
        print(number, flush=True)
reservation = ledger.reserve(request(1), policy)
print(reservation, flush=True)
if point == "commit line":
    os.write = die_in_the_line
    ledger.commit(reservation, 4)
if point == "after commit":
    ledger.commit(reservation, 4, "b" * 64)
    die()
time.sleep(60)
"""


def count_steps(history: Sequence[Spend], delta: float) -> float:
    return sum(charge.steps for charge in history)


def opened(folder: Path) -> Ledger:
    return Ledger(folder, ACCOUNT, count_steps)


def request(number: int) -> Request:
    return Request("run-1", number, "xray", "a" * 64, "cnn", 10, 40, "sample", 2.0, 0.5, STEPS)


@pytest.fixture
def client() -> Iterator[Client]:
    """Start a client in another process; none outlives the test."""
    with contextlib.ExitStack() as started:

        def start(folder: Path, point: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", CLIENT, str(folder), point]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield start


def finished(process: subprocess.Popen[str], code: int) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return out


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_killed_between_reserve_and_commit_counts_in_full_and_the_round_is_charged_again(
    client: Client, tmp_path: Path
) -> None:
    process = client(tmp_path, "train")
    reservation = said(process)
    process.kill()
    finished(process, -signal.SIGKILL)
    with opened(tmp_path) as ledger:
        assert ledger.spent(1e-5) == STEPS
        assert not ledger.resendable("run-1", 1, "b" * 64)
        ledger.reserve(request(1), POLICY)
        assert ledger.spent(1e-5) == 2 * STEPS
        ledger.commit(reservation, 3)  # its update had been finished, and lay on the disk
        assert ledger.spent(1e-5) == STEPS + 3


@pytest.mark.parametrize(
    ("point", "spent", "note"),
    [
        ("first line", 0, "it is left out"),
        ("first head", 0, None),
        ("line", 0, "it is left out"),
        ("after line", STEPS, "it counts all the same"),
        ("head", STEPS, "it counts all the same"),
        ("commit line", STEPS, "it is left out"),
        ("after commit", 4, None),
    ],
)
def test_killed_at_each_point_of_an_append(
    client: Client, tmp_path: Path, point: str, spent: float, note: str | None
) -> None:
    finished(client(tmp_path, point), -signal.SIGKILL)
    with opened(tmp_path) as ledger:
        assert ledger.spent(1e-5) == spent
        assert [note in text for text in ledger.notes] == [True] if note else ledger.notes == []
        assert ledger.resendable("run-1", 1, "b" * 64) == (point == "after commit")
        ledger.reserve(request(2), POLICY)
    book = Book(ACCOUNT.path(tmp_path), count_steps)
    assert book.spent(1e-5) == spent + STEPS
    assert book.notes == []


def test_killed_at_any_moment_every_reservation_that_returned_is_there(client: Client, tmp_path: Path) -> None:
    returned: dict[str, bool] = {}  # reservation -> whether its commit returned
    for kills, milliseconds in enumerate((1, 3, 7, 12, 20, 31), start=1):
        process = client(tmp_path, "loop")
        first = said(process)
        time.sleep(milliseconds / 1000)
        process.kill()
        assert process.stdout is not None
        rest = process.stdout.read().splitlines()  # communicate() would pass over what came along with the first line
        finished(process, -signal.SIGKILL)
        for line in [first, *rest]:
            kind, _, reservation = line.partition(" ")
            if len(reservation) == 64:  # the last line may be cut short
                returned[reservation] = kind == "c"
        book = Book(ACCOUNT.path(tmp_path), count_steps)
        found = {pair["sha256"] for pair in book.export()["entries"] if pair["entry"]["kind"] == "reservation"}
        assert returned.keys() <= found
        assert len(found) <= len(returned) + kills  # one more per kill at most
        assert book.spent(1e-5) <= STEPS * len(found)
        assert book.spent(1e-5) >= sum(4 if committed else STEPS for committed in returned.values()) - 4 * kills


def test_a_second_process_is_refused_until_the_first_has_died(client: Client, tmp_path: Path) -> None:
    process = client(tmp_path, "train")
    said(process)
    with pytest.raises(LedgerError, match="another process holds the privacy ledger"):
        opened(tmp_path)
    process.kill()
    finished(process, -signal.SIGKILL)
    with opened(tmp_path) as ledger:
        assert ledger.spent(1e-5) == STEPS


def test_processes_that_take_turns_lose_nothing(client: Client, tmp_path: Path) -> None:
    opened(tmp_path).close()
    processes = [client(tmp_path, "contend") for _ in range(3)]
    for process in processes:
        finished(process, 0)
    assert Book(ACCOUNT.path(tmp_path), count_steps).spent(1e-5) == 3 * 20 * STEPS


def test_a_disk_that_is_really_full_in_mid_line(client: Client, tmp_path: Path) -> None:
    process = client(tmp_path, "full")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot be used (File too large)" in err
    reserved = len(out.split())
    assert reserved > 0
    assert ACCOUNT.path(tmp_path).stat().st_size == 1500
    with opened(tmp_path) as ledger:
        assert ledger.spent(1e-5) == reserved * STEPS
        assert "it is left out" in ledger.notes[0]
        ledger.reserve(request(50), POLICY)
