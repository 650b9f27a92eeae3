"""`fedtrain privacy`: what the ledgers of a client, or of a run, say. Nothing here changes or locks them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedtrain.cli.terminal import say
from fedtrain.disk import atomic_write
from fedtrain.errors import InputError, LedgerError, nearest, shorten

if TYPE_CHECKING:
    from fedtrain.privacy.accounting import Spend
    from fedtrain.privacy.book import Book, EpsilonOf, RoundSpend, Summary

__all__ = ["app"]

app = typer.Typer(help="Show, check and export what the privacy ledgers say.", no_args_is_help=True)

_DELTA = 1e-5  # where neither the command line, nor a policy, nor the run names one

Folder = Annotated[
    Path, typer.Argument(help="A folder of ledgers, or a run's; this one unless given.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def status(
    folder: Folder = Path(),
    client: Annotated[
        str | None, typer.Option("--client", help="Show what each round of this client added.", show_default=False)
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Take delta and the budget from this file.", show_default=False)
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Of epsilon; the policy's, the run's or 1e-5 unless given.", show_default=False),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Count by RDP: faster, and up to 30 % higher.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what was spent, by client and data set."""
    terms = _Terms.of(folder, policy, delta, fast=fast)
    books, damaged = _read(folder, terms.epsilon_of)
    if client is not None:
        books = _of_client(books, client)
    summaries = [book.summary(terms.delta) for book in books]
    rounds = [book.rounds(terms.delta) if client is not None else [] for book in books]
    if as_json:
        accounts = [
            asdict(summary) | ({"by_round": [asdict(spend) for spend in spent]} if client is not None else {})
            for summary, spent in zip(summaries, rounds)
        ]
        typer.echo(json.dumps(asdict(terms) | {"accounts": accounts, "damaged": _told(damaged)}, indent=2))
    else:
        for line in _account_table(summaries, terms):
            say(line)
        for summary, spent in zip(summaries, rounds):
            for line in _round_table(summary, spent) if spent else ():
                say(line)
    _refuse(damaged, len(books))


