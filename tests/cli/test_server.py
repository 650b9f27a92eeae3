"""What `fedtrain server` refuses at once, with one message, exit code 2, and nothing left behind."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.fleet import run as fleet_run

TABLE = """
rounds = 1
task.name = "logistic"
[data]
path = "all.csv"
target = "outcome"
clients = 3
"""


@pytest.fixture
def refused(fedtrain: Callable, tiny: Path, tmp_path: Path) -> Callable[..., str]:
    """The message with which options are refused; without a file, for digits on six clients."""

    def run(*options: object, file: Path = tiny) -> str:
        out = tmp_path / "run"
        result = fedtrain("server", file, "--out", out, "--wait", 0, "--listen", "127.0.0.1:0", *options)
        assert (result.code, result.out.replace(f"run {out}\n", "")) == (2, "")
        assert not (out / "manifest.json").exists()
        return result.err.removeprefix("fedtrain: ")

    return run


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.toml"
    path.write_text(TABLE)
    return path


@pytest.mark.parametrize(
    ("options", "got"),
    [
        (("--own-data", "--min-clients", 2), "--own-data, --min-clients"),
        (("--wait", 5), "--wait"),
        (("--metrics", 0, "--max-clients", 3), "--max-clients, --metrics"),
        (("--enrol", "127.0.0.1:0", "--host", "here"), "--host, --enrol"),
        (("--with-clients", 6), "--with-clients"),
        (("--listen", "127.0.0.1:7443"), "--listen"),
    ],
)
def test_a_fleet_refuses_what_only_our_own_server_does(
    fedtrain: Callable, tiny: Path, tmp_path: Path, options: tuple[object, ...], got: str
) -> None:
    result = fedtrain("server", tiny, "--out", tmp_path / "run", "--runtime", "flower", *options)
    assert result.code == 2
    told = f"a Flower fleet has no such option: got {got}. Leave out --runtime flower, or this\n"
    assert result.err == f"fedtrain: {told}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [("--ca", "ca"), ("--insecure",)])
def test_a_fleet_that_is_started_here_needs_no_protection(fedtrain: Callable, tiny: Path, option: list[str]) -> None:
    result = fedtrain("server", tiny, "--runtime", "flower", *option)
    assert (result.code, f"no use for this option: got {option[0]}" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--superlink", "127.0.0.1:9"), "--superlink is for a Flower fleet. Add --runtime flower"),
        (("--enrol", "127.0.0.1:0"), "--enrol needs the authority"),
        (("--min-clients", 3, "--max-clients", 2), "3 clients are waited for, .*: got --max-clients 2; .* at least 3"),
        (("--with-clients", 6, "--max-clients", 5), "6 clients are waited for, .*: got --max-clients 5"),
        (("--max-clients", 5), "6 clients are waited for, .*: got --max-clients 5"),
        (("--min-clients", 7), "more clients .*: got --min-clients 7; expected at most 6"),
        (("--own-data", "--min-clients", 2), "no built-in data set: got digits"),
        (("--own-data", "--with-clients", 2), "Leave out --own-data"),
        (("--quiet", "--json"), "--quiet and --json are two ways"),
    ],
)
def test_options_that_do_not_fit_are_refused(refused: Callable, options: tuple[object, ...], message: str) -> None:
    assert re.search(message, refused(*options))


def test_own_data_need_a_number_of_clients_and_scaling_by_each(refused: Callable, table: Path, tmp_path: Path) -> None:
    pooled = ("--own-data", "--min-clients", 2, "--set", 'data.scaling="pooled"')
    assert refused(*pooled, file=table).startswith("clients with data of their own have no pooled scaling")
    assert refused("--own-data", file=table).startswith("how many clients will come is not known")
    assert not (tmp_path / "run").exists()


def test_where_the_server_has_no_data_own_data_is_thought_of(refused: Callable, table: Path, tmp_path: Path) -> None:
    told = refused(file=table)
    assert told.startswith(f"there is no such file or folder: got {tmp_path / 'all.csv'}.")
    assert told.endswith("--own-data\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "seconds"), [((), 3600.0), (("--patience", 5), 5.0)])
def test_a_round_of_a_fleet_has_an_hour_unless_said_otherwise(
    fedtrain: Callable, tiny: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], seconds: float
) -> None:
    given = []

    def run_on_flower(experiment: object, places: object, observer: object, fleet: fleet_run.Fleet) -> None:
        given.append(fleet.patience)
        raise KeyboardInterrupt

    monkeypatch.setattr(fleet_run, "run_on_flower", run_on_flower)
    monkeypatch.chdir(tiny.parent)
    assert fedtrain("server", tiny, "--runtime", "flower", *options).code == 130
    assert given == [seconds]
