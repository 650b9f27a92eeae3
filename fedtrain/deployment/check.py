"""A client's preflight: everything that could keep it from taking part, tried before it has to."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import fedtrain
from fedtrain.client.budget import Budget
from fedtrain.deployment.session import Dial
from fedtrain.deployment.site import Assembly, Owner, assemble, own_device
from fedtrain.errors import BudgetError, FedtrainError, InputError, RefusedError, shorten
from fedtrain.link.channel import Link, connect
from fedtrain.link.control import Hello
from fedtrain.privacy.accounting import bound_within
from fedtrain.privacy.book import Account, Book, merged
from fedtrain.privacy.policy import Policy, load_policy

__all__ = ["Finding", "preflight"]

_T = TypeVar("_T")

_NEXT = {
    "device": "Use --device cpu",
    "disk": "Choose another folder with --home",
    "policy": "Correct the file that --policy names",
    "certificate": "Ask for a new invitation, and enrol again",
    "server": "Check the address with who runs the server, and that the server is up",
    "experiment": "Check what --data, --share and --policy say, or ask who runs the server",
    "budget": "See `fedtrain privacy` for what was spent",
    "place": "Ask who runs the server",
}
"""What to do where an error does not say."""


class Finding(NamedTuple):
    """One line of a preflight."""

    what: str
    ok: bool
    text: str  # what was found, or what is wrong and what to do


def preflight(owner: Owner, dial: Dial, dates: tuple[datetime, datetime] | None = None) -> Iterator[Finding]:
    """Try what a client needs, one after another; what depends on a failed one is left out.

    At the end it takes the client's place in the run and leaves it at once: only the server knows whom it lets in.

    Args:
        owner: decides about data, devices, code and policy.
        dial: whom to reach. A server that this client is connected to already refuses the second session.
        dates: from when until when the client's certificate is valid; None without one.
    """
    device, _ = yield from _tried("device", lambda: str(own_device(owner)), str)
    yield from _tried("disk", lambda: _writable(owner.home), lambda free: f"{free >> 20} MiB free in {owner.home}")
    yield from _tried("policy", lambda: load_policy(owner.policy) if owner.policy else None, _allowing)
    credentials = None
    if dial.credentials:
        credentials, ok = yield from _tried("certificate", dial.credentials, lambda _: f"valid, of {owner.name}")
        if not ok:
            return
    if dates:
        yield _clock(*dates)
    hello = Hello(version=fedtrain.__version__, name=owner.name, instance=os.urandom(8).hex())
    with contextlib.ExitStack() as stack:

        def ask() -> Link:
            return stack.enter_context(connect(dial.server, credentials, hello))

        link, _ = yield from _tried("server", ask, lambda link: f"{dial.server} offers run {link.offer.run[:8]}")
        if link is None or device is None:
            return
        assembly, _ = yield from _tried("experiment", lambda: assemble(owner, link.offer), _assembled)
        if assembly is None:
            return
        if owner.policy and (budget := assembly.budget):
            yield from _tried("budget", lambda: _planned(owner, budget, link.offer.run), str)
        facts = assembly.facts
        yield from _tried("place", lambda: link.ready(facts), lambda _: "the server lets this client take part")


def _assembled(assembly: Assembly) -> str:
    data, examples = assembly.facts["data"], assembly.facts["num_examples"]
    count = "" if examples is None else f"{examples} examples, "
    named = f": {shorten(', '.join(data['feature_names']), 60)}" if data["feature_names"] else ""
    kind = f"{count}inputs {data['input_shape']}{named}"
    return f"the data can be read ({kind}), the model fits them, the policy allows it"


def _allowing(policy: Policy | None) -> str:
    if policy is None:
        return "there is no policy: everything is allowed"
    return f"epsilon {policy.max_epsilon:g} at delta {policy.delta:g} may be spent on one data set"


def _clock(begin: datetime, end: datetime) -> Finding:
    """Hold this machine's clock against what else tells the time: the authority that signed the certificate."""
    now, valid = datetime.now(UTC), f"the certificate's dates, {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
    if begin <= now <= end:
        return Finding("clock", True, f"{now:%Y-%m-%d %H:%M} UTC, within {valid}")
    return Finding("clock", False, f"{now:%Y-%m-%d %H:%M} UTC is not within {valid}. Set the clock, or enrol again")


def _planned(owner: Owner, budget: Budget, run: str) -> str:
    """Price what is left of the run on top of what was spent on these data; nothing is written.

    Raises:
        BudgetError: it is more than the policy allows.
        LedgerError: the ledger cannot be used.
    """
    account = Account(owner.name, budget.data.fingerprint(owner.name), "sample")
    spent, rounds = [], budget.plan.participations
    if budget.ledgers and account.path(budget.ledgers).exists():
        book = Book(account.path(budget.ledgers), bound_within(budget.policy.max_epsilon))
        spent, rounds = book.history(), max(0, rounds - book.reservations(run))
    charge = budget.plan.charge(len(budget.data.client(owner.name).train))
    if rounds:
        spent = merged([*spent, replace(charge, steps=charge.steps * rounds)])
    most, delta = budget.policy.max_epsilon, budget.policy.delta
    epsilon = bound_within(most)(spent, delta)
    if not epsilon <= most:
        raise BudgetError(
            "the policy's budget ends before the run does, and with it this client's part",
            got=f"epsilon {epsilon:.3g} for the whole run and what was spent before",
            expected=f"at most {most:g} at delta {delta:g}",
            hint="Raise max_epsilon in the policy, or ask for fewer rounds or more noise",
        )
    return f"epsilon {epsilon:.3g} for the whole run and what was spent before, of at most {most:g}"


def _tried(
    what: str, do: Callable[[], _T], tell: Callable[[_T], str]
) -> Generator[Finding, None, tuple[_T | None, bool]]:
    """Yield what came of it; return the value and whether it worked."""
    try:
        value = do()
    except RefusedError as error:
        reason = shorten(error.reason, 300).rstrip(".")
        yield Finding(what, False, f"the server refuses this client: {reason}. {_NEXT[what]}")
        return None, False
    except FedtrainError as error:
        without_hint = FedtrainError(error.what, got=error.got, expected=error.expected)
        yield Finding(what, False, f"{error}. {_NEXT[what]}" if str(error) == str(without_hint) else str(error))
        return None, False
    yield Finding(what, True, tell(value))
    return value, True


def _writable(home: Path) -> int:
    """Bytes free where the client keeps what lasts."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            return shutil.disk_usage(home).free
    except OSError as error:
        what = f"the client's folder cannot be written ({error.strerror})"
        raise InputError(what, got=home, hint="Choose another one with --home") from error
