"""Tables: named columns of numbers and texts, turned into features, targets and clients."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedtrain.data.base import Dataset, DataSpec
from fedtrain.errors import DataError, nearest, shorten

__all__ = [
    "Table",
    "Use",
    "encode_clients",
    "encode_features",
    "encode_target",
    "feature_columns",
    "table_dataset",
    "text_columns",
]

Column = NDArray[Any]
TargetType = Literal["auto", "class", "number"]

# One-hot columns of one text column, and classes that whole numbers are taken for unless the user says so.
_MOST_LEVELS, _MOST_CLASSES = 1000, 100
_SHORT = 2  # letters of codes in which case may tell
_FEW = 20  # different values that are few in any table
_MANY, _STRAYS = 50, 0.1  # different values that are many, and which share of them may be texts among numbers
_NUMBER = re.compile(r"\s*[-+]?\d+([.,'\s]\d{3})*([.,]\d+)?\s*(%\s*)?")  # as people write one


@dataclass(frozen=True)
class Table:
    """Columns of equal length, under their names.

    Attributes:
        name: what it is called in messages.
        columns: name -> `(N,)` numbers (NaN where missing) or texts (object dtype, None where missing).
    """

    name: str
    columns: Mapping[str, Column]


@dataclass(frozen=True)
class Use:
    """What the columns of a table are for; those not named are features.

    Attributes:
        target: the column to predict.
        target_type: class, number, or auto: fractions are numbers, few whole numbers and texts are classes.
        client_column: the column that names each row's client.
        drop: columns to leave out.
    """

    target: str
    target_type: TargetType = "auto"
    client_column: str | None = None
    drop: Sequence[str] = ()


def table_dataset(table: Table, use: Use) -> Dataset:
    """Turn a table into features, targets and clients.

    Texts are one-hot encoded, their levels sorted; a missing text is missing in each of its columns. A few texts in a
    column of many numbers are no categories: they are refused.

    Args:
        table: the columns.
        use: which is the target, which names the client, which are left out.

    Returns:
        A data set of float32 features `(N, d)`, NaN where missing.

    Raises:
        DataError: a column does not exist, is not usable for its purpose or has a text among its numbers, or no
            feature is left.
    """
    asked = [use.target, *([use.client_column] if use.client_column is not None else []), *use.drop]
    for column in asked:
        if column not in table.columns:
            raise DataError(f"{table.name} has no such column", got=column, hint=nearest(column, table.columns))
    targets, class_names = encode_target(
        table.columns[use.target], use.target_type, f"{table.name}, column {use.target!r}"
    )
    features = {name: values for name, values in table.columns.items() if name not in asked}
    if not features:
        raise DataError(f"{table.name} has no feature column left", got=", ".join(asked))
    encoded = [_encode(table.name, name, values) for name, values in features.items()]
    inputs = torch.from_numpy(np.concatenate([block for _, block in encoded], axis=1))
    client_names: tuple[str, ...] = ()
    client_index = None
    if use.client_column is not None:
        where = f"{table.name}, column {use.client_column!r}"
        index, client_names = encode_clients(table.columns[use.client_column], where)
        client_index = torch.from_numpy(index)
    spec = DataSpec(
        input_shape=(inputs.shape[1],),
        target="number" if class_names is None else "class",
        num_classes=len(class_names or ()),
        feature_names=tuple(name for names, _ in encoded for name in names),
        class_names=class_names or (),
    )
    return Dataset(
        name=table.name,
        spec=spec,
        inputs=inputs,
        targets=torch.from_numpy(targets),
        client_names=client_names,
        client_index=client_index,
    )


def encode_target(values: Column, target_type: TargetType, where: str) -> tuple[Column, tuple[str, ...] | None]:
    """Encode a target column.

    Args:
        values: `(N,)` numbers or texts.
        target_type: as in `Use`.
        where: the column's place, for messages.

    Returns:
        `(N,)` float32 and None for numbers; `(N,)` int64 and the sorted classes' names for classes.

    Raises:
        DataError: a target is missing, texts are to be numbers or are among many, or it may be either.
    """
    values = _decoded(values, where)
    is_text = values.dtype.kind in "OU"
    if target_type == "number" and is_text:
        if _meant_as_numbers(np.unique(values[~_missing(values)].astype(str)).tolist()):
            raise _text_among_numbers(values, where)
        raise DataError(f"{where}: the target is text", expected="numbers", hint='Set data.target_type = "class"')
    fractions = values.dtype.kind == "f" and bool(np.any(np.mod(values, 1) > 0))
    if target_type == "number" or (target_type == "auto" and fractions):
        _refuse_missing(values, where)
        return values.astype(np.float32), None
    if target_type == "auto" and not is_text:
        different = len(np.unique(values))
        if _too_many(different, len(values), _MOST_CLASSES):
            raise DataError(
                f"{where}: the target may be a number or a class",
                got=f"{different} different whole numbers in {len(values)} rows",
                hint='Set data.target_type = "number", or "class"',
            )
    elif target_type == "auto":
        levels = np.unique(values[~_missing(values)].astype(str))
        if _meant_as_numbers(levels.tolist()):
            raise _text_among_numbers(values, where, 'If these are classes, set data.target_type = "class"')
        if _too_many(len(levels), len(values), _MOST_LEVELS):
            raise DataError(
                f"{where}: too many different texts to be classes",
                got=f"{len(levels)} in {len(values)} rows, such as {_some(levels)}",
                hint='If they are, set data.target_type = "class"',
            )
    index, names = _levels(values, where)
    if is_text:
        _refuse_spellings(names, where)
    return index, names


def encode_clients(values: Column, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Encode a column that names clients: `(N,)` int64, and the sorted names. Case may tell two apart, blanks not.

    Raises:
        DataError: a name is missing, or two differ in blanks around them alone.
    """
    index, names = _levels(_decoded(values, where), where)
    if "" in names:
        raise DataError(f"{where}: a client without a name", got="''", hint="Name it, or leave its rows out")
    _refuse_spellings(names, where, by_case=False)
    return index, names


