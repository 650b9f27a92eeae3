"""A user's own data: CSV and Parquet tables, NPZ arrays, folders of images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedtrain.data.base import Dataset, DataSpec
from fedtrain.data.checks import check_options
from fedtrain.data.readers import (
    IMAGE_SUFFIXES,
    array_inputs,
    arrow_column,
    image_header,
    images_below,
    likely_delimiter,
    read_csv,
    read_images,
    read_npz,
    read_parquet,
)
from fedtrain.data.table import Table, Use, encode_clients, encode_target, table_dataset
from fedtrain.errors import DataError, nearest
from fedtrain.experiment.sections import DataSection

__all__ = ["load_path"]

_NO_CLASS = (".", "__MACOSX")  # folders that other programs make
Pixels = Annotated[int, Field(ge=1, le=4096)]


def load_path(section: DataSection, base: Path) -> Dataset:
    """Load a user's file or folder of images.

    Args:
        section: `path`, `target`, `target_type`, `client_column`, `drop` and `options` are used.
        base: folder against which a relative path is resolved.

    Returns:
        All rows.

    Raises:
        DataError: there is no such file, its kind is unknown, or it is damaged or does not fit the section.
        MissingExtraError: the package that reads this kind of file is not installed.
    """
    assert section.path is not None, "the section's check asks for name or path"
    path = (base / Path(section.path).expanduser()).resolve()
    if not path.exists():
        raise DataError(
            "there is no such file or folder", got=path, hint="data.path is relative to the experiment file"
        )
    load = _image_folder if path.is_dir() else _LOADERS.get(path.suffix.lower())
    if load is None:
        raise DataError(
            "unknown kind of data file", got=path.name, expected=f"{', '.join(_LOADERS)} or a folder of images"
        )
    check_options(load, section.options, path.name)
    return load(path, section, **section.options)


def _csv(
    path: Path, section: DataSection, *, delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
) -> Dataset:
    """Load a CSV file with a header."""
    likely = likely_delimiter(path)
    hint = f"Set data.options.delimiter = {json.dumps(likely)}" if likely != delimiter else ""
    columns = read_csv(path, delimiter, hint=hint)
    if hint and len(columns.column_names) == 1:
        raise DataError(f"{path.name} has one column", got=columns.column_names[0], expected="several", hint=hint)
    return _arrow_dataset(path, section, columns)


def _parquet(path: Path, section: DataSection) -> Dataset:
    """Load a Parquet file."""
    return _arrow_dataset(path, section, read_parquet(path))


def _arrow_dataset(path: Path, section: DataSection, columns: Any) -> Dataset:
    """Turn a pyarrow.Table into a data set."""
    names = columns.column_names
    # Dropped columns may be of any type, so they are never converted.
    kept = {name: columns[name] for name in names if name not in section.drop}
    table = Table(
        path.name,
        {name: np.empty(0) if name in section.drop else arrow_column(path, name, kept[name]) for name in names},
    )
    assert section.target is not None, "the section's check asks for the target of a file"
    return table_dataset(table, Use(section.target, section.target_type, section.client_column, section.drop))


def _npz(
    path: Path,
    section: DataSection,
    *,
    inputs: str | None = None,
    test_inputs: str | None = None,
    test_targets: str | None = None,
) -> Dataset:
    """Load NPZ arrays: features (N, ...), uint8 images (N, H, W) or (N, C, H, W), or tokens (N, T) with targets alike.

    `inputs` names the array of inputs; it may be left out where only one is left.
    """
    arrays = read_npz(path, section.drop)
    assert section.target is not None, "the section's check asks for the target of a file"
    asked = (section.target, section.client_column, inputs, test_inputs, test_targets)
    for name in asked:
        if name is not None and name not in arrays:
            raise DataError(f"{path.name} has no such array", got=name, hint=nearest(name, arrays))
    if (test_inputs is None) != (test_targets is None):
        raise DataError("data.options names only one of test_inputs and test_targets")
    left = [name for name in arrays if name not in asked]
    if inputs is None and len(left) != 1:
        raise DataError(
            f"{path.name}: which array holds the inputs is not clear",
            got=", ".join(left) or "no array besides those named",
            hint='Say which: data.options = { inputs = "NAME" }',
        )
    train = _npz_rows(path, section, arrays[inputs or left[0]], arrays[section.target])
    if test_inputs is not None and test_targets is not None:
        train = _with_test(train, _npz_rows(path, section, arrays[test_inputs], arrays[test_targets]))
    if section.client_column is not None:
        index, names = encode_clients(arrays[section.client_column], f"{path.name}, array {section.client_column!r}")
        train = replace(train, client_names=names, client_index=torch.from_numpy(index))
    return train


def _npz_rows(path: Path, section: DataSection, inputs: NDArray[Any], targets: NDArray[Any]) -> Dataset:
    if targets.ndim == 2 and targets.dtype.kind in "iu" and inputs.dtype.kind in "iu":
        tokens = max(int(inputs.max(initial=0)), int(targets.max(initial=0))) + 1
        spec = DataSpec(inputs.shape[1:], "tokens", tokens)
        return Dataset(
            path.name, spec, array_inputs(path, inputs, tokens=True), torch.from_numpy(targets.astype(np.int64))
        )
    if targets.ndim != 1:
        raise DataError(f"{path.name}: the targets do not fit", got=f"shape {targets.shape}", expected="(N,)")
    encoded, classes = encode_target(targets, section.target_type, f"{path.name}, array {section.target!r}")
    target, values = torch.from_numpy(encoded), array_inputs(path, inputs, tokens=False)
    if values.dtype == torch.uint8:
        return _images(path, values, target, classes)
    spec = DataSpec(inputs.shape[1:], "number" if classes is None else "class", len(classes or ()), (), classes or ())
    return Dataset(path.name, spec, values, target)


def _with_test(train: Dataset, test: Dataset) -> Dataset:
    """Join a test set whose classes are all among those of training."""
    targets, spec = test.targets, train.spec
    if spec.target == "class":
        unknown = [name for name in test.spec.class_names if name not in spec.class_names]
        if unknown:
            raise DataError(f"{train.name}: the test set has a class that training has not", got=unknown[0])
        targets = torch.tensor([spec.class_names.index(name) for name in test.spec.class_names])[targets]
    elif spec.target == "tokens":
        spec = replace(spec, num_classes=max(spec.num_classes, test.spec.num_classes))
    return replace(train, spec=spec, test_inputs=test.inputs, test_targets=targets)


def _images(path: Path, pixels: torch.Tensor, targets: torch.Tensor, classes: tuple[str, ...] | None) -> Dataset:
    """`(N, C, H, W)` uint8 with their mean and deviation."""
    if pixels.shape[1] not in (1, 3, 4):
        got = f"shape {tuple(pixels.shape)}"
        raise DataError(f"{path.name}: images have 1, 3 or 4 channels", got=got, expected="(N, C, H, W)")
    counts = np.bincount(pixels.numpy().ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = float(counts @ values / counts.sum())
    std = float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum()))
    shape = tuple(pixels.shape[1:])
    spec = DataSpec(shape, "number" if classes is None else "class", len(classes or ()), (), classes or ())
    return Dataset(path.name, spec, pixels, targets, pixel_mean=mean, pixel_std=std or 1.0)


def _image_folder(
    path: Path,
    section: DataSection,
    *,
    size: Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None,
    grayscale: bool = False,
) -> Dataset:
    """Load a folder with one sub-folder of images per class; `size` (side, or [height, width]) resizes them."""
    _refuse_columns(section, path)
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(_NO_CLASS))
    groups = [images_below(folder) for folder in folders]
    files = [file for group in groups for file in group]
    if not files:
        raise DataError(
            "no images found",
            got=path,
            expected=f"one sub-folder of {', '.join(sorted(IMAGE_SUFFIXES))} per class",
        )
    modes, sizes = zip(*map(image_header, files))
    if size is None:
        height, width = sizes[0]
        for file, other in zip(files, sizes):
            if other != (height, width):
                raise DataError(
                    f"{file} is of another size than {files[0].name}",
                    expected=f"{width} x {height} pixels",
                    hint="Resize all: data.options = { size = [HEIGHT, WIDTH] }",
                )
    else:
        height, width = (size, size) if isinstance(size, int) else size
    grey = grayscale or all(mode in ("1", "L") or mode.startswith("I") for mode in modes)
    pixels = read_images(files, (1 if grey else 3, height, width))
    targets = torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
    return _images(path, pixels, targets, tuple(folder.name for folder in folders))


def _refuse_columns(section: DataSection, path: Path) -> None:
    if section.target is not None or section.client_column is not None or section.drop:
        raise DataError(
            "target, client_column and drop are for tables",
            got=f"{path} is a folder of images",
            hint="The sub-folders are the classes: leave them out",
        )


_LOADERS: dict[str, Callable[..., Dataset]] = {".csv": _csv, ".parquet": _parquet, ".npz": _npz}
