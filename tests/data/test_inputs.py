from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedtrain.data.base import DataSpec
from fedtrain.data.inputs import NewInputs, read_inputs
from fedtrain.data.prepare import Moments, Preparation
from fedtrain.data.readers import delimiter_of
from fedtrain.data.sources.shakespeare import VOCABULARY, encode_text
from fedtrain.data.table import Table, Use, encode_features, table_dataset
from fedtrain.errors import DataError
from fedtrain.experiment.sections import DataSection

NAN = float("nan")
PEOPLE = DataSpec((3,), "class", 2, ("age", "colour=blue", "colour=red"), ("no", "yes"))
PIXELS = DataSpec((1, 2, 3), "class", 2)


def preparation(spec: DataSpec, dtype: Any = "float32", **fields: Any) -> Preparation:
    return Preparation(
        spec=spec, dtype=dtype, **({"missing": "mean", "scaled_per_client": False, "moments": None} | fields)
    )


def section(**fields: Any) -> DataSection:
    return DataSection(**({"path": "train.csv", "target": "label", "clients": 1} | fields))


def read_table(folder: Path, text: str, spec: DataSpec = PEOPLE, **fields: Any) -> NewInputs:
    (folder / "new.csv").write_text(text)
    return read_inputs(folder / "new.csv", section(), preparation(spec, **fields))


def test_columns_are_found_by_name_and_texts_encoded_as_in_training(tmp_path: Path) -> None:
    text = "when,colour,age\n2020-01-01,red,30\n2020-01-02,?,40\n2020-01-03,blue,\n"
    names, raw = read_table(tmp_path, text)
    assert names == ["1", "2", "3"]
    torch.testing.assert_close(raw, torch.tensor([[30, 0, 1], [40, NAN, NAN], [NAN, 1, 0]]), equal_nan=True)


def test_parquet_and_encoded_columns_are_read_too(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(
        pa.table({"colour=red": [1, 0], "colour=blue": [0, 1], "age": [30.0, None]}), tmp_path / "n.parquet"
    )
    raw = read_inputs(tmp_path / "n.parquet", section(), preparation(PEOPLE)).raw
    torch.testing.assert_close(raw, torch.tensor([[30.0, 0, 1], [NAN, 1, 0]]), equal_nan=True)


def test_texts_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    spec = DataSpec((2,), "class", 2, ("zip=007", "zip=x"))
    assert read_table(tmp_path, "zip\n007\n", spec).raw.tolist() == [[1, 0]]
    assert read_table(tmp_path, "zip\n?\n", spec).raw.isnan().all()


def test_of_two_text_columns_the_longer_name_owns_the_feature(tmp_path: Path) -> None:
    spec = DataSpec((3,), "class", 2, ("a=x", "a=b=y", "a=b=z"))
    assert read_table(tmp_path, "a,a=b\nx,z\n", spec).raw.tolist() == [[1, 0, 1]]


@given(
    numbers=st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=8),
    data=st.data(),
)
def test_encoding_again_gives_what_training_had(numbers: list[float | None], data: st.DataObject) -> None:
    cell = st.one_of(st.none(), st.text("ab=", max_size=3))
    texts = data.draw(st.lists(cell, min_size=len(numbers), max_size=len(numbers)))
    columns = {
        "x": np.array(numbers, dtype=float),
        "t": np.array(texts, dtype=object),
        "y": np.arange(len(numbers)),
    }
    trained = table_dataset(Table("t", columns), Use("y"))
    again = encode_features(Table("t", dict(reversed(columns.items()))), trained.spec.feature_names)
    torch.testing.assert_close(torch.from_numpy(again), trained.inputs, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour,ages\nred,1\n", "new.csv lacks a column of the training data; expected age. Did you mean ages"),
        ("age\n1\n", "lacks a column.*expected colour=blue, or colour with texts such as blue"),
        (
            "age,colour\n1,red\n2,green\n",
            "column 'colour', data row 2: a text .* did not have: got green; expected blue, red",
        ),
        ("age,colour\n1,red\nold,red\n", "column 'age', data row 2: text in a column of numbers: got old"),
        ("age,colour\n1e39,red\n", "row 1: age is infinite"),
        ("age,colour\n", "new.csv has no rows"),
        ("age,age,colour\n1,2,red\n", "two columns of one name"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(tmp_path, text)


def test_rows_that_training_would_have_dropped_or_could_not_scale_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 2: age is missing; expected complete rows"):
        read_table(tmp_path, "age,colour\n1,red\n,red\n", missing="drop")
    with pytest.raises(DataError, match="one row alone cannot be scaled"):
        read_table(tmp_path, "age,colour\n1,red\n", scaled_per_client=True)


@pytest.mark.parametrize("header", ["\ufeffage;x", '"age";x,y', "\ufeffage;x\r"])
def test_a_delimiter_is_known_by_the_columns_that_it_gives(tmp_path: Path, header: str) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\n1;2\n", encoding="utf-8")
    assert delimiter_of(tmp_path / "t.csv", ",", {"age"}) == ";"
    assert delimiter_of(tmp_path / "t.csv", ",", {"dose"}) == ","
    assert delimiter_of(tmp_path / "nowhere.csv", "|", {"age"}) == "|"


def test_arrays_are_read_as_training_reads_them(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "one.npz", anything=pixels)
    np.savez(tmp_path / "two.npz", inputs=pixels, other=pixels + 1)
    for name in ("a.npy", "one.npz", "two.npz"):
        raw = read_inputs(tmp_path / name, section(), preparation(PIXELS, "uint8")).raw
        assert raw.tolist() == pixels[:, None].tolist()
    options = section(path="train.npz", options={"inputs": "x"})
    np.savez(tmp_path / "named.npz", x=pixels, label=np.ones(2))
    assert read_inputs(tmp_path / "named.npz", options, preparation(PIXELS, "uint8")).raw.shape == (2, 1, 2, 3)


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.ones((2, 3, 2), np.uint8), "uint8", r"do not fit.*shape \(2, 1, 3, 2\); expected torch.uint8"),
        (np.ones((2, 1, 2, 3)), "uint8", "got torch.float32 of shape"),
        (np.ones((2, 2, 3), np.uint8), "float32", "got torch.uint8 of shape"),
        (np.ones(3), "float32", r"numbers of shape \(N, \.\.\.\)"),
        (np.array([[None]]), "float32", "a.npy cannot be read"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, array: Any, dtype: str, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message):
        read_inputs(tmp_path / "a.npy", section(), preparation(PIXELS, dtype))


def test_an_array_that_is_not_clear_or_no_token_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((1, 2)), z=np.ones((1, 2)), label=np.ones(1))
    with pytest.raises(DataError, match="not clear: got x, z, label; expected one called inputs"):
        read_inputs(tmp_path / "a.npz", section(), preparation(DataSpec((2,), "number")))
    np.save(tmp_path / "t.npy", np.array([[0, 4], [1, 5]]))
    with pytest.raises(DataError, match="row 2: value 2 is no token; expected 0 to 4"):
        read_inputs(tmp_path / "t.npy", section(), preparation(DataSpec((2,), "tokens", 5), "int64"))


