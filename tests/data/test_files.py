from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedtrain.data.base import Dataset
from fedtrain.data.sources import load_dataset
from fedtrain.data.table import Table, Use, table_dataset
from fedtrain.errors import DataError, MissingExtraError
from fedtrain.experiment.sections import DataSection

CSV = """id,age,colour,town,label
1,30,red,Ulm,yes
2,,blue,Bonn,no
3,50,?,Ulm,yes
4,41,red,Bonn,no
"""


def load(base: Path, path: str, **fields: Any) -> Dataset:
    return load_dataset(DataSection(path=path, clients=1, **fields), None, base, 0)


def test_csv_columns_become_features_classes_and_clients(tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text(CSV)
    data = load(tmp_path, "people.csv", target="label", client_column="town", drop=["id"])
    assert data.spec.feature_names == ("age", "colour=blue", "colour=red")
    nan = float("nan")
    expected = torch.tensor([[30, 0, 1], [nan, 1, 0], [50, nan, nan], [41, 0, 1]])
    torch.testing.assert_close(data.inputs, expected, equal_nan=True)
    assert (data.spec.class_names, data.targets.tolist()) == (("no", "yes"), [1, 0, 1, 0])
    assert data.client_index is not None
    assert (data.client_names, data.client_index.tolist()) == (("Bonn", "Ulm"), [1, 0, 1, 0])


def test_parquet_gives_the_same_as_csv(tmp_path: Path) -> None:
    from pyarrow import csv, parquet

    (tmp_path / "people.csv").write_text(CSV.replace("?", "red"))
    parquet.write_table(csv.read_csv(tmp_path / "people.csv"), tmp_path / "people.parquet")
    first, second = (
        load(tmp_path, f"people.{kind}", target="label", client_column="town") for kind in ("csv", "parquet")
    )
    assert first.spec == second.spec
    torch.testing.assert_close(first.inputs, second.inputs, equal_nan=True)


@pytest.mark.parametrize(
    ("column", "target_type", "expected"),
    [
        (["1.5", "2"], "auto", [1.5, 2.0]),
        (["7", "3"], "auto", [1, 0]),
        (["7", "3"], "number", [7.0, 3.0]),
        (["1.5", "0.5"], "class", [1, 0]),
        (["true", "false"], "auto", [1, 0]),
    ],
)
def test_target_types(tmp_path: Path, column: list[str], target_type: str, expected: list[float]) -> None:
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"1,{cell}\n" for cell in column))
    assert load(tmp_path, "t.csv", target="y", target_type=target_type).targets.tolist() == expected


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("x,label\n1,a\n", {"target": "lable"}, "no such column: got lable.*Did you mean label"),
        ("x,y\n1,a\n", {"target": "y", "drop": ["z"]}, "no such column: got z"),
        ("x,y\n1,a\n1,\n", {"target": "y"}, "missing in 1 of 2 rows"),
        ("x,y\n1,a\n", {"target": "y", "target_type": "number"}, "target is text"),
        ("x,y\n1,a\n", {"target": "y", "drop": ["x"]}, "no feature column left"),
        ("x,y\n1e39,a\n", {"target": "y"}, "infinite value in feature 0"),
        ("x,x,y\n1,2,a\n", {"target": "y"}, "two columns of one name: got x"),
        ("x,y\n1,a\n1\n", {"target": "y"}, "t.csv cannot be read"),
        ("x,y\n", {"target": "y"}, "no examples"),
        (
            "x,y\n2020-01-01,a\n",
            {"target": "y"},
            "column 'x': neither numbers nor texts: got dates or times.*data.drop",
        ),
        ("x,y\n1,a\n", {"target": "y", "options": {"delimeter": ";"}}, "Did you mean delimiter"),
        ("x,y\n1,a\n", {"target": "y", "options": {"delimiter": 3}}, "data.options.delimiter"),
        ("x,y\n" + "".join(f"name{i},a\n" for i in range(1001)), {"target": "y"}, "too many different texts.*got 1001"),
        (
            "x,y\n" + "".join(f"note {i},a\n" for i in range(21)),
            {"target": "y"},
            "21 in 21 rows, such as note 0",
        ),
        (
            "x,y\n" + "".join(f"{i},a\n" for i in range(50)) + "unknown,a\n",
            {"target": "y"},
            "column 'x', data row 51: text in a column of numbers: got unknown.*an empty cell.*data.drop",
        ),
        (
            "x,y\n" + "".join(f"1,{i}.5\n" for i in range(50)) + "1,unknown\n",
            {"target": "y"},
            "column 'y', data row 51: text in a column of numbers: got unknown.*data.target_type = .class",
        ),
        ("x,y\n" + "".join(f"1,{i}\n" for i in range(21)), {"target": "y"}, "number or a class: got 21 .*target_type"),
        ("x;y\n1;a\n", {"target": "y"}, 'data.options.delimiter = ";"'),
        ("x;y\n1,5;a\n", {"target": "y"}, 'cannot be read.*data.options.delimiter = ";"'),
        (
            "x;y\n" + "".join(f"17,{i};a\n" for i in range(30)) * 3,
            {"target": "y", "options": {"delimiter": ";"}},
            "column 'x', data row 1 and 89 more: text in a column of numbers: got 17,0; expected a number such as",
        ),
        (
            "x,y\n" + "".join(f"1,1.{i:03}.000\n" for i in range(30)) * 3,
            {"target": "y", "target_type": "number"},
            "column 'y', data row 1 and 89 more: text in a column of numbers: got 1.000.000",
        ),
        ("x,y\n" + "".join(f"1,name {i}\n" for i in range(30)), {"target": "y"}, "30 in 30 rows, such as name 0"),
        ("x,y\n1,benign\n2,Benign\n", {"target": "y"}, "column 'y': two spellings.*'Benign' and 'benign'"),
        ("x,y\nyes,a\n'yes ',b\n".replace("'", '"'), {"target": "y"}, "column 'x': two spellings.*'yes' and 'yes '"),
        ("x,y,c\n1,a,s\n1,b,n\n2,a,n \n", {"target": "y", "client_column": "c"}, "column 'c': two spellings"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path: Path, text: str, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "t.csv", **fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x,y\nM\u00fcller,a\n".encode("latin1"), "column 'x'.*got letters that are not in UTF-8.*iconv -f latin1"),
        ("x,y\n1,a\n".encode("utf-16"), "not text in UTF-8.*iconv -f utf-16"),
        ("gr\u00f6\u00dfe,y\n1,a\n".encode("latin1"), "not text in UTF-8.*iconv -f latin1"),
    ],
)
def test_a_file_in_another_encoding_is_to_be_converted(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "t.csv", target="y")


