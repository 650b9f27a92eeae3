"""The privacy ledger as it is read: its entries, their chain of hashes, and what they add up to.

FOLDER/UNIT-DIGEST.jsonl   one line per entry; each holds the SHA-256 of the line before it
FOLDER/UNIT-DIGEST.head    how many lines there are, and the SHA-256 of the last

A line is synced first, its head second, and only then does `reserve` return. So a crash leaves at most one line more
than the head knows of, whole or torn; whatever else differs was changed by somebody. What the two files cannot show is
that both are older copies, or that one who may write here rewrote both: for that, a server remembers the head.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedtrain.errors import LedgerError, shorten
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.policy import Unit

__all__ = [
    "BEFORE_THE_FIRST",
    "Account",
    "Book",
    "Commit",
    "Entry",
    "EpsilonOf",
    "Opening",
    "Reservation",
    "RoundSpend",
    "Summary",
    "across_clients",
    "head_line",
    "ledgers",
    "merged",
    "unusable",
]

BEFORE_THE_FIRST = "0" * 64
_HINT = "Nothing is trained on these data until it is whole again: undo the change, or count their budget as spent"


EpsilonOf = Callable[[Sequence[Spend], float], float]  # (history, delta) -> epsilon; the history is not empty


@dataclass(frozen=True)
class Account:
    """Whose privacy a ledger keeps."""

    client_id: str
    fingerprint: str  # of the client's data
    unit: Unit

    def path(self, folder: Path) -> Path:
        """Name the ledger's file: any client's name will do, and no two accounts share one."""
        key = json.dumps([self.client_id, self.fingerprint, self.unit])
        return folder / f"{self.unit}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl"


@dataclass(frozen=True)
class RoundSpend:
    """What one reservation cost."""

    run: str
    round_number: int
    time: str  # UTC, ISO 8601
    steps: int  # taken; all that were reserved if it was never committed
    committed: bool
    epsilon: float  # of everything up to here
    increment: float


@dataclass(frozen=True)
class Summary:
    """A ledger at a glance."""

    account: Account
    relation: str
    epsilon: float
    delta: float
    rounds: int  # reservations
    uncommitted: int  # of these, counted in full
    steps: int
    runs: int
    first: str | None  # time of the first reservation; UTC, ISO 8601
    last: str | None
    entries: int
    head: str
    notes: tuple[str, ...]


class Entry(BaseModel):
    """A line of the ledger; `previous` is the SHA-256 of the line before it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    previous: str
    time: str

    def line(self) -> bytes:
        """As it stands in the file."""
        return json.dumps(self.model_dump(), separators=(",", ":")).encode()


class Opening(Entry):
    """The first: whose ledger it is."""

    kind: Literal["opening"] = "opening"
    version: Literal[1] = 1
    client_id: str
    fingerprint: str
    unit: Unit
    relation: Literal["add/remove"] = "add/remove"
    nonce: str  # two ledgers of one account never share a head


class Reservation(Entry):
    """Steps that a round may take."""

    kind: Literal["reservation"] = "reservation"
    run: str
    round_number: int
    experiment_hash: str
    noise_multiplier: float = Field(gt=0)
    sample_rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)


class Commit(Entry):
    """Steps that it took."""

    kind: Literal["commit"] = "commit"
    reservation: str
    steps_taken: int
    update_sha256: str | None


_ENTRY: TypeAdapter[Opening | Reservation | Commit] = TypeAdapter(
    Annotated[Opening | Reservation | Commit, Field(discriminator="kind")]
)