def save_image(path: Path, grey: int, size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def test_images_take_the_channels_of_training_and_its_size_only_if_it_resized(tmp_path: Path) -> None:
    save_image(tmp_path / "new/b/2.png", 9)
    save_image(tmp_path / "new/1.png", 7)
    save_image(tmp_path / "new/.hidden/3.png", 7)
    names, raw = read_inputs(tmp_path / "new", section(name="mnist", path=None), preparation(PIXELS, "uint8"))
    assert names == ["1.png", "b/2.png"]
    assert raw[:, 0, 0, 0].tolist() == [7, 9]
    save_image(tmp_path / "new/1.png", 7, size=(6, 4))
    with pytest.raises(DataError, match=r"1\.png is of another size .*got 6 x 4 pixels; expected 3 x 2"):
        read_inputs(tmp_path / "new", section(path="pictures", target=None), preparation(PIXELS, "uint8"))
    resized = section(path="pictures", target=None, options={"size": [2, 3]})
    assert read_inputs(tmp_path / "new", resized, preparation(PIXELS, "uint8")).raw.shape == (2, 1, 2, 3)


def test_images_for_a_model_of_unknown_floats_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 255)
    digits = section(name="digits", path=None, target=None)
    assert read_inputs(tmp_path / "a.png", digits, preparation(PIXELS)).raw.unique().tolist() == [1.0]
    with pytest.raises(DataError, match=r"does not take such an input: got a\.png; expected a \.npz or \.npy file"):
        read_inputs(tmp_path / "a.png", section(path="train.npz"), preparation(PIXELS))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images found"):
        read_inputs(tmp_path / "empty", digits, preparation(PIXELS))


def text_preparation(vocabulary: tuple[str, ...], window: int) -> Preparation:
    return preparation(DataSpec((window,), "tokens", len(vocabulary), class_names=vocabulary), "int64")


def test_a_text_is_read_as_shakespeare_is(tmp_path: Path) -> None:
    text = "To be,\nor n\N{LATIN SMALL LETTER O WITH DIAERESIS}t"
    (tmp_path / "a.txt").write_text(text + "\n", encoding="utf-8")
    names, raw = read_inputs(tmp_path / "a.txt", section(), text_preparation(VOCABULARY, 80))
    assert (names, raw.tolist()) == (["a.txt"], [encode_text(text).tolist()])
    assert (
        read_inputs(tmp_path / "a.txt", section(), text_preparation(VOCABULARY, 3)).raw.tolist() == raw[:, -3:].tolist()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n", "is empty"), (b"ax", "a character .* did not have: got 'x'"), (b"\xff\xfe", "cannot be read as UTF-8")],
)
def test_a_text_that_does_not_fit_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_inputs(tmp_path / "a.txt", section(), text_preparation(("a", "b"), 80))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_a_preparation_comes_back_from_json_to_the_last_bit(numbers: list[float]) -> None:
    moments = Moments(torch.tensor(numbers), torch.tensor([0.1, 0.2, 0.3]))
    kept = preparation(PEOPLE, moments=moments)
    again = Preparation.model_validate_json(kept.model_dump_json())
    assert again.spec == kept.spec
    assert again.moments is not None
    assert torch.equal(again.moments.mean, moments.mean)
    assert torch.equal(again.moments.std, moments.std)
