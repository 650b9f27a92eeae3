"""Readers of file formats: what a file holds, whatever it is for."""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtrain.errors import DataError, MissingExtraError

__all__ = [
    "IMAGE_SUFFIXES",
    "array_inputs",
    "arrow_column",
    "delimiter_of",
    "image_header",
    "images_below",
    "likely_delimiter",
    "read_csv",
    "read_images",
    "read_npy",
    "read_npz",
    "read_parquet",
]

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

_DELIMITERS = (",", ";", "\t", "|")
_LONGEST_HEADER = 1 << 20  # bytes
_CONVERT = "Convert the file, such as by: iconv -f {} -t utf-8 FILE > NEW"
_MISSING_TEXTS = ["", "?", "NA", "N/A", "NaN", "nan", "null", "NULL"]


def read_csv(path: Path, delimiter: str, texts: Collection[str] = (), hint: str = "") -> Any:
    """Read a CSV file with a header; empty cells and `?`, `NA`, `NaN`, `null` are missing.

    Args:
        path: the file.
        delimiter: between its cells.
        texts: columns that are not to be taken for numbers or dates, whatever they hold.
        hint: what to do if it cannot be read.

    Returns:
        A pyarrow.Table.

    Raises:
        DataError: the file is damaged, or two columns have one name.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import csv
    except ImportError as exc:
        raise MissingExtraError("pyarrow", "data", "reading CSV files") from exc
    _header(path)  # refuses other encodings
    parse = csv.ParseOptions(delimiter=delimiter)
    types = dict.fromkeys(texts, pa.string())
    convert = csv.ConvertOptions(null_values=_MISSING_TEXTS, strings_can_be_null=True, column_types=types)
    try:
        table = csv.read_csv(path, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, OSError) as exc:
        raise _unreadable(path, exc, hint) from exc
    _refuse_twins(path, table.column_names)
    return table


def _header(path: Path) -> str:
    """The first line of a CSV file; "" where there is none.

    Raises:
        DataError: it is not text in UTF-8.
    """
    try:
        with path.open("rb") as file:
            line = file.readline(_LONGEST_HEADER)
    except OSError:
        return ""  # who reads all of it says why
    other = "utf-16" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(line)  # the limit may cut a letter in two
    except UnicodeDecodeError as exc:
        raise DataError(f"{path.name} is not text in UTF-8", hint=_CONVERT.format(other)) from exc


def delimiter_of(path: Path, asked: str, known: Collection[str]) -> str:
    """Find what divides a CSV file's cells: what gives most of the known columns, and `asked` unless another does.

    Raises:
        DataError: the file is not text in UTF-8.
    """
    header, names = _header(path), {name.casefold() for name in known}

    def found(mark: str) -> int:
        return len({cell.strip().strip('"').casefold() for cell in header.split(mark)} & names)

    return max((asked, *_DELIMITERS), key=found)


def likely_delimiter(path: Path) -> str:
    """The mark that is most frequent in a CSV file's header.

    Raises:
        DataError: the file is not text in UTF-8.
    """
    return max(_DELIMITERS, key=_header(path).count)


def read_parquet(path: Path) -> Any:
    """Read a Parquet file as a pyarrow.Table.

    Raises:
        DataError: the file is damaged, or two columns have one name.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingExtraError("pyarrow", "data", "reading Parquet files") from exc
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as exc:
        raise _unreadable(path, exc) from exc
    _refuse_twins(path, table.column_names)
    return table


def arrow_column(path: Path, name: str, column: Any) -> NDArray[Any]:
    """Turn a column of a pyarrow.Table into `(N,)` numbers (NaN where missing) or texts (None where missing).

    Raises:
        DataError: it holds something else.
    """
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.array(column.to_pylist(), dtype=object)
    if pa.types.is_boolean(kind):  # as they are, a target's classes are called True and False
        column = column.cast(pa.int8()) if column.null_count else column
    elif pa.types.is_decimal(kind) or pa.types.is_null(kind):
        column = column.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        what, hint = str(kind), "Add it to data.drop"
        if pa.types.is_temporal(kind):
            what, hint = "dates or times", f"{hint}, or write it as a number, such as days since some date"
        elif pa.types.is_binary(kind) and path.suffix.lower() == ".csv":
            what, hint = "letters that are not in UTF-8", _CONVERT.format("latin1")
        raise DataError(f"{path.name}, column {name!r}: neither numbers nor texts", got=what, hint=hint)
    values: NDArray[Any] = column.to_numpy()
    return values


