"""New inputs for a model that is trained: what training prepared, without its targets and clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedtrain.data.prepare import Preparation
from fedtrain.data.readers import (
    IMAGE_SUFFIXES,
    array_inputs,
    arrow_column,
    delimiter_of,
    image_header,
    images_below,
    read_csv,
    read_images,
    read_npy,
    read_npz,
    read_parquet,
)
from fedtrain.data.table import Table, encode_features, feature_columns, text_columns
from fedtrain.errors import DataError
from fedtrain.experiment.sections import DataSection

__all__ = ["NewInputs", "read_inputs"]

# Sources whose inputs are floats, but pixels all the same, from 0 to 1.
_PIXELS_FROM_0_TO_1 = {"digits"}
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_KINDS = {".csv": "table", ".parquet": "table", ".npz": "array", ".npy": "array", ".txt": "text"}


class NewInputs(NamedTuple):
    """Inputs as they were read.

    Attributes:
        names: what each is called: a file's name, or its number, counted from 1.
        raw: `(N, *input_shape)`, as in a `Dataset`; one text may be shorter.
    """

    names: list[str]
    raw: Tensor


def read_inputs(path: Path, section: DataSection, preparation: Preparation) -> NewInputs:
    """Read new inputs for a model.

    Args:
        path: a table, an array, an image or a folder of images, or a text, as the model's training data were.
        section: the data section of its experiment.
        preparation: what training did to inputs.

    Returns:
        One or more inputs, which `preparation.apply` takes.

    Raises:
        DataError: there is no such input, it is damaged, or it does not fit what was trained on.
        MissingExtraError: the package that reads it is not installed.
    """
    if not path.exists():
        raise DataError("there is no such input", got=path)
    accepted = _accepted(section, preparation)
    suffix = path.suffix.lower()
    kind = "images" if path.is_dir() or suffix in IMAGE_SUFFIXES else _KINDS.get(suffix, "")
    if kind not in accepted:
        raise DataError(
            "this run's model does not take such an input", got=path.name, expected=" or ".join(accepted.values())
        )
    names, raw = _READERS[kind](path, section, preparation)
    if not len(raw):
        raise DataError(f"{path.name} has no rows")
    if kind != "text":
        preparation.check(raw)
    if preparation.scaled_per_client and len(raw) == 1:
        raise DataError(
            "one row alone cannot be scaled by its own mean and deviation, as clients were in training",
            got=path.name,
            expected="more rows",
            hint='A run with data.scaling = "pooled" predicts single rows',
        )
    return NewInputs(names, raw)


def _accepted(section: DataSection, preparation: Preparation) -> dict[str, str]:
    """Kinds of input that hold all that the model needs, in words."""
    spec = preparation.spec
    accepted = {}
    if spec.feature_names:
        accepted["table"] = "a .csv or .parquet file"
    elif spec.target == "tokens" and spec.class_names and all(len(name) == 1 for name in spec.class_names):
        accepted["text"] = "a .txt file"
    elif len(spec.input_shape) == 3 and (preparation.dtype == "uint8" or section.name in _PIXELS_FROM_0_TO_1):
        accepted["images"] = "an image, a folder of images"
    return accepted | {"array": "a .npz or .npy file"}


def _read_table(path: Path, section: DataSection, preparation: Preparation) -> NewInputs:
    """Read a table whose columns are in any order; those that are no features are ignored."""
    feature_names = preparation.spec.feature_names
    if path.suffix.lower() == ".csv":
        texts = text_columns(feature_names)
        asked = section.options.get("delimiter", ",") if section.path is not None else ","
        columns = read_csv(path, delimiter_of(path, asked, texts.union(feature_names)), texts)
    else:
        columns = read_parquet(path)
    used = dict.fromkeys(feature_columns(path.name, feature_names, columns.column_names))
    table = Table(path.name, {name: arrow_column(path, name, columns[name]) for name in used})
    return _numbered(torch.from_numpy(encode_features(table, feature_names)))


def _read_array(path: Path, section: DataSection, preparation: Preparation) -> NewInputs:
    """Read a .npy file, or the array of a .npz file that is called as it was in training, "inputs", or alone."""
    tokens = preparation.dtype == "int64"
    if path.suffix.lower() == ".npy":
        return _numbered(array_inputs(path, read_npy(path), tokens))
    arrays = read_npz(path, section.drop)
    name = section.options.get("inputs", "inputs")
    others = [section.target, section.client_column, *map(section.options.get, ("test_inputs", "test_targets"))]
    candidates = [name] if name in arrays else [known for known in arrays if known not in others]
    if len(candidates) != 1:
        raise DataError(
            f"{path.name}: which array holds the inputs is not clear",
            got=", ".join(arrays) or "no array",
            expected=f"one called {name}",
        )
    return _numbered(array_inputs(path, arrays[candidates[0]], tokens))


def _numbered(raw: Tensor) -> NewInputs:
    return NewInputs([str(row) for row in range(1, len(raw) + 1)], raw)


def _read_images(path: Path, section: DataSection, preparation: Preparation) -> NewInputs:
    """Read an image, or all images in a folder and below it."""
    names = [path.name]
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in images_below(path)]
        if not names:
            raise DataError("no images found", got=path, expected=", ".join(sorted(IMAGE_SUFFIXES)))
    files = [path / name for name in names] if path.is_dir() else [path]
    channels, height, width = preparation.spec.input_shape
    if section.path is None or "size" not in section.options:
        for file in files:
            _, size = image_header(file)
            if size != (height, width):
                raise DataError(
                    f"{file} is of another size than the images that were trained on",
                    got=f"{size[1]} x {size[0]} pixels",
                    expected=f"{width} x {height}",
                    hint="Resize it first",
                )
    pixels = read_images(files, (channels, height, width))
    return NewInputs(names, pixels if preparation.dtype == "uint8" else pixels / 255)


def _read_text(path: Path, _section: DataSection, preparation: Preparation) -> NewInputs:
    """Read a text's last characters, as many as were trained on, without the newline that editors put at its end."""
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path} cannot be read as UTF-8 text: {exc}") from exc
    if not text:
        raise DataError(f"{path.name} is empty", expected="the text that is to be continued")
    token_of = {name: token for token, name in enumerate(preparation.spec.class_names)}
    tokens = []
    for char in text[-preparation.spec.input_shape[0] :]:
        token = token_of.get(char, token_of.get(_UNKNOWN))
        if token is None:
            raise DataError(f"{path.name} has a character that the training data did not have", got=repr(char))
        tokens.append(token)
    return NewInputs([path.name], torch.tensor([tokens]))


_READERS: dict[str, Callable[[Path, DataSection, Preparation], NewInputs]] = {
    "table": _read_table,
    "array": _read_array,
    "images": _read_images,
    "text": _read_text,
}