class Book:
    """A ledger that was read and verified; it changes nothing on disk and needs no lock.

    Args:
        path: the ledger's file, as `Account.path` or `ledgers` name it.
        epsilon_of: the accountant.

    Raises:
        LedgerError: it is damaged, changed or missing.
    """

    def __init__(self, path: Path, epsilon_of: EpsilonOf) -> None:
        self._begin(path, epsilon_of)
        try:
            while True:
                head = self._read_head()
                content = path.read_bytes() if path.exists() else b""
                if head == self._read_head():  # else a client wrote in between
                    break
        except OSError as error:
            raise unusable(path, error) from error
        self._replay(content, head)
        if self._opening is None:
            raise LedgerError("there is no privacy ledger", got=path)
        if path.name != self.account.path(path.parent).name:  # else an account could begin anew beside it
            raise self._changed("its name is not that of its client and data")

    @property
    def account(self) -> Account:
        """Whose privacy it keeps."""
        opening = self._first()
        return Account(opening.client_id, opening.fingerprint, opening.unit)

    @property
    def head(self) -> str:
        """SHA-256 of the last entry: a server that remembers it will notice an older copy."""
        return self._hashes[-1]

    def history(self) -> list[Spend]:
        """List what was spent; reservations without a commit in full, equal mechanisms in one charge."""
        return [Spend(*mechanism, steps) for mechanism, steps in self._steps.items()]

    def spent(self, delta: float) -> float:
        """Epsilon of everything so far."""
        return self._epsilon(self.history(), delta)

    def rounds(self, delta: float) -> list[RoundSpend]:
        """Tell of each reservation, in order, what it added."""
        found: list[RoundSpend] = []
        charges: list[Spend] = []
        for identity, entry in self._reservations.items():
            charges = merged([*charges, self._charge(identity)])
            epsilon = self._epsilon(charges, delta)
            found.append(
                RoundSpend(
                    run=entry.run,
                    round_number=entry.round_number,
                    time=entry.time,
                    steps=self._charge(identity).steps,
                    committed=identity in self._commits,
                    epsilon=epsilon,
                    increment=epsilon - (found[-1].epsilon if found else 0.0),
                )
            )
        return found

    def reservations(self, run: str) -> int:
        """Count the rounds that a run has spent on, replays included."""
        return sum(entry.run == run for entry in self._reservations.values())

    def resendable(self, run: str, round_number: int, update_sha256: str) -> bool:
        """Whether these very bytes were committed for the round: to send them again releases nothing new."""
        made = [self._reservations[i] for i, commit in self._commits.items() if commit.update_sha256 == update_sha256]
        return any((entry.run, entry.round_number) == (run, round_number) for entry in made)

    def summary(self, delta: float) -> Summary:
        """Sum up for a reader."""
        entries = list(self._reservations.values())
        return Summary(
            account=self.account,
            relation=self._first().relation,
            epsilon=self.spent(delta),
            delta=delta,
            rounds=len(entries),
            uncommitted=len(entries) - len(self._commits),
            steps=sum(charge.steps for charge in self.history()),
            runs=len({entry.run for entry in entries}),
            first=entries[0].time if entries else None,
            last=entries[-1].time if entries else None,
            entries=len(self._entries),
            head=self.head,
            notes=tuple(self.notes),
        )

    def export(self) -> dict[str, Any]:
        """Give everything as JSON can hold it.

        Returns:
            An entry's `sha256` is that of `json.dumps(entry, separators=(",", ":"))`, so anybody can check the chain.
        """
        pairs = zip(self._hashes, self._entries)
        return {
            "head": self.head,
            "entries": [{"sha256": digest, "entry": entry.model_dump()} for digest, entry in pairs],
            "notes": self.notes,
        }

    def expect(self, known_head: str) -> None:
        """Refuse if an entry that somebody remembers is not here.

        Raises:
            LedgerError: this is an older copy, or another ledger.
        """
        if known_head not in self._hashes:
            raise LedgerError(
                f"the privacy ledger {self._path.name} is an older copy, or not the one that was used before",
                got=f"{len(self._entries)} entries up to {self._hashes[-1][:12] if self._hashes else 'none'}",
                expected=f"an entry {shorten(known_head, 12)}",
                hint=_HINT,
            )

    def _begin(self, path: Path, epsilon_of: EpsilonOf) -> None:
        self._path, self._head_path = path, path.with_suffix(".head")
        self._epsilon_of = epsilon_of
        self._opening: Opening | None = None
        self._entries: list[Entry] = []
        self._hashes: list[str] = []  # of the entries
        self._reservations: dict[str, Reservation] = {}  # by hash
        self._commits: dict[str, Commit] = {}  # by the reservation's hash
        self._steps: dict[tuple[float, float], int] = {}  # by noise multiplier and sample rate
        self._size = 0  # bytes of whole lines
        self.notes: list[str] = []

    def _replay(self, content: bytes, head: str) -> None:
        """Take every line of the file, then hold it against the head."""
        *lines, torn = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                entry = _ENTRY.validate_json(line)
            except ValidationError as error:
                raise self._changed(f"line {number} is no entry") from error
            if entry.previous != (self._hashes[-1] if self._hashes else BEFORE_THE_FIRST):
                raise self._changed(f"line {number} does not follow from the one before it")
            if fault := self._fault(entry):
                raise self._changed(f"line {number} {fault}")
            self._take(entry, line)
        known = re.fullmatch(r"(0|[1-9][0-9]{0,8}) ([0-9a-f]{64})\n", head)
        if known is None:
            raise self._changed(f"{self._head_path.name} is no head")
        count, newest = int(known[1]), known[2]
        if not count <= len(lines) <= count + 1 - bool(torn):
            raise self._changed(f"it has {len(lines)} whole entries, its head tells of {count}")
        if count and self._hashes[count - 1] != newest:
            raise self._changed(f"line {count} is not the one that was written")
        if len(lines) > count > 0:
            self.notes.append("a crash came before the last entry could be used: it counts all the same")
        if torn:
            self.notes.append("a crash came before the last entry was whole: it is left out, for nothing had begun")

    def _take(self, entry: Opening | Reservation | Commit, line: bytes) -> None:
        digest = hashlib.sha256(line).hexdigest()
        self._entries.append(entry)
        self._hashes.append(digest)
        self._size += len(line) + 1
        match entry:
            case Opening():
                self._opening = entry
            case Reservation():
                self._reservations[digest] = entry
                self._count(entry, entry.steps)
            case Commit():
                self._commits[entry.reservation] = entry
                reserved = self._reservations[entry.reservation]
                self._count(reserved, entry.steps_taken - reserved.steps)

    def _count(self, entry: Reservation, steps: int) -> None:
        mechanism = (entry.noise_multiplier, entry.sample_rate)
        self._steps[mechanism] = self._steps.get(mechanism, 0) + steps

    def _fault(self, entry: Opening | Reservation | Commit) -> str:
        """Say why an entry cannot come next; "" if it can."""
        if isinstance(entry, Opening) == bool(self._entries):
            return "opens a ledger that is open" if self._entries else "comes before the ledger is opened"
        if isinstance(entry, Commit):
            reserved = self._reservations.get(entry.reservation)
            if reserved is None:
                return "commits what was never reserved"
            if entry.reservation in self._commits:
                return "commits what is committed"
            if not 1 <= entry.steps_taken <= reserved.steps:
                return f"tells of {entry.steps_taken} steps where {reserved.steps} were reserved"
        return ""

    def _charge(self, identity: str) -> Spend:
        entry, commit = self._reservations[identity], self._commits.get(identity)
        return Spend(entry.noise_multiplier, entry.sample_rate, commit.steps_taken if commit else entry.steps)

    def _epsilon(self, charges: Sequence[Spend], delta: float) -> float:
        return self._epsilon_of(charges, delta) if charges else 0.0

    def _first(self) -> Opening:
        assert self._opening is not None
        return self._opening

    def _read_head(self) -> str:
        return self._head_path.read_text("latin-1") if self._head_path.exists() else head_line(0, BEFORE_THE_FIRST)

    def _changed(self, how: str) -> LedgerError:
        return LedgerError(f"the privacy ledger {self._path.name} was damaged or changed ({how})", hint=_HINT)


