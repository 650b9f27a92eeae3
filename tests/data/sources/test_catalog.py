"""Every built-in source, the ways to name one's own, and what is said when something is missing."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtrain.data.base import Dataset, DataSpec
from fedtrain.data.checks import check_dataset
from fedtrain.data.fetch import OFFICIAL
from fedtrain.data.sources import SOURCES, load_dataset
from fedtrain.data.sources.shakespeare import VOCABULARY, encode_text
from fedtrain.errors import DataError
from fedtrain.experiment.sections import DataSection


def load(name: str, root: Path | None = None, base: Path = Path(), **fields: Any) -> Dataset:
    return load_dataset(DataSection(name=name, clients=1, **fields), root, base, 0)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def small_root(tmp_path: Path) -> Path:
    """A data root with tiny files in the official formats."""
    images, labels = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2), np.array([0, 9, 4], np.uint8)
    for folder in ("mnist", "heart_disease", "wisdm", "parkinsons", "adult", "shakespeare/plays"):
        (tmp_path / folder).mkdir(parents=True)
    for part in ("train", "t10k"):
        (tmp_path / f"mnist/{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"mnist/{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    for hospital in ("cleveland", "hungarian", "switzerland", "va"):
        (tmp_path / f"heart_disease/processed.{hospital}.data").write_text(
            "63,1,4,140,?,0,1,112,1,3,2,?,?,2\n60,0,3,130,200,0,2,110,0,1,?,?,?,3\n60,0,3,130,200,0,2,110,0,1,?,?,?,0\n"
        )
    row = "1,33," + "0.1," * 34 + "?," + "0.2," * 8 + "Jogging"
    (tmp_path / "wisdm/WISDM_ar_v1.1_transformed.arff").write_text(f"@relation x\n@data\n{row};\n")
    (tmp_path / "parkinsons/parkinsons_updrs.data").write_text("7,72,0,5.6,28.1,34.3," + ",".join("1" * 16))
    person = "39, {}, 77516, HS-grad, 13, Divorced, Sales, Wife, White, Female, 0, 0, 40, {}, {}\n"
    (tmp_path / "adult/adult.data").write_text(
        person.format("Private", "?", "<=50K") + person.format("?", "Cuba", ">50K") + "\n"
    )
    (tmp_path / "adult/adult.test").write_text("|1x3 Cross validator\n" + person.format("Private", "Cuba", ">50K."))
    (tmp_path / "shakespeare/plays/play.txt").write_text(
        "\tPLAY\n\nROMEO\ta lover.\n\nACT I\n\nSCENE I\tA street.\n\n"
        "ROMEO\tAy me! [Sighs]\n\tsad.\n\nNurse:\tHo.\n\n\t[Exit]\n\nROMEO\tAdieu, O\n"
    )
    (tmp_path / "shakespeare/plays/sonnets.txt").write_text("FROM fairest creatures\n")
    return tmp_path


def test_digits_are_scaled_to_one() -> None:
    data = load("digits")
    assert data.inputs.shape == (1797, 1, 8, 8)
    assert (data.inputs.min(), data.inputs.max()) == (0, 1)


def test_breast_cancer_names_its_features_and_drops_some() -> None:
    data = load("breast-cancer", drop=["mean radius"])
    assert data.inputs.shape == (569, 29)
    assert torch.bincount(data.targets).tolist() == [357, 212]
    assert data.spec.class_names == ("benign", "malignant")


def test_fcube_is_seeded_and_labelled_by_its_first_coordinate() -> None:
    data = load("fcube", options={"train_size": 50, "test_size": 7})
    assert data.test_inputs is not None
    assert (data.inputs.shape, data.test_inputs.shape) == ((50, 3), (7, 3))
    assert data.inputs.abs().max() <= 1
    assert data.targets.tolist() == [int(x > 0) for x in data.inputs[:, 0].tolist()]
    torch.testing.assert_close(load("fcube", options={"train_size": 50, "test_size": 7}).inputs, data.inputs)


def test_idx_images(small_root: Path) -> None:
    data = load("mnist", small_root)
    assert data.inputs[1].tolist() == [[[4, 5], [6, 7]]]
    assert data.targets.tolist() == [0, 9, 4]


def test_incomplete_patients_are_dropped_and_levels_are_one_hot(small_root: Path) -> None:
    data = load("heart-disease", small_root)
    assert data.client_names == ("cleveland", "hungarian", "switzerland", "va")
    assert data.spec.feature_names[8:] == ("cp=2", "cp=3", "cp=4", "restecg=1", "restecg=2")
    assert data.inputs.tolist() == [[60, 0, 130, 200, 0, 110, 0, 1, 0, 1, 0, 0, 1]] * 8
    assert data.targets.tolist() == [1, 0] * 4


def test_flambys_test_set_is_set_apart(small_root: Path) -> None:
    data = load("heart-disease", small_root, options={"split": "flamby"})
    assert data.test_inputs is not None
    assert data.client_index is not None
    assert data.client_index.tolist() == [0, 1, 2, 3]  # one of two rows each
    assert (len(data.inputs), len(data.targets), data.test_inputs.shape) == (4, 4, (4, 13))
    with pytest.raises(DataError, match=r"data.options.split: Input should be 'flamby': got flamb"):
        load("heart-disease", small_root, options={"split": "flamb"})


@pytest.mark.real_data
def test_flambys_test_set_has_the_published_sizes(data_root: Path) -> None:
    data = load("heart-disease", data_root, options={"split": "flamby"})
    assert data.test_inputs is not None
    assert data.client_index is not None
    assert torch.bincount(data.client_index).tolist() == [199, 172, 30, 85]
    assert len(data.test_inputs) == 104 + 89 + 16 + 45
    ill = [int(data.targets[data.client_index == hospital].sum()) for hospital in range(4)]
    assert ill == [91, 65, 30, 66]  # stratified, but for Switzerland
    assert data.test_inputs[:, 0].sum() == 13557  # years: these rows and no others


def test_official_headers_are_skipped_and_question_marks_are_missing(small_root: Path) -> None:
    wisdm = load("wisdm", small_root)
    assert (wisdm.inputs.shape, wisdm.client_names, wisdm.spec.class_names) == ((1, 43), ("33",), ("Jogging",))
    assert wisdm.inputs[0].isnan().nonzero().tolist() == [[34]]
    adult = load("adult", small_root)
    assert adult.test_targets is not None
    assert (adult.targets.tolist(), adult.test_targets.tolist()) == ([0, 1], [1])
    country = adult.spec.feature_names.index("native-country=Cuba")
    assert adult.inputs[:, country].isnan().tolist() == [True, False]


def test_people_without_a_country_are_a_client_of_their_own(small_root: Path) -> None:
    data = load("adult", small_root, client_column="native-country")
    assert data.client_index is not None
    assert (data.client_names, data.client_index.tolist()) == (("?", "Cuba"), [0, 1])
    assert not any(name.startswith("native-country") for name in data.spec.feature_names)


@pytest.mark.parametrize(("target", "score"), [(None, 34.3), ("motor_UPDRS", 28.1)])
def test_the_other_score_is_never_a_feature(small_root: Path, target: str | None, score: float) -> None:
    data = load("parkinsons", small_root, target=target)
    assert data.targets.tolist() == pytest.approx([score])
    assert data.spec.feature_names[:4] == ("age", "sex", "test_time", "Jitter(%)")
    assert data.inputs.shape == (1, 19)


def test_roles_say_the_next_character(small_root: Path) -> None:
    data = load("shakespeare", small_root, options={"window": 5})
    texts = [
        ["".join(VOCABULARY[token] for token in row) for row in part.tolist()] for part in (data.inputs, data.targets)
    ]
    assert texts == [["Ay me", "!\nsad", ".\nAdi"], ["y me!", "\nsad.", "\nAdie"]]
    assert data.client_names == ("play:ROMEO",)
    assert encode_text("a\t\u00e9").tolist() == [VOCABULARY.index("a"), 0, 0]


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.needs_root])
def test_missing_files_name_the_ways_on(name: str, tmp_path: Path) -> None:
    for root, where in ((None, "got none"), (tmp_path, str(tmp_path))):
        with pytest.raises(DataError) as caught:
            load(name, root)
        message = str(caught.value)
        assert where in message
        assert "--data-root" in message
        assert "FEDTRAIN_DATA" in message
        assert (f"fedtrain data fetch {name}" in message) == (name in OFFICIAL)


@pytest.mark.parametrize(
    ("name", "path", "damage", "message"),
    [
        ("mnist", "mnist/train-images-idx3-ubyte.gz", lambda old: old[:-9], "train-images.*is damaged"),
        ("mnist", "mnist/train-images-idx3-ubyte.gz", lambda old: b"<html>", "train-images.*is damaged"),
        ("mnist", "mnist/train-images-idx3-ubyte.gz", lambda old: gzip.compress(b"\0\0\x08\x03"), "is damaged"),
        ("mnist", "mnist/t10k-labels-idx1-ubyte.gz", lambda old: gzip.compress(idx(np.zeros(2, np.uint8))), "2 labels"),
        ("wisdm", "wisdm/WISDM_ar_v1.1_transformed.arff", lambda old: old + b"1,2\n", "line 4 is damaged: got 2 cells"),
        (
            "wisdm",
            "wisdm/WISDM_ar_v1.1_transformed.arff",
            lambda old: old.replace(b"0.2", b"x"),
            "'Z?[A-Z]+' is damaged",
        ),
        ("adult", "adult/adult.data", lambda old: b"\xff\xfe", r"adult\.data cannot be read"),
        ("shakespeare", "shakespeare/plays/play.txt", lambda old: b"", "holds no play"),
    ],
)
def test_damaged_files_are_named(small_root: Path, name: str, path: str, damage: Any, message: str) -> None:
    file = small_root / path
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message):
        load(name, small_root)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("minst", {}, "no such data source: got minst.*Did you mean mnist"),
        ("digits", {"target": "y"}, "data.target has no meaning for digits"),
        ("digits", {"drop": ["a"]}, "data.drop has no meaning for digits"),
        ("digits", {"options": {"size": 3}}, "digits has no such option: got size"),
        ("fcube", {"options": {"train_size": 0}}, "data.options.train_size.*got 0"),
        ("breast-cancer", {"drop": ["mean radios"]}, "Did you mean mean radius"),
        ("parkinsons", {"target": "UPDRS"}, "no such target"),
        ("adult", {"client_column": "race"}, "no clients of this kind"),
    ],
)
def test_sections_that_do_not_fit_a_source_are_refused(
    small_root: Path, name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(name, small_root, **fields)


LOADER = """
import torch
from fedtrain.data.base import Dataset, DataSpec

