"""A client's preflight: everything that could keep it from taking part, tried before it has to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import fedtrain
from fedtrain.deployment.session import Dial
from fedtrain.deployment.site import Assembly, Owner, assemble
from fedtrain.errors import FedtrainError, InputError
from fedtrain.link.channel import connect
from fedtrain.link.control import Hello, Offer
from fedtrain.training.device import find_device

__all__ = ["Finding", "preflight"]

_T = TypeVar("_T")


class Finding(NamedTuple):
    """One line of a preflight."""

    what: str
    ok: bool
    text: str  # what was found, or what is wrong and what to do


def preflight(owner: Owner, dial: Dial) -> Iterator[Finding]:
    """Try what a client needs, one after another; what depends on a failed one is left out.

    Args:
        owner: decides about data, devices, code and policy.
        dial: whom to reach. A server that this client is connected to already refuses the second session.
    """
    device, _ = yield from _tried("device", lambda: str(find_device(owner.device)), str)
    yield from _tried("disk", lambda: _writable(owner.home), lambda free: f"{free >> 20} MiB free in {owner.home}")
    credentials = None
    if dial.credentials:
        credentials, ok = yield from _tried("certificate", dial.credentials, lambda _: f"valid, of {owner.name}")
        if not ok:
            return

    def ask() -> Offer:
        hello = Hello(version=fedtrain.__version__, name=owner.name, instance=os.urandom(8).hex())
        with connect(dial.server, credentials, hello) as link:
            return link.offer

    offer, _ = yield from _tried("server", ask, lambda found: f"{dial.server} offers run {found.run[:8]}")
    if offer is None or device is None:
        return
    yield from _tried("experiment", lambda: assemble(owner, offer), _assembled)


def _assembled(assembly: Assembly) -> str:
    data, examples = assembly.facts["data"], assembly.facts["num_examples"]
    count = "" if examples is None else f"{examples} examples, "
    return f"the data can be read ({count}inputs {data['input_shape']}), the model fits them, the policy allows it"


def _tried(
    what: str, do: Callable[[], _T], tell: Callable[[_T], str]
) -> Generator[Finding, None, tuple[_T | None, bool]]:
    """Yield what came of it; return the value and whether it worked."""
    try:
        value = do()
    except FedtrainError as error:
        yield Finding(what, False, str(error))
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
        raise InputError(what, got=str(home), hint="Choose another one with --home") from error
