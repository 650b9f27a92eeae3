import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.records import RoundRecord
from fedtrain.rundir import RunFolder


@pytest.fixture
def runs(simulated: Callable, tiny: Path, tmp_path: Path) -> list[Path]:
    """Two seeds of FedAvg and one of FedProx."""
    made = {"a3": ("seed=3",), "a4": ("seed=4",), "prox": ("strategy.name=fedprox",)}
    return [simulated(tiny, name, *overrides, "rounds=2")[0] for name, overrides in made.items()]


def test_runs_are_told_as_tables_and_a_page(
    fedtrain: Callable, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    result = fedtrain("compare", *runs)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "3 runs in 2 groups, by accuracy on the central test set."
    (fedavg,) = (line for line in lines if line.startswith("  strategy=fedavg    3, 4"))
    assert fedavg.count("±") == 3
    assert "  strategy.mu    -                0.01" in lines
    assert lines[-1] == "Page: compare.html"
    assert "strategy=fedprox" in (tmp_path / "compare.html").read_text()


def test_json_is_one_object(fedtrain: Callable, runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    result = fedtrain("compare", *runs, "--json", "--out", page)
    found = json.loads(result.out)
    assert [group["label"] for group in found["groups"]] == ["strategy=fedavg", "strategy=fedprox"]
    assert [run["seed"] for run in found["groups"][0]["runs"]] == [3, 4]
    finals = [RunFolder(run).read_rounds()[-1].central["accuracy"] for run in runs[:2]]
    assert found["groups"][0]["final"]["mean"] == pytest.approx(sum(finals) / 2)
    assert found["groups"][0]["final"]["low"] == min(finals)
    assert found["differences"][0] == {"path": "strategy.name", "values": ['"fedavg"', '"fedprox"']}
    assert found["page"] == str(page)


def test_a_single_run_and_one_named_twice_are_one(fedtrain: Callable, runs: list[Path], tmp_path: Path) -> None:
    result = fedtrain("compare", runs[0], runs[0] / ".." / runs[0].name, "--out", tmp_path / "p.html")
    assert result.code == 0
    assert result.out.startswith("1 run in 1 group, by accuracy on the central test set.\n")


def test_infinite_numbers_are_json(fedtrain: Callable, runs: list[Path], tmp_path: Path) -> None:
    folder = RunFolder(runs[0])
    folder.append(RoundRecord(round_number=2, central={"accuracy": float("inf")}))
    found = json.loads(
        fedtrain("compare", runs[0], "--json", "--out", tmp_path / "p.html").out, parse_constant=pytest.fail
    )
    assert found["groups"][0]["final"]["mean"] == "nan"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "this is not a run's folder: got nowhere"),
        (["--metric", "f1"], "the metric f1 was not measured in"),
        (["--by", "strategy.nam"], "the runs have no such field: got strategy.nam. Did you mean strategy.name?"),
        (["--out", "no/such/p.html"], "cannot write no/such/p.html"),
    ],
)
def test_faults_are_one_message(
    fedtrain: Callable,
    runs: list[Path],
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fedtrain("compare", *runs, *arguments)
    assert result.code == 2
    assert result.err.startswith(f"fedtrain: {message}")
    assert not (tmp_path / "compare.html").exists()
