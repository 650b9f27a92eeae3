"""Public tables with natural clients: hospitals, phone users, patients, countries.

Each file is read as UCI or WISDM publish it, and also with a header line where theirs has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedtrain.data.base import Dataset
from fedtrain.data.sources.request import Request
from fedtrain.data.table import Table, Use, table_dataset
from fedtrain.errors import DataError, MissingExtraError, nearest

__all__ = ["adult", "heart_disease", "parkinsons", "wisdm"]

_HEART = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak"),
    *("slope", "ca", "thal", "target"),
)
_HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
_FLAMBY_SEED, _FLAMBY_TRAIN = 43, 0.66

_WISDM = (
    *("id", "user"),
    *(f"{axis}{bin_}" for axis in "XYZ" for bin_ in range(10)),
    *(f"{axis}{measure}" for measure in ("AVG", "PEAK", "ABSOLDEV", "STANDDEV") for axis in "XYZ"),
    *("RESULTANT", "activity"),
)

_PARKINSONS = (
    *("subject#", "age", "sex", "test_time", "motor_UPDRS", "total_UPDRS", "Jitter(%)", "Jitter(Abs)", "Jitter:RAP"),
    *("Jitter:PPQ5", "Jitter:DDP", "Shimmer", "Shimmer(dB)", "Shimmer:APQ3", "Shimmer:APQ5", "Shimmer:APQ11"),
    *("Shimmer:DDA", "NHR", "HNR", "RPDE", "DFA", "PPE"),
)
_UPDRS = ("total_UPDRS", "motor_UPDRS")

_ADULT = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)
_ADULT_NUMBERS = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
_ADULT_CLIENTS = ("native-country", "workclass")


def heart_disease(request: Request, *, split: Literal["flamby"] | None = None) -> Dataset:
    """Load 740 patients of four hospitals, with or without heart disease, prepared as in FLamby.

    The columns slope, ca and thal are left out, then incomplete rows; chest pain and resting ECG are one-hot without
    their first level. `split = "flamby"` sets the rows of FLamby's test set apart, the same for every seed.

    References:
        Janosi, Steinbrunn, Pfisterer, Detrano: Heart Disease. UCI Machine Learning Repository, 1988.
        Ogier du Terrail et al.: FLamby. NeurIPS 2022, appendix on Fed-Heart-Disease.
    """
    parts = []
    for hospital in _HOSPITALS:
        path = request.file(f"heart_disease/processed.{hospital}.data")
        cells = _read_cells(path, _HEART, ",")
        values = {name: _numbers(path, name, cells[name]) for name in _HEART if name not in ("slope", "ca", "thal")}
        parts.append(values | {"hospital": np.full(len(cells["age"]), hospital, dtype=object)})
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    complete = ~np.isnan(np.stack([values for name, values in rows.items() if name != "hospital"])).any(axis=0)
    rows = {name: values[complete] for name, values in rows.items()}
    columns = {name: values for name, values in rows.items() if name not in ("cp", "restecg", "target")}
    columns |= {f"cp={level}": (rows["cp"] == level).astype(np.float32) for level in (2, 3, 4)}
    columns |= {f"restecg={level}": (rows["restecg"] == level).astype(np.float32) for level in (1, 2)}
    columns["disease"] = np.where(rows["target"] > 0, "yes", "no").astype(object)
    data = table_dataset(Table(request.source, columns), Use("disease", "class", "hospital", request.section.drop))
    return data if split is None else _with_flambys_test_set(data)


def wisdm(request: Request) -> Dataset:
    """Load 5418 windows of ten seconds of a phone's accelerometer, 36 users, 6 activities; some peaks are missing.

    References:
        Kwapisz, Weiss, Moore: Activity Recognition using Cell Phone Accelerometers. SIGKDD Explorations 12(2), 2010.
    """
    path = request.file("wisdm/WISDM_ar_v1.1_transformed.arff")
    cells = _read_cells(path, _WISDM, ",")
    columns = {name: _numbers(path, name, cells[name]) for name in _WISDM[1:-1]}
    columns["activity"] = cells["activity"].astype(object)
    return table_dataset(Table(request.source, columns), Use("activity", "class", "user", request.section.drop))


def parkinsons(request: Request) -> Dataset:
    """Load 5875 voice recordings of 42 patients, with a UPDRS score to predict; the other such score is no feature.

    References:
        Tsanas, Little, McSharry, Ramig: Accurate Telemonitoring of Parkinson's Disease Progression by Noninvasive
        Speech Tests. IEEE Trans. Biomedical Engineering 57(4), 2010.
    """
    target = request.section.target or _UPDRS[0]
    if target not in _UPDRS:
        raise DataError(f"{request.source} has no such target", got=target, hint=nearest(target, _UPDRS))
    path = request.file("parkinsons/parkinsons_updrs.data")
    cells = _read_cells(path, _PARKINSONS, None)
    columns = {name: _numbers(path, name, cells[name]) for name in _PARKINSONS if name not in _UPDRS}
    columns[target] = _numbers(path, target, cells[target])
    return table_dataset(Table(request.source, columns), Use(target, "number", "subject#", request.section.drop))


def adult(request: Request) -> Dataset:
    """Load 32,561 + 16,281 people of the 1994 census, earning more than 50,000 dollars or not.

    A `?` is a missing feature; as a client (`client_column`: native-country or workclass) it is one of its own.

    References:
        Becker, Kohavi: Adult. UCI Machine Learning Repository, 1996.
    """
    client_column = request.section.client_column
    if client_column is not None and client_column not in _ADULT_CLIENTS:
        hint = nearest(client_column, _ADULT_CLIENTS)
        raise DataError(f"{request.source} has no clients of this kind", got=client_column, hint=hint)
    paths = [request.file(f"adult/adult.{part}") for part in ("data", "test")]
    parts = [_read_cells(path, _ADULT, ",") for path in paths]
    columns: dict[str, Any] = {}
    for name in _ADULT:
        if name in _ADULT_NUMBERS:
            columns[name] = np.concatenate([_numbers(path, name, part[name]) for path, part in zip(paths, parts)])
        else:
            texts = np.concatenate([part[name] for part in parts]).astype(object)
            columns[name] = texts if name == client_column else np.where(np.equal(texts, "?"), np.array(None), texts)
    # The test file ends each label with a dot.
    columns["income"] = np.char.rstrip(columns["income"].astype(str), ".").astype(object)
    both = table_dataset(Table(request.source, columns), Use("income", "class", client_column, request.section.drop))
    train = len(parts[0]["age"])
    return replace(
        both,
        inputs=both.inputs[:train],
        targets=both.targets[:train],
        test_inputs=both.inputs[train:],
        test_targets=both.targets[train:],
        client_index=None if both.client_index is None else both.client_index[:train],
    )


def _with_flambys_test_set(data: Dataset) -> Dataset:
    """Set about a third of each hospital's rows apart, stratified unless a class has at most two."""
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as exc:
        raise MissingExtraError("scikit-learn", "data", "FLamby's split") from exc

    assert data.client_index is not None, "each row has its hospital"
    is_train = torch.zeros(len(data.targets), dtype=torch.bool)
    for hospital in range(len(data.client_names)):
        rows = torch.nonzero(data.client_index == hospital)[:, 0]
        labels = data.targets[rows].numpy()
        scarce = min(np.bincount(labels, minlength=2)) <= 2
        train, _ = train_test_split(
            rows.numpy(),
            train_size=_FLAMBY_TRAIN,
            test_size=1 - _FLAMBY_TRAIN,
            random_state=_FLAMBY_SEED,
            stratify=None if scarce else labels,
        )
        is_train[train] = True
    return replace(
        data,
        inputs=data.inputs[is_train],
        targets=data.targets[is_train],
        client_index=data.client_index[is_train],
        test_inputs=data.inputs[~is_train],
        test_targets=data.targets[~is_train],
    )


