"""What the machine does to a run: one clear error, or nothing at all; see tests/faults for kills and full disks."""

import datetime
import fcntl
import hashlib
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("root", "told"),
    [
        (None, "mnist needs a data root, which holds mnist/train-images-idx3-ubyte.gz"),
        ("empty", "mnist: there is no mnist/train-images-idx3-ubyte.gz in the data root"),
    ],
)
def test_a_missing_data_root_says_what_to_do(
    fedtrain: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str | None, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDTRAIN_DATA", raising=False)
    Path("empty").mkdir()
    Path("real.toml").write_text('[data]\nname = "mnist"\nclients = 5\n[run]\nworkers = 0')
    result = fedtrain("simulate", "real.toml", *(("--data-root", root) if root else ()))
    assert result.code == 2
    assert told in result.err
    assert "--data-root or FEDTRAIN_DATA, or download it: fedtrain data fetch mnist" in result.err
    assert not Path("runs").exists()


def test_no_such_gpu(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    result = fedtrain("simulate", tiny, "--out", tmp_path / "out", "--set", "run.device=cuda:77")
    assert result.code == 2
    assert "there is no such CUDA device on this machine: got run.device = cuda:77" in result.err
    assert "Use --set run.device=cpu" in result.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = fedtrain("simulate", tiny, "--out", tmp_path / "file" / "run")
    assert result.code == 2
    assert "the run's folder cannot be written (Not a directory)" in result.err
    assert "Choose another one with --out" in result.err


def test_two_processes_in_one_folder(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = fedtrain("simulate", tiny, "--out", out)
    assert second.code == 2
    assert "another process is running in this folder" in second.err
    assert not (out / "manifest.json").exists()
    assert fedtrain("simulate", tiny, "--out", out, "--quiet", "--set", "rounds=1").code == 0


def test_a_clock_that_jumps_back_changes_nothing(
    simulated: Callable, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(name: str) -> str:
        folder, notices = simulated(tiny, name)
        assert not notices
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    steady = digest("steady")
    calls = itertools.count()

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return super().now(tz) - datetime.timedelta(minutes=10) * (next(calls) % 2)

    monkeypatch.setattr(datetime, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: Jumping.now().timestamp())
    assert digest("jumping") == steady
    assert next(calls) > 4, "each round asks for the time"


def test_ctrl_c_before_the_first_round(
    fedtrain: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtrain.simulations.run.build", build)
    result = fedtrain("simulate", tiny, "--out", tmp_path / "out")
    assert result.code == 130
    assert result.err == "fedtrain: interrupted; what was finished is kept. Run the same command again to go on\n"
    assert not (tmp_path / "out").exists()


OWN_TASK = """
import torch
from fedtrain.tasks import Classification

class Model(torch.nn.Linear):
    def forward(self, x):
        outputs = super().forward(x)
        if self.training and len(x) > 4 and (x > 100).any():  # more rows than the task is tried on
            {fault}
        return outputs

class Own(Classification):
    def __init__(self, spec):
        self.spec = spec

    def model(self):
        return Model(2, 2)
"""


def own_run(folder: Path, fault: str, marked: int) -> Path:
    """An experiment on four clients, of which some hold inputs above 100, where the task's model has a fault."""
    rows = [
        f"{200 if client < marked else 0},{row},{'ab'[row % 2]},clinic-{client}"
        for client in range(4)
        for row in range(8)
    ]
    (folder / "rows.csv").write_text("\n".join(["x,y,label,clinic", *rows]))
    (folder / "own.py").write_text(OWN_TASK.format(fault=fault))
    file = folder / "own.toml"
    file.write_text(
        'rounds = 2\n[task]\nname = "own.py:Own"\n[run]\nworkers = 0\n'
        '[data]\npath = "rows.csv"\ntarget = "label"\nclient_column = "clinic"\npartition = { kind = "natural" }\n'
    )
    return file


def test_a_client_whose_loss_is_nan_is_quarantined(fedtrain: Callable, tmp_path: Path) -> None:
    file = own_run(tmp_path, "outputs = outputs * torch.nan", marked=1)
    result = fedtrain("simulate", file, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    for number in (1, 2):
        note = f"note: round {number}: update of clinic-0 not used: the loss is wrong: got nan"
        assert note in result.err
    assert "Quarantined 2 updates of 1 client: clinic-0." in result.out


def test_a_client_that_runs_out_of_gpu_memory_is_quarantined(fedtrain: Callable, tmp_path: Path) -> None:
    file = own_run(tmp_path, 'raise torch.OutOfMemoryError("CUDA out of memory")', marked=1)
    result = fedtrain("simulate", file, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "update of clinic-0 not used: failed at" in result.err
    assert "OutOfMemoryError: CUDA out of memory" in result.err


def test_a_task_that_fails_on_every_client_is_one_error(fedtrain: Callable, tmp_path: Path) -> None:
    file = own_run(tmp_path, 'raise RuntimeError("no such tumour")', marked=4)
    line = 1 + OWN_TASK.splitlines().index("            {fault}")
    result = fedtrain("simulate", file, "--out", tmp_path / "out")
    assert result.code == 1
    assert "round 1 has too few valid updates: got 0 of 4 clients" in result.err
    assert f"failed at {tmp_path / 'own.py'}, line {line}: RuntimeError: no such tumour" in result.err
    assert "Traceback" not in result.err
