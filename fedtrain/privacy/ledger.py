"""The privacy ledger as it is kept: what a round costs is written down, durably, before its first step."""

from __future__ import annotations

import fcntl
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from fedtrain.disk import atomic_write
from fedtrain.errors import BudgetError, LedgerError, PolicyError, PrivacyError, shorten
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.book import (
    BEFORE_THE_FIRST,
    Account,
    Book,
    Commit,
    EpsilonOf,
    Opening,
    Reservation,
    head_line,
    merged,
    unusable,
)
from fedtrain.privacy.policy import Policy, Request

__all__ = ["Ledger"]


class Ledger(Book):
    """The ledger of one account, held against every other process until it is closed.

    Args:
        folder: where the client keeps its ledgers; made when it is missing.
        account: whose privacy.
        epsilon_of: the accountant.
        known_head: an earlier head, where a server or a run remembers one; it must be in the ledger.

    Raises:
        LedgerError: it is damaged, changed, missing, held by another process, or the disk refuses.
    """

    def __init__(self, folder: Path, account: Account, epsilon_of: EpsilonOf, known_head: str | None = None) -> None:
        self._begin(account.path(folder), epsilon_of)
        self._usable = False  # between two appends
        try:
            _make(folder)
            self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise unusable(self._path, error) from error
        try:
            self._hold()
            self._recover()
            if known_head is not None:
                self.expect(known_head)
            if self._opening is None:
                self._append(
                    Opening(
                        previous=BEFORE_THE_FIRST,
                        time=_now(),
                        client_id=account.client_id,
                        fingerprint=account.fingerprint,
                        unit=account.unit,
                        nonce=secrets.token_hex(16),
                    )
                )
            elif self.account != account:
                raise self._changed(f"it belongs to the client {shorten(self.account.client_id)} and other data")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have it."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._usable = -1, False

    def affordable(self, request: Request, policy: Policy) -> float:
        """Price a round before its first step.

        Returns:
            Epsilon of everything up to and with this round, at the policy's delta.

        Raises:
            PolicyError: the policy objects; all that it objects to is named.
            BudgetError: the round would overspend.
        """
        what = f"round {request.round_number} of run {shorten(request.run, 40)}"
        objections = policy.objections(request)
        if request.unit != self.account.unit:
            objections.append(f"unit {shorten(request.unit)}: this ledger is of unit {self.account.unit}")
        if objections:
            raise PolicyError(f"the client's policy does not allow {what}: {'; '.join(objections)}")
        charge = Spend(request.noise_multiplier, request.sample_rate, request.steps)
        epsilon = self._epsilon(merged([*self.history(), charge]), policy.delta)
        if not epsilon <= policy.max_epsilon:  # nor is NaN affordable
            raise BudgetError(
                f"{what} would overspend the privacy budget",
                got=f"epsilon {epsilon:.6g}",
                expected=f"at most {policy.max_epsilon:g} at delta {policy.delta:g}",
                hint=self._since(policy.delta),
            )
        return epsilon

    def reserve(self, request: Request, policy: Policy) -> str:
        """Spend on a round before its first step; a round that is trained again, after a crash say, is spent on again.

        Returns:
            The reservation's name for `commit`. Without one, it counts in full for ever.

        Raises:
            PolicyError, BudgetError: as `affordable`; nothing is written.
            LedgerError: it cannot be written durably; the round must not begin.
        """
        self.affordable(request, policy)
        return self._append(
            Reservation(
                previous=self.head,
                time=_now(),
                run=request.run,
                round_number=request.round_number,
                experiment_hash=request.experiment_hash,
                noise_multiplier=request.noise_multiplier,
                sample_rate=request.sample_rate,
                steps=request.steps,
            )
        )

    def commit(self, reservation: str, steps_taken: int, update_sha256: str | None = None) -> None:
        """Write down what a round really took, before its update leaves.

        Args:
            reservation: what `reserve` returned, in this process or an earlier one.
            steps_taken: from 1 to the steps reserved; empty Poisson batches are steps.
            update_sha256: of the finished update, which may then be sent again unchanged at no cost.

        Raises:
            PrivacyError: it is not what was reserved; the update must not leave.
            LedgerError: it cannot be written durably.
        """
        entry = Commit(
            previous=self.head,
            time=_now(),
            reservation=reservation,
            steps_taken=steps_taken,
            update_sha256=update_sha256,
        )
        if fault := self._fault(entry):
            raise PrivacyError(f"a commit to the privacy ledger {fault}", hint="The update must not be sent")
        self._append(entry)

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LedgerError(
                "another process holds the privacy ledger",
                got=self._path.name,
                hint="Wait for it to end: two clients on the same data would spend the same budget twice",
            ) from error

    def _recover(self) -> None:
        """Read the ledger; bring it and its head into step after a crash, before anything is added."""
        try:
            content = b"".join(iter(lambda: os.read(self._file, 1 << 20), b""))
            head = self._read_head()
            self._replay(content, head)
            if self._size < len(content):
                os.ftruncate(self._file, self._size)
                os.fsync(self._file)
            if self._hashes and head != head_line(len(self._hashes), self.head):
                # The line may not have reached the disk: what its head tells of must.
                os.fsync(self._file)
                self._write_head()
        except OSError as error:
            raise unusable(self._path, error) from error
        self._usable = True

    def _append(self, entry: Opening | Reservation | Commit) -> str:
        """Add an entry durably; after a failure of any kind the ledger has to be opened, and so verified, again."""
        if not self._usable:
            raise LedgerError(
                "the privacy ledger was closed, or could not be written before",
                got=self._path.name,
                hint="Open it again",
            )
        self._usable = False
        line = entry.line()
        try:
            self._check_untouched()
            rest = line + b"\n"
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
            self._take(entry, line)
            self._write_head()
        except OSError as error:
            raise unusable(self._path, error) from error
        self._usable = True
        return self.head

    def _check_untouched(self) -> None:
        """Notice what was done to the files although the ledger is held."""
        held, named = os.fstat(self._file), self._path.stat()
        known = head_line(len(self._hashes), self.head if self._hashes else BEFORE_THE_FIRST)
        same = (held.st_dev, held.st_ino, held.st_size) == (named.st_dev, named.st_ino, self._size)
        if not same or self._read_head() != known:
            raise self._changed("while this process holds it")

    def _write_head(self) -> None:
        text = head_line(len(self._hashes), self.head)
        atomic_write(self._head_path, lambda file: file.write(text.encode()))

    def _since(self, delta: float) -> str:
        if not self._reservations:
            return "Nothing was spent before: a round with so little noise is too dear alone"
        last = list(self._reservations.values())[-1]
        return (
            f"Epsilon {self.spent(delta):.6g} was spent up to round {last.round_number} of run "
            f"{shorten(last.run, 40)}, at {last.time}; this client has ended for these data"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _make(folder: Path) -> None:
    """Make a folder, durably: a ledger that a power cut takes away with its folder was never written."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        parent = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