def _read_cells(path: Path, columns: Sequence[str], delimiter: str | None) -> dict[str, NDArray[np.str_]]:
    """Read a text table; lines of ARFF headers and comments, and a header with the columns' names, are skipped.

    Args:
        path: the file.
        columns: the names of its columns, in order.
        delimiter: between cells; None for tab or comma, whichever the first line has.

    Returns:
        column -> `(N,)` cells without surrounding blanks.

    Raises:
        DataError: the file is no text, or a line has another number of cells.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path} cannot be read: {exc}") from exc
    if delimiter is None:
        delimiter = "\t" if lines and "\t" in lines[0] else ","
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(("@", "%", "|")):
            continue
        cells = [cell.strip() for cell in line.rstrip(";").split(delimiter)]
        if len(cells) != len(columns):
            raise DataError(f"{path}, line {number} is damaged", got=f"{len(cells)} cells", expected=str(len(columns)))
        if cells[0] != columns[0]:
            rows.append(cells)
    if not rows:
        raise DataError(f"{path} has no rows")
    return dict(zip(columns, np.array(rows).T))


def _numbers(path: Path, column: str, cells: NDArray[np.str_]) -> NDArray[np.float64]:
    """Parse cells as numbers; `?` and empty ones are missing (NaN).

    Raises:
        DataError: a cell is neither.
    """
    try:
        return np.where(np.isin(cells, ("?", "")), "nan", cells).astype(np.float64)
    except ValueError as exc:
        raise DataError(f"{path}, column {column!r} is damaged: {exc}", expected="numbers") from exc