def load(rows=4, dtype=torch.float32, classes=2, broken=False):
    if broken:
        raise KeyError("column")
    return Dataset("own", DataSpec((3,), "class", classes), torch.zeros(rows, 3, dtype=dtype), torch.arange(rows) % 2)

def nothing():
    return 3
"""


def test_an_own_loader_gets_the_options(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LOADER)
    assert len(load("own.py:load", base=tmp_path, options={"rows": 6}).targets) == 6


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("load", {"row": 3}, "data.options do not fit own.py:load: .*'row'"),
        ("load", {"broken": True}, "own.py:load failed with KeyError: 'column'"),
        ("load", {"rows": 0}, "own has no examples"),
        ("load", {"dtype": torch.float64}, r"inputs of own do not fit its spec: got torch.float64 of shape \(4, 3\)"),
        ("load", {"classes": 1}, "target of own is out of range: got 0 to 1; expected 0 to 0"),
        ("nothing", {}, "returned no fedtrain.data.Dataset: got int"),
        ("absent", {}, "absent"),
    ],
)
def test_own_loaders_that_do_not_fit_are_named(
    tmp_path: Path, function: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "own.py").write_text(LOADER)
    with pytest.raises(DataError, match=message):
        load(f"own.py:{function}", base=tmp_path, options=options)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_images(data_root: Path, name: str) -> None:
    data = load(name, data_root)
    assert data.test_inputs is not None
    assert (data.inputs.shape, data.test_inputs.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert data.inputs.dtype == torch.uint8
    counts = torch.bincount(data.inputs.flatten(), minlength=256).double()
    values = torch.arange(256).double() / 255
    mean = (counts @ values / counts.sum()).item()
    assert data.pixel_mean == pytest.approx(mean)
    assert data.pixel_std == pytest.approx((counts @ (values - mean) ** 2 / counts.sum()).sqrt().item())


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "spec", "rows", "missing", "client_sizes"),
    [
        ("heart-disease", ((13,), "class", 2), 740, False, [303, 261, 46, 130]),
        ("wisdm", ((43,), "class", 6), 5418, True, 36),
        ("parkinsons", ((19,), "number", 0), 5875, False, 42),
        ("adult", ((105,), "class", 2), 32561, True, 0),
        ("shakespeare", ((80,), "tokens", 97), 49564, False, 1135),
    ],
)
def test_real_tables_and_plays(
    data_root: Path, name: str, spec: tuple[Any, ...], rows: int, missing: bool, client_sizes: list[int] | int
) -> None:
    data = load(name, data_root)
    assert (data.spec.input_shape, data.spec.target, data.spec.num_classes) == spec
    assert len(data.inputs) == rows
    assert bool(data.inputs.float().isnan().any()) == missing
    sizes = [] if data.client_index is None else torch.bincount(data.client_index).tolist()
    assert client_sizes in (sizes, len(sizes))
    if name == "adult":
        assert data.test_inputs is not None
        assert len(data.test_inputs) == 16281
        assert int((~data.inputs.isnan().any(dim=1)).sum()) == 30162


X, Y, SPEC = torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), DataSpec((2,), "class", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": [[1.0, 2.0]]}, "inputs of own is of another kind: got list; expected a dense torch.Tensor"),
        ({"inputs": X.to_sparse()}, "inputs of own is of another kind: got a tensor on cpu"),
        ({"inputs": X.clone().requires_grad_()}, "requires no gradient"),
        ({"inputs": X.to("meta")}, "inputs of own is of another kind: got a tensor on meta"),
        ({"targets": None}, "targets of own is of another kind: got NoneType"),
        ({"client_names": None, "client_index": Y}, "client_names of own is of another kind.*a tuple of texts"),
        ({"client_names": (b"a", b"b"), "client_index": Y}, "client_names of own is of another kind"),
        ({"spec": replace(SPEC, class_names=("no",))}, "class_names of own does not fit its spec: got 1 names; expec"),
        ({"spec": replace(SPEC, feature_names=("a",))}, "feature_names of own does not fit its spec.*expected 2"),
        ({"spec": replace(SPEC, target="clas")}, "the spec's target of own is unknown: got clas"),
    ],
)
def test_what_an_own_loader_gets_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"name": "own", "spec": SPEC, "inputs": X, "targets": Y}
    check_dataset(Dataset(**fields))
    with pytest.raises(DataError, match=message):
        check_dataset(Dataset(**(fields | changes)))