@app.command()
def verify(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Check every ledger's hashes. Exit code 1 if any is damaged or changed."""
    books, damaged = _read(folder, _no_accountant)
    if as_json:
        whole = [
            asdict(book.account) | {"entries": _entries(book), "head": book.head, "notes": book.notes} for book in books
        ]
        typer.echo(json.dumps({"ok": whole, "damaged": _told(damaged)}, indent=2))
    else:
        for book in books:
            account = book.account
            say(
                f"ok       {shorten(account.client_id, 24):24}  {account.unit:6}  "
                f"{_count(_entries(book), 'entry', 'entries')}, head {book.head[:12]}"
            )
            for note in book.notes:
                say(f"         note: {note}", indent=6)
        for error in damaged.values():
            say(f"DAMAGED  {error}", indent=9)
    _refuse(damaged, len(books))


@app.command()
def export(
    folder: Folder = Path(),
    out: Annotated[
        Path | None, typer.Option("--out", help="Write here instead of to the terminal.", show_default=False)
    ] = None,
) -> None:
    """Write all ledgers as JSON. Every entry is there, with the hashes that chain them."""
    books, damaged = _read(folder, _no_accountant)
    for error in damaged.values():
        raise error  # what cannot be trusted is not passed on
    text = json.dumps({"ledgers": [asdict(book.account) | book.export() for book in books]}, indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        atomic_write(out, lambda file: file.write(text.encode()))
    except OSError as error:
        raise InputError(
            f"cannot write {out} ({error.strerror})", hint="Name a file in a folder that exists and can be written"
        ) from error
    say(f"Wrote {_count(len(books), 'ledger', 'ledgers')} to {out}")


@dataclass(frozen=True)
class _Terms:
    """By what the ledgers are priced, and where that was found."""

    delta: float
    delta_from: str
    accountant: Literal["prv", "rdp"]
    max_epsilon: float | None  # of the policy

    @classmethod
    def of(cls, folder: Path, policy_file: Path | None, delta: float | None, *, fast: bool) -> _Terms:
        """Take delta from the command line, else from the policy, else from the run."""
        from fedtrain.privacy.policy import load_policy
        from fedtrain.rundir import RunFolder

        policy = load_policy(policy_file) if policy_file is not None else None
        run = RunFolder(folder).read_privacy()
        value, source = _DELTA, "unless --delta says else"
        if delta is not None:
            value, source = delta, "as asked"
        elif policy is not None:
            value, source = policy.delta, "the policy's"
        elif run is not None:
            value, source = run.delta, "the run's"
        if not 0 < value < 1:
            raise InputError("no valid delta", got=value, expected="a number between 0 and 1")
        budget = policy.max_epsilon if policy is not None and value == policy.delta else None
        return cls(value, source, "rdp" if fast else "prv", budget)

    def epsilon_of(self, history: Sequence[Spend], delta: float) -> float:
        """Price a history."""
        from fedtrain.privacy.accounting import epsilon

        return epsilon(history, delta, self.accountant).value


def _no_accountant(*_: object) -> float:
    raise AssertionError("what is only checked or exported has no price")


def _read(folder: Path, epsilon_of: EpsilonOf) -> tuple[list[Book], dict[str, LedgerError]]:
    """Read all ledgers of a folder; those that cannot be trusted by the name of their file."""
    from fedtrain.privacy.book import Book, ledgers
    from fedtrain.rundir import RunFolder

    run = RunFolder(folder)
    promised = run.read_privacy()
    place = folder / promised.ledgers if promised is not None else run.ledgers if run.ledgers.is_dir() else folder
    if run.manifest.exists() and promised is None:
        raise InputError("this run protects nobody, and keeps no ledgers", got=folder)
    seeded = promised is not None and promised.seeded
    paths = [] if seeded else ledgers(place)
    if not paths:
        hint = None
        if seeded:
            hint = "NOT PRIVATE: this run's noise follows from a seed, and it keeps none"
        elif promised is not None and run.roster.exists():
            where = "here" if run.local_clients.is_dir() else "on its own machine, in its --home"
            home = run.local_clients / "NAME" if run.local_clients.is_dir() else "HOME"
            hint = f"Each client of this run keeps its own, {where}: fedtrain privacy status {home}"
        raise InputError(
            "there are no privacy ledgers here",
            got=folder,
            expected="a folder with some, or a private run's",
            hint=hint,
        )
    books: list[Book] = []
    damaged: dict[str, LedgerError] = {}
    for path in paths:
        try:
            books.append(Book(path, epsilon_of))
        except LedgerError as error:
            damaged[path.name] = error
    return sorted(books, key=lambda book: astuple(book.account)), damaged


def _entries(book: Book) -> int:
    return len(book.export()["entries"])


def _of_client(books: list[Book], client: str) -> list[Book]:
    found = [book for book in books if book.account.client_id == client]
    if not found:
        names = sorted({shorten(book.account.client_id) for book in books})
        raise InputError(
            "no ledger is of this client", got=client, hint=nearest(client, names, f"There is: {names[0]}, ...")
        )
    return found


def _refuse(damaged: Mapping[str, LedgerError], whole: int) -> None:
    if damaged:
        raise LedgerError(
            f"{len(damaged)} of {_count(len(damaged) + whole, 'privacy ledger', 'privacy ledgers')} cannot be trusted",
            got=", ".join(damaged),
            hint="`fedtrain privacy verify` says what is wrong with each",
        )


def _told(damaged: Mapping[str, LedgerError]) -> list[dict[str, str]]:
    return [{"file": name, "error": str(error)} for name, error in damaged.items()]


def _account_table(summaries: Sequence[Summary], terms: _Terms) -> list[str]:
    lines = ["client           unit   data     rounds    steps open  epsilon last (UTC)"]
    for summary in summaries:
        account, data = summary.account, shorten(summary.account.fingerprint[:8])
        lines.append(
            f"{shorten(account.client_id, 16):16} {account.unit:6} {data:8} {summary.rounds:6,} "
            f"{summary.steps:8,} {summary.uncommitted:4,} {summary.epsilon:8.3f} {_minute(summary.last)}"
        )
    lines += [
        "",
        f"Epsilon at delta {terms.delta:g} ({terms.delta_from}), {terms.accountant.upper()} accountant, add/remove one "
        "of the unit, Poisson sampling.",
        "Open: reservations without a commit, counted in full.",
    ]
    if terms.max_epsilon is not None:
        from fedtrain.privacy.book import across_clients

        most = across_clients(summary.epsilon for summary in summaries)
        lines.append(f"The policy allows epsilon {terms.max_epsilon:g}; at most {most:.3f} was spent on one data set.")
    return lines


def _round_table(summary: Summary, spent: Sequence[RoundSpend]) -> list[str]:
    account = summary.account
    lines = [
        "",
        f"{shorten(account.client_id, 40)}, {account.unit}, data {shorten(account.fingerprint, 9)}:",
        "run                      round    steps  epsilon    added time (UTC)",
    ]
    for one in spent:
        full = "" if one.committed else " open"
        lines.append(
            f"{shorten(one.run, 22):22} {one.round_number:7,} {one.steps:8,} {one.epsilon:8.3f} {one.increment:8.3f} "
            f"{_minute(one.time)}{full}"
        )
    return lines


def _minute(time: str | None) -> str:
    return "-" if time is None else shorten(time[:16].replace("T", " "))


def _count(number: int, one: str, more: str) -> str:
    return f"1 {one}" if number == 1 else f"{number:,} {more}"
