"""Who takes part in a run: a table for a terminal, a line or an event for whoever comes or goes."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fedtrain.errors import shorten
from fedtrain.report.text import show_bytes

if TYPE_CHECKING:
    from fedtrain.link.roster import Member

__all__ = ["Change", "Comings", "member_table", "watching"]

_LOOK = 0.5  # seconds between two looks
_GONE = 4  # looks without a client after which it is said to be away: most connections are back sooner
_ONLINE = 10.0  # seconds within which a client gives a sign of life
_ROOM = 6  # rows of a terminal that are not for clients: the progress line, the header, and what says how many more
_WIDE = 100  # columns in which a table has room for long names
_LONGEST_STATE = 40


@dataclass(frozen=True)
class Change:
    """A client that came or went.

    Attributes:
        connected: it came.
        num_examples: None if it does not say.
        clients: that are there now.
    """

    name: str
    connected: bool
    device: str
    num_examples: int | None
    clients: int

    def line(self) -> str:
        """Say it to a person."""
        count = "1 client is" if self.clients == 1 else f"{self.clients} clients are"
        if not self.connected:
            return f"{self.name} is away; {count} here"
        examples = [] if self.num_examples is None else [f"{self.num_examples:,} examples"]
        known = ", ".join([*([self.device] if self.device else []), *examples])
        return f"{self.name} is here{f' ({known})' if known else ''}; {count} here"

    def event(self) -> dict[str, object]:
        """Say it to a program."""
        return {"event": "client", **asdict(self)}


class Comings:
    """Finds who came or went from one look to the next; who is back within two seconds was never away."""

    def __init__(self) -> None:
        self._missed: dict[str, int] = {}  # who is said to be here -> looks since it was

    def changes(self, members: Sequence[Member]) -> list[Change]:
        """Compare a look with those before it."""
        found = []
        for member in members:
            name = member.name
            if member.connected:
                if name not in self._missed:
                    found.append(member)
                self._missed[name] = 0
            elif name in self._missed:
                self._missed[name] += 1
                if self._missed[name] == _GONE:
                    del self._missed[name]
                    found.append(member)
        here = Counter(member.connected for member in members)[True]
        return [Change(shorten(m.name), m.connected, _device(m), _examples(m), here) for m in found]


def member_table(members: Sequence[Member], width: int, height: int) -> Table:
    """Draw clients as a table.

    What clients say of themselves is shown as it is, without markup, and in few printable characters.

    Args:
        members: in the order of the rows.
        width: columns of the terminal.
        height: its rows; what does not fit is counted in the last one.
    """
    widths = {"client": 24 if width >= _WIDE else 14, "state": 0, "round": 5, "device": 7}
    widths |= {"examples": 9} if any(_examples(member) is not None for member in members) else {}
    widths |= {"seen": 6, "up": 7, "down": 7}
    widths["state"] = min(_LONGEST_STATE, max(6, width - sum(widths.values()) - len(widths) + 1))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for title, columns in widths.items():
        words = title in ("client", "state", "device")
        table.add_column(title, no_wrap=True, width=columns, justify="left" if words else "right")
    shown = len(members) if len(members) <= height - _ROOM else max(1, height - _ROOM - 1)
    for member in members[:shown]:
        cells = _cells(member)
        table.add_row(*(Text(cells[title]) for title in widths), style=None if member.connected else "dim")
    if left := members[shown:]:
        here = sum(member.connected for member in left)
        table.add_row(Text(f"and {len(left)} more"), Text(f"{here} here, {len(left) - here} away"), style="dim")
    return table


@contextlib.contextmanager
def watching(members: Callable[[], Sequence[Member]], show: Callable[[Sequence[Member]], object]) -> Iterator[None]:
    """Show twice a second who takes part, while the block runs.

    Args:
        members: looks; such as `Hub.members`.
        show: is called in a thread of its own.
    """
    ended = threading.Event()

    def watch() -> None:
        with contextlib.suppress(BrokenPipeError):  # the reader is gone; who prints rounds will say so
            while not ended.is_set():
                show(members())
                ended.wait(_LOOK)

    thread = threading.Thread(target=watch, name="fedtrain-members")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _cells(member: Member) -> dict[str, str]:
    examples = _examples(member)
    return {
        "client": shorten(member.name),
        "state": _state(member),
        "round": shorten(member.group),
        "device": _device(member),
        "examples": "" if examples is None else f"{examples:,}",
        "seen": _seen(member),
        "up": show_bytes(member.bytes_up),
        "down": show_bytes(member.bytes_down),
    }


def _state(member: Member) -> str:
    if not member.connected:
        return "away"
    return shorten(member.text.removeprefix(f"round {member.group}: "), _LONGEST_STATE) or "here"


def _device(member: Member) -> str:
    device = member.facts.get("device")
    return shorten(device, 10) if isinstance(device, str) else ""


def _examples(member: Member) -> int | None:
    count = member.facts.get("num_examples")
    return count if type(count) is int and 0 <= count < 1 << 53 else None


def _seen(member: Member) -> str:
    seconds = member.last_seen
    if member.connected and seconds < _ONLINE:
        return "now"
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