def test_classes_that_are_true_and_false_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,flag,y\n1,true,True\n2,,False\n")
    data = load(tmp_path, "t.csv", target="y")
    assert data.spec.class_names == ("False", "True")
    assert data.targets.tolist() == [1, 0]
    torch.testing.assert_close(data.inputs, torch.tensor([[1.0, 1.0], [2.0, torch.nan]]), equal_nan=True)


def test_case_may_tell_short_codes_and_clients_apart(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("gene,client,y\nAA,aB3,E\nAa,ab3,e\naa,ab3,e\n")
    data = load(tmp_path, "t.csv", target="y", client_column="client")
    assert (data.spec.class_names, data.client_names) == (("E", "e"), ("aB3", "ab3"))
    assert data.spec.feature_names == ("gene=AA", "gene=Aa", "gene=aa")


@pytest.mark.parametrize(
    "codes",
    [
        [*map(str, range(12)), "12+"],  # a count
        [*map(str, range(1, 23)), "X", "Y"],  # chromosomes
        [f"0{i}" for i in range(31)],  # texts all of them
        [f"10.0.{i}.1" for i in range(31)],
        [f"{i % 28 + 1}.03.20{i}" for i in range(31)],
        [*map(str, range(90)), *(f"V{i}" for i in range(20))],
    ],
)
def test_codes_that_look_like_numbers_are_categories(codes: list[str]) -> None:
    columns = {"x": np.array(codes * 3, dtype=object), "y": np.array(["a"] * len(codes) * 3, dtype=object)}
    features = table_dataset(Table("t", columns), Use("y")).spec.feature_names
    assert features == tuple(f"x={code}" for code in sorted(codes))


def test_texts_are_classes_where_the_file_says_so(tmp_path: Path) -> None:
    for cells in ([f"name {i}" for i in range(30)], [*map(str, range(60)), "unknown"]):
        (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"1,{cell}\n" for cell in cells))
        assert load(tmp_path, "t.csv", target="y", target_type="class").spec.class_names == tuple(sorted(cells))


