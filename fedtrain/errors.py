"""Every error that fedtrain raises, in one tree.

FedtrainError                 anything fedtrain can name; exit code 1
├── InputError                the user's input is at fault; exit code 2
│   ├── ExperimentError       the experiment file: all its faults at once
│   ├── TaskError             a task cannot be found, loaded or built
│   ├── DataError             a data source is missing, damaged or does not fit
│   ├── MissingExtraError     an optional dependency is not installed
│   └── RunFolderError        a run's folder is missing, locked or belongs to another experiment
├── RunError                  the run itself cannot go on (quorum, every client failed, disk full)
│   ├── CodecError            compressed tensors are damaged, or an update cannot be compressed
│   └── LinkError             a message from another process is damaged, too large or out of turn
├── ConnectionLostError       the server cannot be reached; trying again may help
├── RefusedError              the server does not let this client take part
├── ClientEndedError          a client takes no further part; it does not say why
├── PrivacyError              a privacy promise would be broken; nothing was released
│   ├── BudgetError           the round would overspend: this client has ended for these data
│   ├── LedgerError           the privacy ledger is damaged, changed, missing or held by another process
│   └── PolicyError           the client's own policy does not allow what was asked
└── InterruptedRunError       stopped by a signal, resumable; exit code 130

Each message says what is wrong, what was got, what is expected and what to do next. The library raises; only
`fedtrain.cli` prints.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

__all__ = [
    "BudgetError",
    "ClientEndedError",
    "ClientsJoinedError",
    "CodecError",
    "ConnectionLostError",
    "DataError",
    "ExperimentError",
    "Fault",
    "FedtrainError",
    "InputError",
    "InterruptedRunError",
    "LedgerError",
    "LinkError",
    "MissingExtraError",
    "PolicyError",
    "PrivacyError",
    "RefusedError",
    "RunError",
    "RunFolderError",
    "TaskError",
    "nearest",
    "shorten",
]

_MOST_NAMES = 20
_LONGEST_PATH = 4096  # of the operating systems we run on


class FedtrainError(Exception):
    """Base of all errors that fedtrain raises on purpose.

    Args:
        what: what is wrong, as one clause without a full stop.
        got: the offending value, shortened for display.
        expected: what is allowed instead.
        hint: what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: str | None = None, hint: str | None = None) -> None:
        self.what, self.got, self.expected, self.hint = what, got, expected, hint
        text = what
        if got is not None:
            text += f": got {shorten(got)}"
        if expected is not None:
            text += f"; expected {expected}"
        if hint:
            text += f". {hint}"
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip from a worker process, keyword arguments included."""
        return _rebuild, (type(self), self.__dict__, self.args)


class InputError(FedtrainError):
    """The user's input is at fault; nothing was changed."""

    exit_code = 2


@dataclass(frozen=True)
class Fault:
    """One fault of an experiment file."""

    path: str  # dotted, as in the file: "data.partition.alpha"
    got: str
    expected: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: got {self.got}; expected {self.expected}"
        return f"{text.removesuffix('.')}{'' if text.endswith('?') else '.'} {self.hint}" if self.hint else text


class ExperimentError(InputError):
    """An experiment file has faults; `faults` lists all of them."""

    def __init__(self, source: str, faults: list[Fault]) -> None:
        self.source, self.faults = source, faults
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__(f"{source} has {count}\n" + "\n".join(f"  {fault}" for fault in faults))


class TaskError(InputError):
    """A task cannot be found, loaded or built."""


class DataError(InputError):
    """A data source is missing, damaged or does not fit the experiment."""


class MissingExtraError(InputError):
    """An optional dependency is not installed.

    Args:
        package: the import that is missing.
        extra: the extra of fedtrain that brings it.
        purpose: what needs it.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f"Install it with: pip install 'fedtrain[{extra}]'",
        )


class RunFolderError(InputError):
    """A run's folder is missing, locked or belongs to another experiment."""


class RunError(FedtrainError):
    """The run cannot go on; what was finished is kept."""


class CodecError(RunError):
    """Encoded tensors are damaged, or not of this chain; or an update cannot be encoded."""


class LinkError(RunError):
    """What came from the other end is damaged, too large or against the protocol."""


class ConnectionLostError(FedtrainError):
    """The server cannot be reached, or not any more; trying again may help."""


class RefusedError(FedtrainError):
    """The server does not let this client take part.

    Args:
        reason: the server's words.
        final: trying again does not help.
    """

    def __init__(self, reason: str, final: bool) -> None:
        self.reason, self.final = reason, final
        super().__init__("the server refuses this client", got=shorten(reason, 300))


class ClientEndedError(FedtrainError):
    """A client takes no further part; it does not say why."""


class PrivacyError(FedtrainError):
    """A privacy promise would be broken; nothing was released."""


class BudgetError(PrivacyError):
    """The round would overspend: this client has ended for these data."""


class LedgerError(PrivacyError):
    """The privacy ledger is damaged, changed, missing or held by another process."""


class PolicyError(PrivacyError):
    """The client's own policy does not allow what was asked."""


class InterruptedRunError(FedtrainError):
    """The run was stopped by a signal and can be resumed by the same command."""

    exit_code = 130


class ClientsJoinedError(InterruptedRunError):
    """The run stopped after a round, to be taken up at once with clients that joined meanwhile."""


def nearest(name: object, known: Iterable[str], otherwise: str | None = None) -> str:
    """Hint at the known name that was meant; if none is near say `otherwise`, or list them, the first of many."""
    known = list(known)
    folded: dict[str, str] = {}
    for one in known:
        folded.setdefault(one.casefold(), one)
    if isinstance(name, str) and name:
        asked = name.casefold()
        close = difflib.get_close_matches(asked, folded, n=1) or [one for one in folded if one.startswith(asked)][:3]
        if close:
            return f"Did you mean {' or '.join(folded[one] for one in close)}?"
    if otherwise is not None:
        return otherwise
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return f"There is: {', '.join(known[:_MOST_NAMES])}{more}" if known else "There is none"


def shorten(value: object, limit: int = 80) -> str:
    """Show a value in at most `limit` printable characters: client-given text cannot reach the terminal raw.

    A `Path` is shown whole, for its end says which file it is; only paths of this machine are given as one.
    """
    if isinstance(value, PurePath):
        value, limit = str(value), _LONGEST_PATH
    text = repr(value) if not isinstance(value, str) else value
    short = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])
    return short if len(text) <= limit else short[: limit - 1] + "…"


def _rebuild(kind: type[FedtrainError], state: dict[str, object], args: tuple[object, ...]) -> FedtrainError:
    error = kind.__new__(kind)
    error.__dict__.update(state)
    error.args = args
    return error