def text_columns(feature_names: Sequence[str]) -> set[str]:
    """Name the text columns that features may come from: "c" for the feature "c=level"."""
    return {column for name in feature_names for column in _before_equals(name)} - set(feature_names)


def feature_columns(table: str, feature_names: Sequence[str], known: Collection[str]) -> list[str]:
    """Find the column of each feature: that of its name, or the text column "c" of a feature "c=level".

    Args:
        table: the table's name, for messages.
        feature_names: as `table_dataset` made them.
        known: the table's columns.

    Raises:
        DataError: a feature has no column.
    """
    texts = text_columns(feature_names).intersection(known)
    columns = []
    for name in feature_names:
        # The longest one, should both "a" and "a=b" be text columns.
        candidates = [name] if name in known else [c for c in reversed(_before_equals(name)) if c in texts]
        if not candidates:
            column, level = name.partition("=")[::2]
            other = f", or {shorten(column)} with texts such as {shorten(level)}" if level else ""
            raise DataError(
                f"{table} lacks a column of the training data",
                expected=f"{shorten(name)}{other}",
                hint=shorten(nearest(column, known), 300),
            )
        columns.append(candidates[0])
    return columns


def encode_features(table: Table, feature_names: Sequence[str]) -> NDArray[np.float32]:
    """Encode a table as the one that was trained on; columns that are no features are ignored.

    Args:
        table: the columns, in any order.
        feature_names: as `table_dataset` made them.

    Returns:
        `(N, d)` features, NaN where missing.

    Raises:
        DataError: a column is not there, holds texts in place of numbers, or a text that training did not have.
    """
    columns = np.array(feature_columns(table.name, feature_names, table.columns), dtype=object)
    features = np.array(feature_names, dtype=object)
    inputs = np.empty((len(table.columns[columns[0]]), len(features)), dtype=np.float32)
    for column in dict.fromkeys(columns.tolist()):
        values, where = table.columns[column], f"{table.name}, column {shorten(column)!r}"
        if column in feature_names:
            inputs[:, features == column] = _numbers(values, where)
        else:
            levels = [name.removeprefix(f"{column}=") for name in features[columns == column]]
            inputs[:, columns == column] = _one_hot(values, levels, where)
    return inputs


def _before_equals(name: str) -> list[str]:
    return [name[:position] for position, char in enumerate(name) if char == "="]


def _numbers(values: Column, where: str) -> NDArray[np.float32]:
    """`(N, 1)`; texts are parsed."""
    if values.dtype.kind == "O":
        if not all(text is None or _is_number(text) for text in values):
            raise _text_among_numbers(values, where)
        values = np.array([np.nan if text is None else float(text) for text in values])
    with np.errstate(over="ignore"):  # what is too large becomes inf, which the checks of inputs name
        return values.astype(np.float32)[:, None]


def _text_among_numbers(values: Column, where: str, hint: str = "") -> DataError:
    """Name the first text that is no number; there is one."""
    wrong = [row for row, text in enumerate(values) if text is not None and not _is_number(text)]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return DataError(
        f"{where}, data row {wrong[0] + 1}{more}: text in a column of numbers",
        got=str(values[wrong[0]]),
        expected="a number such as 1234.5, or an empty cell if it is not known",
        hint=hint,
    )


