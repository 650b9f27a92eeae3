"""Clients that bring their own rows to a server that has none: the same bytes as a simulation of the pooled table."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedtrain.deployment.roster import RemoteData, Roster, checked_kind
from fedtrain.errors import DataError, RunFolderError
from fedtrain.experiment.sections import Experiment

EXPERIMENT = """
rounds = 3
task.name = "logistic"
[data]
path = "all.csv"
target = "outcome"
classes = ["no", "yes", "unknown"]
client_column = "hospital"
partition = { kind = "natural" }
scaling = "client"
test = 0.2
"""
KIND = {
    "input_shape": [3],
    "target": "class",
    "num_classes": 2,
    "feature_names": ["a", "b", "c"],
    "class_names": ["no", "yes"],
    "dtype": "float32",
}


def fedtrain(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fedtrain", *map(str, arguments)]


def test_the_same_bytes_as_the_pooled_table(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(3)
    lines = [
        f"{'north' if n % 3 else 'south'},{rng.normal():.4f},{rng.normal():.4f},{('no', 'yes')[n % 2]}\n"
        for n in range(90)
    ]
    # South has only one of the classes, and nobody has an unknown outcome.
    lines = [line for line in lines if not line.startswith("south") or line.endswith("no\n")]
    head = "hospital,age,dose,outcome\n"
    (tmp_path / "all.csv").write_text(head + "".join(lines))
    (tmp_path / "e.toml").write_text(EXPERIMENT)
    for name in ("north", "south"):
        (tmp_path / f"{name}.csv").write_text(head + "".join(line for line in lines if line.startswith(name)))

    def start(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(fedtrain(*arguments), cwd=tmp_path, text=True, stderr=subprocess.PIPE)

    server = start("server", "e.toml", "--out", "run", "--listen", "127.0.0.1:0", "--own-data", "--min-clients", 2)
    subprocess.run(fedtrain("simulate", "e.toml", "--out", "simulation", "--quiet"), cwd=tmp_path, check=True)
    assert server.stderr is not None
    address = next(line for line in server.stderr if "clients take part at" in line).split()[5].rstrip(",")
    clients = [
        start("client", "--server", address, "--insecure", name, "--data", f"{name}.csv", "--once")
        for name in ("south", "north")
    ]
    assert [process.wait(120) for process in (server, *clients)] == [0, 0, 0]
    for process in (server, *clients):
        assert process.stderr is not None
        process.stderr.close()
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "simulation/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "run/roster.json").read_text())["sizes"] == {"north": 48, "south": 12}


def test_what_a_client_tells_of_its_data_is_checked() -> None:
    assert checked_kind(KIND) == KIND
    for wrong in (None, {}, {**KIND, "dtype": "bool"}, {**KIND, "input_shape": [-1]}, {**KIND, "more": 1}):
        with pytest.raises(DataError, match="does not describe"):
            checked_kind(wrong)


def test_pooled_scaling_needs_rows_in_one_place() -> None:
    data = {"name": "breast-cancer", "clients": 2, "scaling": "pooled"}
    with pytest.raises(DataError, match="no pooled scaling"):
        RemoteData(Experiment.model_validate({"data": data}), Roster(kind=KIND, sizes={"a": 3}))


def test_a_roster_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    fresh = Roster.read(path)
    assert fresh.run != Roster.read(path).run
    fresh.write(path)
    assert Roster.read(path) == fresh
    path.write_text("{}x")
    with pytest.raises(RunFolderError, match="damaged"):
        Roster.read(path)