def ledgers(folder: Path) -> list[Path]:
    """Name every ledger of a folder, also one of which only the head is left."""
    return sorted({path.with_suffix(".jsonl") for kind in ("*.jsonl", "*.head") for path in folder.glob(kind)})


def across_clients(epsilons: Iterable[float]) -> float:
    """Compose clients with disjoint data: each example is in one of them, so the figure is the largest, not the sum.

    References:
        McSherry, "Privacy integrated queries", SIGMOD 2009, theorem 4 (parallel composition).
    """
    return max(epsilons, default=0.0)


def merged(charges: Iterable[Spend]) -> list[Spend]:
    """Add up the steps of equal mechanisms: the same composition, at the cost of one."""
    steps: dict[tuple[float, float], int] = {}
    for charge in charges:
        key = (charge.noise_multiplier, charge.sample_rate)
        steps[key] = steps.get(key, 0) + charge.steps
    return [Spend(*key, total) for key, total in steps.items()]


def head_line(count: int, newest: str) -> str:
    """What the file beside the ledger says of it."""
    return f"{count} {newest}\n"


def unusable(path: Path, error: OSError) -> LedgerError:
    """Word an error of the file system."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "Free some space" if full else "Make its folder readable and writable"
    return LedgerError(f"the privacy ledger {path} cannot be used ({error.strerror})", hint=f"{hint} and start again")
