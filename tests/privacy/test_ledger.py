import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtrain.errors import BudgetError, LedgerError, PolicyError, PrivacyError
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.book import Account, Book, across_clients, ledgers
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.policy import Policy, Request

ACCOUNT = Account("hospital/north", "f" * 64, "sample")
POLICY = Policy(max_epsilon=10.0, delta=1e-5)
REQUEST = Request(
    run="run-1",
    round_number=1,
    experiment="xray",
    experiment_hash="a" * 64,
    task="cnn",
    parameters=10,
    model_bytes=40,
    unit="sample",
    noise_multiplier=2.0,
    sample_rate=0.5,
    steps=8,
)
UPDATE = "b" * 64


def epsilon_of(history: Sequence[Spend], delta: float) -> float:
    """An accountant to reckon by hand: steps * rate / noise, so that REQUEST costs 2."""
    assert history
    assert delta == POLICY.delta
    return sum(charge.steps * charge.sample_rate / charge.noise_multiplier for charge in history)


def opened(folder: Path, account: Account = ACCOUNT, known_head: str | None = None) -> Ledger:
    return Ledger(folder, account, epsilon_of, known_head)


def read(folder: Path) -> Book:
    return Book(ACCOUNT.path(folder), epsilon_of)


def asked(round_number: int, **others: object) -> Request:
    return replace(REQUEST, round_number=round_number, **others)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ledger of six entries: spent 2 + 1 + 2, the last not committed. Read it only."""
    folder = tmp_path_factory.mktemp("written")
    with opened(folder) as ledger:
        ledger.commit(ledger.reserve(asked(1), POLICY), 8, UPDATE)
        ledger.commit(ledger.reserve(asked(2), POLICY), 4)
        ledger.reserve(asked(3), POLICY)
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "copied")


def test_a_reservation_counts_in_full_until_it_is_committed(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        assert ledger.spent(1e-5) == 0
        first = ledger.reserve(asked(1), POLICY)
        assert ledger.spent(1e-5) == 2
        ledger.commit(first, 4)
        assert ledger.spent(1e-5) == 1
        ledger.reserve(asked(2), POLICY)
        assert ledger.history() == [Spend(2.0, 0.5, 12)]
        ledger.reserve(asked(3, noise_multiplier=4.0), POLICY)
        assert ledger.history() == [Spend(2.0, 0.5, 12), Spend(4.0, 0.5, 8)]
    assert read(tmp_path).history() == [Spend(2.0, 0.5, 12), Spend(4.0, 0.5, 8)]


def test_it_goes_on_over_restarts_runs_and_servers(tmp_path: Path) -> None:
    for number, run in enumerate(["run-1", "run-1", "another"], start=1):
        with opened(tmp_path) as ledger:
            ledger.reserve(asked(number, run=run), POLICY)
    assert read(tmp_path).spent(1e-5) == 6
    assert read(tmp_path).summary(1e-5).runs == 2


def test_a_reservation_is_committed_by_a_later_process(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reservation = ledger.reserve(asked(1), POLICY)
    with opened(tmp_path) as ledger:
        ledger.commit(reservation, 2)
        assert ledger.spent(1e-5) == 0.5


def test_the_same_round_trained_again_is_charged_again(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        ledger.reserve(asked(1), POLICY)  # crashed
        ledger.commit(ledger.reserve(asked(1), POLICY), 8, UPDATE)
        assert ledger.spent(1e-5) == 4
        assert [(spend.round_number, spend.committed) for spend in ledger.rounds(1e-5)] == [(1, False), (1, True)]


def test_only_the_very_update_that_was_committed_is_sent_again_for_nothing(written: Path) -> None:
    book = read(written)
    assert book.resendable("run-1", 1, UPDATE)
    assert not book.resendable("run-1", 1, "c" * 64)
    assert not book.resendable("run-1", 2, UPDATE)
    assert not book.resendable("run-2", 1, UPDATE)


@pytest.mark.parametrize("steps", [0, -1, 9])
def test_a_commit_takes_no_more_than_was_reserved_and_gives_nothing_back_whole(tmp_path: Path, steps: int) -> None:
    with opened(tmp_path) as ledger:
        reservation = ledger.reserve(asked(1), POLICY)
        with pytest.raises(PrivacyError, match=rf"{steps} steps where 8 were reserved.*must not be sent"):
            ledger.commit(reservation, steps)
        assert ledger.spent(1e-5) == 2
    assert read(tmp_path).spent(1e-5) == 2


def test_a_commit_happens_once_and_of_something_reserved(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reservation = ledger.reserve(asked(1), POLICY)
        ledger.commit(reservation, 8)
        with pytest.raises(PrivacyError, match="commits what is committed"):
            ledger.commit(reservation, 1)
        with pytest.raises(PrivacyError, match="commits what was never reserved"):
            ledger.commit("0" * 64, 1)
        assert ledger.spent(1e-5) == 2
    assert not hasattr(Ledger, "release")


def test_the_round_that_would_overspend_is_refused_before_it_begins(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        for number in range(1, 6):  # up to the very budget
            assert ledger.affordable(asked(number), POLICY) == 2 * number
            ledger.reserve(asked(number), POLICY)
        before = ledger.head
        with pytest.raises(BudgetError) as error:
            ledger.reserve(asked(6, steps=1), POLICY)
        assert ledger.head == before
        when = ledger.rounds(1e-5)[-1].time
    assert str(error.value) == (
        "round 6 of run run-1 would overspend the privacy budget: got epsilon 10.25; expected at most 10 at delta "
        f"1e-05. Epsilon 10 was spent up to round 5 of run run-1, at {when}; this client has ended for these data"
    )


@pytest.mark.parametrize("price", [float("nan"), float("inf"), 10.01])
def test_what_cannot_be_counted_cannot_be_afforded(tmp_path: Path, price: float) -> None:
    with Ledger(tmp_path, ACCOUNT, lambda history, delta: price) as ledger:
        with pytest.raises(BudgetError, match="Nothing was spent before"):
            ledger.reserve(asked(1), POLICY)
        assert ledger.history() == []


def test_the_policy_beats_the_server_in_reserve_itself(tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"least_noise_multiplier": 3.0, "tasks": ["mlp"]})
    with opened(tmp_path) as ledger:
        with pytest.raises(PolicyError, match=r"round 1 of run run-1: noise_multiplier 2.0.*at least 3; task cnn"):
            ledger.reserve(asked(1), policy)
        with pytest.raises(PolicyError, match="unit client: this ledger is of unit sample"):
            ledger.reserve(asked(1, unit="client"), POLICY.model_copy(update={"unit": "client"}))
        assert ledger.history() == []


def test_each_client_each_data_set_and_each_unit_has_its_own(tmp_path: Path) -> None:
    accounts = [
        ACCOUNT,
        replace(ACCOUNT, client_id="../../etc/passwd"),
        replace(ACCOUNT, fingerprint="e" * 64),
        replace(ACCOUNT, unit="client"),
    ]
    for account in accounts:
        opened(tmp_path, account).close()
    assert {Book(path, epsilon_of).account for path in ledgers(tmp_path)} == set(accounts)
    assert {path.parent for path in ledgers(tmp_path)} == {tmp_path}


def test_each_rounds_increment_and_the_total(written: Path) -> None:
    spends = read(written).rounds(1e-5)
    assert [(s.round_number, s.steps, s.committed, s.epsilon, s.increment) for s in spends] == [
        (1, 8, True, 2.0, 2.0),
        (2, 4, True, 3.0, 1.0),
        (3, 8, False, 5.0, 2.0),
    ]
    summary = read(written).summary(1e-5)
    assert (summary.epsilon, summary.rounds, summary.uncommitted, summary.steps) == (5.0, 3, 1, 20)
    assert (summary.first, summary.last) == (spends[0].time, spends[-1].time)
    assert (summary.account, summary.relation, summary.entries) == (ACCOUNT, "add/remove", 6)


def test_clients_with_disjoint_data_compose_to_the_largest() -> None:
    assert across_clients([2.0, 5.0, 3.0]) == 5.0
    assert across_clients([]) == 0


def test_an_export_can_be_checked_without_fedtrain(written: Path) -> None:
    export = json.loads(json.dumps(read(written).export()))
    previous = "0" * 64
    for pair in export["entries"]:
        assert pair["entry"]["previous"] == previous
        previous = hashlib.sha256(json.dumps(pair["entry"], separators=(",", ":")).encode()).hexdigest()
        assert pair["sha256"] == previous
    assert export["head"] == previous
    assert len(export["entries"]) == 6


def damages(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that differ from the content: changed, cut, added, lines moved."""
    places = st.integers(0, len(content) - 1)
    lines = content.splitlines(keepends=True)
    return st.one_of(
        st.builds(
            lambda at, bit: content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :],
            places,
            st.integers(0, 7),
        ),
        st.builds(lambda at: content[:at], places),
        st.builds(lambda at, more: content[:at] + more + content[at:], places, st.binary(min_size=1, max_size=3)),
        st.builds(lambda at: content[:at] + content[at + 1 :], places),
        st.permutations(lines).map(b"".join),
        st.builds(lambda at: b"".join(lines[:at] + lines[at + 1 :]), st.integers(0, len(lines) - 1)),
        st.binary(max_size=100).map(lambda more: content + more + b"\n"),
    ).filter(lambda damaged: damaged != content)