def test_clients_have_names_and_tokens_begin_at_0(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.ones((2, 3)), y=np.array([0, 1]), c=np.array(["a", ""]))
    with pytest.raises(DataError, match="array 'c': a client without a name"):
        load(tmp_path, "t.npz", target="y", client_column="c")
    np.savez(tmp_path / "t.npz", x=np.array([[1, -1]]), y=np.array([[0, 1]]))
    with pytest.raises(DataError, match=r"a token of t.npz is below 0: got -1"):
        load(tmp_path, "t.npz", target="y")


def test_bytes_are_texts_in_utf_8(tmp_path: Path) -> None:
    arrays = {"x": np.ones((2, 3)), "y": np.array([b"gut", "sch\u00f6n".encode()]), "c": np.array([b"n", b"s"])}
    np.savez(tmp_path / "t.npz", **arrays)
    data = load(tmp_path, "t.npz", target="y", client_column="c")
    assert (data.spec.class_names, data.client_names) == (("gut", "sch\u00f6n"), ("n", "s"))
    np.savez(tmp_path / "t.npz", x=np.ones((2, 3)), y=np.array([b"gut", b"sch\xf6n"]))
    with pytest.raises(DataError, match="array 'y': bytes that are not text in UTF-8"):
        load(tmp_path, "t.npz", target="y")


def test_a_dropped_column_may_be_of_any_kind_and_the_delimiter_any(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("when;x;y\n2020-01-01;1;a\n")
    assert load(tmp_path, "t.csv", target="y", drop=["when"], options={"delimiter": ";"}).inputs.tolist() == [[1.0]]


def test_a_missing_file_or_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no such file or folder.*relative to the experiment file"):
        load(tmp_path, "nowhere.csv", target="y")
    (tmp_path / "t.xlsx").touch()
    with pytest.raises(DataError, match=r"unknown kind of data file: got t.xlsx; expected \.csv"):
        load(tmp_path, "t.xlsx", target="y")
    (tmp_path / "t.csv").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"fedtrain\[data\]"):
        load(tmp_path, "t.csv", target="y")


def test_npz_images_with_test_set_and_clients(tmp_path: Path) -> None:
    images = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    np.savez(
        tmp_path / "a.npz", x=images, y=np.array([5, 3]), who=np.array(["b", "a"]), tx=images[:1], ty=np.array([5])
    )
    options = {"inputs": "x", "test_inputs": "tx", "test_targets": "ty"}
    data = load(tmp_path, "a.npz", target="y", client_column="who", options=options)
    assert data.spec.input_shape == (1, 2, 3)
    assert data.spec.class_names == ("3", "5")
    assert data.targets.tolist() == [1, 0]
    assert data.test_targets is not None
    assert data.test_targets.tolist() == [1]
    assert data.client_names == ("a", "b")
    assert data.pixel_mean == pytest.approx(images.mean() / 255)
    assert data.pixel_std == pytest.approx(images.std() / 255)


def test_npz_features_and_tokens(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.array([[1, 2], [3, 4]]), y=np.array([0.5, 1.0]))
    features = load(tmp_path, "f.npz", target="y")
    assert (features.inputs.dtype, features.spec.target) == (torch.float32, "number")
    np.savez(tmp_path / "t.npz", x=np.array([[1, 2], [3, 4]]), y=np.array([[2, 3], [4, 7]]))
    tokens = load(tmp_path, "t.npz", target="y")
    assert (tokens.inputs.dtype, tokens.spec.target, tokens.spec.num_classes) == (torch.int64, "tokens", 8)