def _one_hot(values: Column, levels: Sequence[str], where: str) -> NDArray[np.float32]:
    """`(N, levels)`, missing where the text is.

    A text that training did not have is refused: no column stands for it, and a misspelt one is more likely than not.
    """
    missing = _missing(values)
    is_level = values.astype(str)[:, None] == np.array(levels)
    unknown = np.flatnonzero(~missing & ~is_level.any(axis=1))
    if len(unknown):
        raise DataError(
            f"{where}, data row {unknown[0] + 1}: a text that the training data did not have",
            got=str(values[unknown[0]]),
            expected=shorten(", ".join(levels), 300),
            hint="Leave the cell empty if it is not known",
        )
    return np.where(missing[:, None], np.float32(np.nan), is_level.astype(np.float32))


def _encode(table: str, name: str, values: Column) -> tuple[list[str], NDArray[np.float32]]:
    """Names and `(N, k)` float32 of the features that a column gives."""
    if values.dtype.kind in "biuf":
        return [name], _numbers(values, f"{table}, column {name!r}")
    missing = _missing(values)
    levels = np.unique(values[~missing].astype(str))
    if _meant_as_numbers(levels.tolist()):
        hint = "If these are names, add the column to data.drop; if they are codes, write a letter before each"
        raise _text_among_numbers(values, f"{table}, column {name!r}", hint)
    if _too_many(len(levels), len(values), _MOST_LEVELS):
        raise DataError(
            f"{table}, column {name!r}: too many different texts to be categories",
            got=f"{len(levels)} in {len(values)} rows, such as {_some(levels)}",
            expected=f"at most {_MOST_LEVELS}, and at most {_FEW} or one for two rows",
            hint="Add it to data.drop, or name it as data.client_column; if it is of numbers, write them as such",
        )
    _refuse_spellings(levels.tolist(), f"{table}, column {name!r}")
    return [f"{name}={level}" for level in levels], _one_hot(values, levels.tolist(), f"{table}, column {name!r}")


def _refuse_spellings(levels: Sequence[str], where: str, by_case: bool = True) -> None:
    """Refuse texts that differ in blanks around them alone, or in case: AA, Aa and aa, of two letters, may."""
    seen: dict[str, str] = {}
    for level in levels:
        bare = level.strip()
        known = seen.setdefault(bare.casefold() if by_case and len(bare) > _SHORT else bare, level)
        if known != level:
            raise DataError(
                f"{where}: two spellings of what seems one text",
                got=f"{known!r} and {level!r}",
                hint="Write it in one way",
            )


def _decoded(values: Column, where: str) -> Column:
    """Bytes as texts."""
    try:
        return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
    except UnicodeDecodeError as exc:
        raise DataError(f"{where}: bytes that are not text in UTF-8", hint="Save it as texts") from exc


def _some(levels: NDArray[np.str_]) -> str:
    return ", ".join(shorten(level, 20) for level in levels[:3])


def _meant_as_numbers(levels: Sequence[str]) -> bool:
    """Whether a column's different texts are many numbers, as 17.5 or as 17,5 or 17 %, and a few others."""
    unread = [level for level in levels if not _is_number(level)]
    strays = sum(_NUMBER.fullmatch(level) is None for level in unread)
    return bool(unread) and len(levels) > (_MANY if strays else _FEW) and strays <= len(levels) * _STRAYS


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _too_many(different: int, rows: int, most: int) -> bool:
    """Whether values are so many that they are names or numbers rather than categories."""
    return different > most or different > max(_FEW, rows // 2)


def _levels(values: Column, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """`(N,)` int64 index of each value, and the names of the sorted values."""
    _refuse_missing(values, where)
    levels, index = np.unique(values.astype(str) if values.dtype.kind == "O" else values, return_inverse=True)
    if levels.dtype.kind == "f" and not np.mod(levels, 1).any():
        levels = levels.astype(np.int64)
    return index.astype(np.int64), tuple(map(str, levels.tolist()))


def _missing(values: Column) -> NDArray[np.bool_]:
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype.kind == "O":
        return np.array([value is None for value in values], dtype=bool)
    return np.zeros(len(values), dtype=bool)


def _refuse_missing(values: Column, where: str) -> None:
    missing = int(_missing(values).sum())
    if missing:
        raise DataError(
            f"{where}: missing in {missing} of {len(values)} rows", hint="Fill them in or remove these rows"
        )