@pytest.mark.parametrize("kind", [".jsonl", ".head"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_to_either_file_is_refused(kind: str, copied: Path, data: st.DataObject) -> None:
    path = ACCOUNT.path(copied).with_suffix(kind)
    content = path.read_bytes()
    damaged = data.draw(damages(content))
    path.write_bytes(damaged)
    try:
        with pytest.raises(LedgerError, match="was damaged or changed"):
            read(copied)
        with pytest.raises(LedgerError, match="was damaged or changed"):
            opened(copied)
        assert path.read_bytes() == damaged
    finally:
        path.write_bytes(content)


def test_a_bit_of_any_byte_of_both_files_counts(copied: Path) -> None:
    for path in copied.iterdir():
        content = path.read_bytes()
        for at in range(0, len(content), 1 if path.suffix == ".head" else 5):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            with pytest.raises(LedgerError):
                read(copied)
        path.write_bytes(content)
    assert read(copied).spent(1e-5) == 5


@pytest.mark.parametrize(
    ("forged", "complaint"),
    [
        ({"kind": "commit", "steps_taken": 0, "update_sha256": None}, "line 7 tells of 0 steps where 8 were reserved"),
        ({"kind": "reservation", "steps": -20}, "line 7 is no entry"),
        ({"kind": "reservation", "noise_multiplier": -2.0}, "line 7 is no entry"),
        ({"kind": "reservation", "sample_rate": 0.0}, "line 7 is no entry"),
        ({"kind": "opening"}, "line 7 is no entry"),
    ],
)
def test_a_chain_that_was_forged_is_read_for_its_sense(copied: Path, forged: dict, complaint: str) -> None:
    """What would give spent epsilon back is no entry, although it is rightly chained and the head knows of it."""
    last = read(copied).export()["entries"][-1]
    entry = {**last["entry"], "previous": last["sha256"], **forged}
    if entry["kind"] == "commit":
        entry = {key: entry[key] for key in ("previous", "time", "kind", "steps_taken", "update_sha256")}
        entry["reservation"] = last["sha256"]
    line = json.dumps(entry, separators=(",", ":")).encode()
    with ACCOUNT.path(copied).open("ab") as file:
        file.write(line + b"\n")
    ACCOUNT.path(copied).with_suffix(".head").write_text(f"7 {hashlib.sha256(line).hexdigest()}\n")
    with pytest.raises(LedgerError, match=complaint):
        read(copied)


@pytest.mark.parametrize("lost", [".jsonl", ".head"])
def test_either_file_missing_is_refused(copied: Path, lost: str) -> None:
    ACCOUNT.path(copied).with_suffix(lost).unlink()
    assert ledgers(copied) == [ACCOUNT.path(copied)]
    for reads in (read, opened, opened):  # the second opening finds what the first left
        with pytest.raises(LedgerError, match=r"was damaged or changed.*Nothing is trained on these data"):
            reads(copied)


def test_an_old_copy_of_the_ledger_is_refused(copied: Path) -> None:
    path = ACCOUNT.path(copied)
    old = path.read_bytes()
    with opened(copied) as ledger:
        ledger.reserve(asked(4), POLICY)
    path.write_bytes(old)
    with pytest.raises(LedgerError, match="it has 6 whole entries, its head tells of 7"):
        opened(copied)


def test_an_old_copy_of_both_files_is_refused_where_somebody_remembers_the_head(copied: Path, tmp_path: Path) -> None:
    old = shutil.copytree(copied, tmp_path / "old")
    with opened(copied) as ledger:
        earlier = ledger.head
        ledger.reserve(asked(4), POLICY)
        known = ledger.head
    opened(copied, known_head=known).close()
    opened(copied, known_head=earlier).close()  # a server that was away for a while
    opened(old).close()  # alone, the two files cannot tell
    for folder in (old, tmp_path / "deleted"):
        for _ in range(2):
            with pytest.raises(LedgerError, match=r"an older copy, or not the one.*expected an entry"):
                opened(folder, known_head=known)
    assert read(old).spent(1e-5) == 5


def test_a_ledger_of_another_client_under_this_name_is_refused(copied: Path) -> None:
    other = replace(ACCOUNT, client_id="south")
    for kind in (".jsonl", ".head"):
        shutil.copy(ACCOUNT.path(copied).with_suffix(kind), other.path(copied).with_suffix(kind))
    with pytest.raises(LedgerError, match="it belongs to the client hospital/north"):
        opened(copied, other)


def test_a_line_that_a_crash_cut_short_is_left_out_and_said(copied: Path) -> None:
    path = ACCOUNT.path(copied)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole.splitlines()[-1])  # all but its newline
    assert read(copied).notes == ["a crash came before the last entry was whole: it is left out, for nothing had begun"]
    assert path.stat().st_size > len(whole)  # reading changes nothing
    with opened(copied) as ledger:
        assert len(ledger.notes) == 1
        assert ledger.spent(1e-5) == 5
        assert path.read_bytes() == whole
        ledger.reserve(asked(4), POLICY)
    assert read(copied).notes == []
    assert read(copied).spent(1e-5) == 7


def test_a_crash_leaves_one_line_more_than_the_head_knows_and_no_second(copied: Path) -> None:
    path = ACCOUNT.path(copied)
    head = path.with_suffix(".head").read_text()
    with opened(copied) as ledger:
        ledger.reserve(asked(4), POLICY)
    one_more = path.read_bytes()
    path.with_suffix(".head").write_text(head)
    assert read(copied).notes == ["a crash came before the last entry could be used: it counts all the same"]
    assert read(copied).spent(1e-5) == 7
    path.write_bytes(one_more + b"{")
    with pytest.raises(LedgerError, match="it has 7 whole entries, its head tells of 6"):
        opened(copied)


def test_no_ledger_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no privacy ledger"):
        read(tmp_path)
    assert ledgers(tmp_path) == []


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half(write: Callable[[int, bytes], int]) -> Callable[[int, bytes], int]:
    """Write half of it, then be full."""
    calls: list[int] = []

    def writes(file: int, content: bytes) -> int:
        calls.append(file)
        return write(file, content[: len(content) // 2]) if len(calls) == 1 else full()

    return writes


@pytest.mark.parametrize(
    ("where", "failing", "afterwards"),
    [
        ("os.write", full, 5),
        ("os.write", half(os.write), 5),
        ("os.fsync", full, 7),  # the line is there, and may be durable: it counts
        ("pathlib.Path.replace", full, 7),
    ],
)
def test_a_full_disk_means_no_reservation_and_never_an_undercount(
    copied: Path, monkeypatch: pytest.MonkeyPatch, where: str, failing: Callable, afterwards: float
) -> None:
    with opened(copied) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(where, failing)
            with pytest.raises(LedgerError, match=r"cannot be used \(No space left.*Free some space and start again"):
                ledger.reserve(asked(4), POLICY)
        with pytest.raises(LedgerError, match=r"could not be written before.*Open it again"):
            ledger.reserve(asked(4), POLICY)
    with opened(copied) as ledger:
        assert ledger.spent(1e-5) == afterwards
        ledger.reserve(asked(4, steps=4), POLICY)
    assert read(copied).spent(1e-5) == afterwards + 1


def test_a_full_disk_in_a_commit_leaves_the_reservation_counted_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as ledger:
        reservation = ledger.reserve(asked(1), POLICY)
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(LedgerError, match="No space left"):
            ledger.commit(reservation, 1)
    assert read(tmp_path).spent(1e-5) == 2


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=r"cannot be used \(File exists\).*Make its folder readable and writable"):
        opened(tmp_path / "file" / "ledgers")


def test_the_line_is_on_the_disk_before_its_head_and_both_before_reserve_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened(tmp_path)
    done: list[str] = []
    write, fsync, rename = os.write, os.fsync, Path.replace

    monkeypatch.setattr(os, "write", lambda file, content: (done.append("write"), write(file, content))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(f"sync {os.fstat(file).st_ino}"), fsync(file))[1])
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (done.append(f"head {path.stat().st_ino}"), rename(path, to))[1]
    )
    with ledger:
        ledger.reserve(asked(1), POLICY)
    line, head = (ACCOUNT.path(tmp_path).with_suffix(kind).stat().st_ino for kind in (".jsonl", ".head"))
    assert done == ["write", f"sync {line}", f"sync {head}", f"head {head}", f"sync {tmp_path.stat().st_ino}"]