@pytest.mark.parametrize(
    ("arrays", "fields", "message"),
    [
        (
            {"x": np.ones((2, 2)), "z": np.ones(2), "y": np.ones(2)},
            {},
            "which array holds the inputs is not clear: got x, z",
        ),
        ({"x": np.ones((2, 2))}, {}, "no such array: got y"),
        ({"x": np.ones((3, 2)), "y": np.ones(2)}, {}, "targets of a.npz do not fit"),
        ({"x": np.ones((2, 9, 4, 4), dtype=np.uint8), "y": np.ones(2)}, {}, "1, 3 or 4 channels"),
        ({"x": np.array([[None]]), "y": np.ones(1)}, {}, "a.npz cannot be read"),
        (
            {"x": np.ones((2, 2)), "y": np.ones(2), "t": np.ones((1, 2)), "u": np.array([4])},
            {"options": {"inputs": "x", "test_inputs": "t", "test_targets": "u"}},
            "test set has a class that training has not: got 4",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path, arrays: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "a.npz", target="y", **fields)


def test_a_damaged_npz_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(DataError, match=r"a\.npz cannot be read"):
        load(tmp_path, "a.npz", target="y")


def save_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (4, 2), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def test_an_image_folder_has_a_class_per_sub_folder(tmp_path: Path) -> None:
    save_image(tmp_path / "pictures/dog/1.png", (255, 0, 0))
    save_image(tmp_path / "pictures/cat/1.png", (0, 255, 0))
    save_image(tmp_path / "pictures/cat/2.png", (8, 8, 8), mode="L")
    (tmp_path / "pictures/cat/notes.txt").touch()
    data = load(tmp_path, "pictures")
    assert (data.spec.class_names, data.targets.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert data.inputs.shape == (3, 3, 2, 4)
    assert data.inputs[:, :, 0, 0].tolist() == [[0, 255, 0], [8, 8, 8], [255, 0, 0]]
    small = load(tmp_path, "pictures", options={"size": [1, 2], "grayscale": True})
    assert small.inputs.shape == (3, 1, 1, 2)


def test_images_below_a_class_are_of_it_and_16_bits_keep_their_greys(tmp_path: Path) -> None:
    for name, value in (("cat/kittens/1.png", 0x8080), ("dog/1.png", 0xFFFF), ("__MACOSX/dog/1.png", 0)):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2), value, dtype=np.uint16)).save(file)
    data = load(tmp_path, "pictures")
    assert (data.spec.class_names, data.inputs.shape) == (("cat", "dog"), (2, 1, 2, 2))
    assert data.inputs[:, 0, 0, 0].tolist() == [0x80, 0xFF]
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "pictures/cat/2.tif")
    with pytest.raises(DataError, match=r"its pixels, from 0.5 to 0.5, are not of 8 or 16 bits"):
        load(tmp_path, "pictures")


def test_images_that_do_not_fit_are_named(tmp_path: Path) -> None:
    (tmp_path / "pictures/empty").mkdir(parents=True)
    with pytest.raises(DataError, match="no images found"):
        load(tmp_path, "pictures")
    save_image(tmp_path / "pictures/a/1.png", (0, 0, 0))
    save_image(tmp_path / "pictures/b/2.png", (0, 0, 0), size=(5, 5))
    with pytest.raises(DataError, match=r"2\.png is of another size than 1\.png; expected 4 x 2 pixels.*size ="):
        load(tmp_path, "pictures")
    (tmp_path / "pictures/b/2.png").write_bytes((tmp_path / "pictures/a/1.png").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"2\.png cannot be read"):
        load(tmp_path, "pictures")
    with pytest.raises(DataError, match="are for tables"):
        load(tmp_path, "pictures", target="y")
