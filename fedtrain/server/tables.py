"""CSV files that say something of each client."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedtrain.errors import InputError, nearest

__all__ = ["read_rows", "refuse_strangers"]


def read_rows(path: Path, field: str, columns: Iterable[str]) -> list[Mapping[str, str]]:
    """Read a CSV file with a header.

    Args:
        path: the file.
        field: of the experiment that names it, such as "clients.tags".
        columns: that it must have; it may have others.

    Returns:
        Its lines: column -> text; empty where a line is too short.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            there = list(reader.fieldnames or ())
            for column in columns:
                if column not in there:
                    hint = nearest(column, there)
                    raise InputError(f"the file of {field} has no column {column!r}", got=path, hint=hint)
            return [{name: row[name] or "" for name in there} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        hint = "Name a CSV file in UTF-8; its path counts from the experiment file's folder"
        raise InputError(f"the file of {field} cannot be read ({why})", got=path, hint=hint) from error


def refuse_strangers(names: Iterable[str], field: str, client_ids: Sequence[str]) -> None:
    """Refuse names that are no client's: a mistyped one would be left out without a word.

    Raises:
        InputError: there are such names.
    """
    if unknown := sorted(set(names) - set(client_ids)):
        raise InputError(
            f"the file of {field} names clients that there are not",
            got=", ".join(unknown[:3]),
            hint=nearest(unknown[0], client_ids, otherwise=f"There is: {client_ids[0]}, ..."),
        )