@pytest.mark.parametrize("touch", ["replaced", "appended", "deleted", "head", "truncated"])
def test_what_is_done_to_the_files_while_they_are_held_is_noticed(copied: Path, touch: str) -> None:
    path = ACCOUNT.path(copied)
    with opened(copied) as ledger:
        if touch == "replaced":
            shutil.copy(path, copied / "copy")
            (copied / "copy").replace(path)
        elif touch == "appended":
            path.write_bytes(path.read_bytes() + b"{}\n")
        elif touch == "truncated":
            os.truncate(path, 100)
        elif touch == "head":
            path.with_suffix(".head").write_text(f"1 {'0' * 64}\n")
        else:
            path.unlink()
        with pytest.raises(LedgerError, match=r"while this process holds it|No such file"):
            ledger.reserve(asked(4), POLICY)


def test_one_ledger_has_one_holder_and_readers_need_no_lock(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        ledger.reserve(asked(1), POLICY)
        with pytest.raises(LedgerError, match=r"another process holds the privacy ledger.*spend the same budget twice"):
            opened(tmp_path)
        assert read(tmp_path).spent(1e-5) == 2
    with pytest.raises(LedgerError, match="was closed"):
        ledger.reserve(asked(2), POLICY)
    opened(tmp_path).close()


def test_a_reader_beside_a_writer_reads_again_until_both_files_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened(tmp_path)
    real = Path.read_bytes
    rounds = iter([1, 2])

    def meanwhile(path: Path) -> bytes:
        for number in rounds:
            ledger.commit(ledger.reserve(asked(number), POLICY), 8)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", meanwhile)
    with ledger:
        book = read(tmp_path)
    assert book.spent(1e-5) == 4
    assert book.notes == []


def test_its_folders_are_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), real(file))[1])
    opened(tmp_path / "new" / "ledgers").close()
    assert synced[:2] == [tmp_path.stat().st_ino, (tmp_path / "new").stat().st_ino]


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    opened(tmp_path / "new" / "ledgers").close()
    assert (tmp_path / "new" / "ledgers").stat().st_mode & 0o077 == 0
    assert ACCOUNT.path(tmp_path / "new" / "ledgers").stat().st_mode & 0o077 == 0
