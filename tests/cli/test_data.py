from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.data.fetch import OFFICIAL
from fedtrain.data.sources import SOURCES


def test_fetch_lists_every_source(fedtrain: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTRAIN_DATA", raising=False)
    result = fedtrain("data", "fetch")
    assert result.code == 0
    listed = [line.split(maxsplit=1) for line in result.out.splitlines()]
    assert [name for name, _ in listed] == list(SOURCES)
    told = dict(listed)
    assert told["digits"].startswith("built in ")
    assert told["mnist"].startswith("can be fetched ")
    assert told["wisdm"].startswith("bring it yourself ")


def test_fetch_lists_what_is_there(fedtrain: Callable, tmp_path: Path) -> None:
    (tmp_path / "heart_disease").mkdir()
    for name in ("mnist", "fashion-mnist"):
        (tmp_path / name).mkdir()
        for file in OFFICIAL[name].files:
            (tmp_path / name / file.name).touch()
    (tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").rename(tmp_path / "fashion-mnist" / "half.gz.part")
    told = dict(line.split(maxsplit=1) for line in fedtrain("data", "fetch", "--data-root", tmp_path).out.splitlines())
    there = [name for name, where in told.items() if where.startswith("in the data root ")]
    assert there == ["mnist", "heart-disease"]


def test_fetch_needs_a_data_root(fedtrain: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTRAIN_DATA", raising=False)
    result = fedtrain("data", "fetch", "mnist")
    assert result.code == 2
    assert "where to put the data is not known" in result.err
    assert "--data-root DIR, or set FEDTRAIN_DATA" in result.err


def test_fetch_of_what_has_no_official_download(fedtrain: Callable, tmp_path: Path) -> None:
    result = fedtrain("data", "fetch", "mnits", "--data-root", tmp_path)
    assert result.code == 2
    assert "no official download is known for this data set: got mnits. Did you mean mnist?" in result.err


def test_fetch_from_a_server_that_is_not_there_can_be_run_again(fedtrain: Callable, tmp_path: Path) -> None:
    result = fedtrain("data", "fetch", "mnist", "--data-root", tmp_path, "--mirror", "http://127.0.0.1:9")
    assert result.code == 1
    assert "cannot be reached" in result.err
    assert "run the same command again" in result.err


def test_describe_shows_figures_and_a_picture(
    fedtrain: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "labels.svg"
    result = fedtrain("data", "describe", tiny, "--picture", picture, "--set", "data.partition.alpha=0.1")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "digits: 1,438 examples on 6 clients, 359 in the central test set"
    assert any(line.startswith("Label skew: L1 ") for line in lines)
    assert lines[-1] == f"Picture: {picture}"
    assert max(map(len, lines[:-1])) <= 80
    assert picture.read_text().startswith("<?xml")


def test_describe_knows_picture_formats(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    result = fedtrain("data", "describe", tiny, "--picture", tmp_path / "labels.bmp")
    assert result.code == 2
    assert "a name that ends in .png, .svg, .pdf" in result.err
