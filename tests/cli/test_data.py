import json
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


def quality_table(out: str) -> list[list[str]]:
    lines = out.splitlines()
    first = next(n for n, line in enumerate(lines) if line.split()[:1] == ["rows"])
    return [line.split() for line in lines[first : lines.index("", first)]]


@pytest.mark.parametrize("clients", [10, 100])
def test_quality_fits_a_terminal(fedtrain: Callable, tiny: Path, monkeypatch: pytest.MonkeyPatch, clients: int) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = fedtrain(
        "data",
        "describe",
        tiny,
        "--quality",
        "--set",
        f"data.clients={clients}",
        "--set",
        "data.partition={kind='iid'}",
    )
    assert (result.code, result.err) == (0, "")
    assert max(map(len, result.out.splitlines())) <= 80
    head, *rows = quality_table(result.out)
    # Pixels have no outliers; with a hundred clients none has the rows to tell wrong labels by.
    assert head == ["rows", "missing", "copies", "shared", "largest", *(["noise"] if clients == 10 else [])]
    assert len(rows) == 11  # ten clients, and all
    assert rows[-1][:6] == ["all", "clients", "1,438", "0%", "0", "0"]
    assert ("The 10 worst of 100 clients" in result.out) == (clients == 100)


def test_quality_names_what_is_missing_and_who_is_worst(
    fedtrain: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = ["site,age,job,y"]
    lines += [
        f"s{site:02},{site * 100 + row},{'cook' if row % 2 else 'clerk'},{row % 2}"
        for site in range(30)
        for row in range(4)
    ]
    lines[1 + 4 * 7] = "s07,,,0"
    (tmp_path / "table.csv").write_text("\n".join(lines))
    file = tmp_path / "table.toml"
    file.write_text('[data]\npath="table.csv"\ntarget="y"\nclient_column="site"\npartition={kind="natural"}\n')
    result = fedtrain("data", "describe", file, "--quality")
    assert (result.code, result.err) == (0, "")
    head, worst, *_ = quality_table(result.out)
    assert head[:3] == ["rows", "missing", "copies"]
    assert worst[:3] == ["s07", "4", "25%"]
    assert "Missing by feature: age 0.8%, job 0.8%." in result.out


def test_clients_that_are_too_small_are_named_wherever_the_data_are_told_of(fedtrain: Callable, tmp_path: Path) -> None:
    sizes = {"north": 12, "south": 10, **{f"w{n}": n for n in range(1, 8)}}
    lines = [f"{site},{row},{row % 2}\n" for site, size in sizes.items() for row in range(size)]
    (tmp_path / "table.csv").write_text("site,age,y\n" + "".join(lines))
    file = tmp_path / "table.toml"
    partition = 'partition={kind="natural", min_examples=10}'
    file.write_text(f'rounds=1\n[data]\npath="table.csv"\ntarget="y"\nclient_column="site"\n{partition}\n')
    told = "fewer examples than data.partition.min_examples: w1 (1), w2 (2), w3 (3), w4 (4), w5 (5) and 2 more"
    described = " ".join(fedtrain("data", "describe", file).out.split())
    assert told in described
    result = fedtrain("simulate", file, "--out", tmp_path / "out", "--set", "run.workers=0")
    assert f"note: Left out, with {told}" in result.out + result.err
    assert told in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "data.json").read_text())["left_out"]["w7"] == 7
    assert "Left out" not in fedtrain("data", "describe", file, "--set", "data.partition.min_examples=1").out


def test_describe_as_json(fedtrain: Callable, tiny: Path) -> None:
    result = fedtrain("data", "describe", tiny, "--quality", "--json")
    first, *clients = [json.loads(line) for line in result.out.splitlines()]
    assert (first["event"], first["num_examples"]) == ("data", 1438)
    assert [client["event"] for client in clients] == ["quality"] * 6
    assert sum(client["rows"] for client in clients) == 1438
    assert (clients[0]["missing"], clients[0]["outliers"]) == (0, None)
    alone = fedtrain("data", "describe", tiny, "--json")
    assert json.loads(alone.out) == first
