"""Names of a model's parts, picked by patterns."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from fedtrain.errors import TaskError, nearest, shorten

__all__ = ["listed", "matching"]


def matching(patterns: Iterable[str], names: Iterable[str], field: str) -> set[str]:
    """Pick the names that fit one of several patterns.

    Args:
        patterns: such as "fc1.*"; letters count as they are.
        names: that there are.
        field: of the experiment that holds the patterns.

    Raises:
        TaskError: a pattern fits none of them.
    """
    names, found = list(names), set[str]()
    for pattern in patterns:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            raise TaskError(
                "nothing in the model has such a name",
                got=f"{field} = {shorten(pattern)}",
                expected=f"a name or pattern among {listed(names, 12)}" if names else None,
                hint=nearest(pattern, names, otherwise=""),
            )
        found |= fitting
    return found


def listed(names: Iterable[str], most: int = 3) -> str:
    """Name the first few, and say how many more there are."""
    names = [shorten(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