def read_npy(path: Path) -> NDArray[Any]:
    """Read the array of a .npy file.

    Raises:
        DataError: the file is damaged, or holds objects.
    """
    array: NDArray[Any] = _load_numpy(path, np.asarray)
    return array


def read_npz(path: Path, drop: Collection[str]) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz file by name, but for those in `drop`.

    Raises:
        DataError: the file is damaged, or an array holds objects.
    """

    def take(archive: Any) -> dict[str, NDArray[Any]]:
        return {name: archive[name] for name in archive.files if name not in drop}

    arrays: dict[str, NDArray[Any]] = _load_numpy(path, take)
    return arrays


def array_inputs(path: Path, inputs: NDArray[Any], tokens: bool) -> torch.Tensor:
    """Take an array as inputs.

    Args:
        path: its file, for messages.
        inputs: `(N, ...)` numbers.
        tokens: whether integers are tokens.

    Returns:
        int64 tokens, uint8 images `(N, C, H, W)` if it holds bytes `(N, C, H, W)` or `(N, H, W)`, or else float32.

    Raises:
        DataError: it holds no numbers, or a single input.
    """
    if inputs.ndim < 2 or inputs.dtype.kind not in "biuf":
        got = f"{inputs.dtype} of shape {inputs.shape}"
        raise DataError(f"{path.name}: the inputs do not fit", got=got, expected="numbers of shape (N, ...)")
    if tokens and inputs.dtype.kind in "iu":
        return torch.from_numpy(inputs.astype(np.int64))
    if inputs.dtype == np.uint8 and inputs.ndim in (3, 4):
        return torch.from_numpy(np.ascontiguousarray(inputs if inputs.ndim == 4 else inputs[:, None]))
    with np.errstate(over="ignore"):  # what is too large becomes inf, which the checks of inputs name
        return torch.from_numpy(inputs.astype(np.float32))


def image_header(file: Path) -> tuple[str, tuple[int, int]]:
    """Read an image's mode in pillow's terms, and its height and width in pixels.

    Raises:
        DataError: it cannot be read.
        MissingExtraError: pillow is not installed.
    """
    mode, (width, height) = _use_image(file, lambda image: (image.mode, image.size))
    return mode, (height, width)


def images_below(folder: Path) -> list[Path]:
    """All images in a folder and below it, sorted; hidden ones and those in hidden folders are left out."""
    found = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    return [folder / file for file in found if not any(part.startswith(".") for part in file.parts)]


def read_images(files: Sequence[Path], shape: tuple[int, int, int]) -> torch.Tensor:
    """Read images; those of another size are resized.

    Args:
        files: the images.
        shape: channels (1 is grey, 3 is RGB, 4 is RGB with alpha), height and width of each.

    Returns:
        `(N, C, H, W)` uint8.

    Raises:
        DataError: one cannot be read.
        MissingExtraError: pillow is not installed.
    """
    channels, height, width = shape
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    pixels = np.empty((len(files), height, width, channels), dtype=np.uint8)

    def decode(image: Any) -> NDArray[np.uint8]:
        from PIL import Image

        if image.mode.startswith(("I", "F")):  # pillow would cut 16 bits off at 255
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError(f"its pixels, from {values.min():g} to {values.max():g}, are not of 8 or 16 bits")
            image = Image.fromarray((values.astype(np.int64) // 257).astype(np.uint8))
        image = image.convert(mode)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(pixels.shape[1:])

    for row, file in enumerate(files):
        pixels[row] = _use_image(file, decode)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def _refuse_twins(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path.name} has two columns of one name", got=twice)


def _load_numpy(path: Path, take: Callable[[Any], Any]) -> Any:
    """Give what a .npy or .npz file holds to `take`, while it is open."""
    try:
        with path.open("rb") as file:
            return take(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as exc:
        raise _unreadable(path, exc) from exc


def _use_image(file: Path, use: Callable[[Any], Any]) -> Any:
    try:
        from PIL import Image
    except ImportError as exc:
        raise MissingExtraError("pillow", "data", "reading images") from exc
    try:
        with Image.open(file) as image:
            return use(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise _unreadable(file, exc) from exc


def _unreadable(path: Path, exc: BaseException, hint: str = "") -> DataError:
    why = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
    return DataError(f"{path} cannot be read: {why}", hint=hint or (_CONVERT.format("latin1") if "UTF8" in why else ""))
