import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Commands that run in this process must not put off its garbage collector: what a test leaves open is to show there.
USUAL = gc.get_threshold()
import fedtrain.collecting  # noqa: E402

gc.set_threshold(*USUAL)

# A shell's background job starts with Ctrl-C ignored, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Machines are shared: how long an example takes tells nothing.
settings.register_profile("fedtrain", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedtrain")


# torch's compiler would leave processes and an open file of their log behind, which later tests would be blamed for.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture
def data_root() -> Path:
    """The real data of the environment, or a skip."""
    value = os.environ.get("FEDTRAIN_DATA")
    if not value:
        pytest.skip("FEDTRAIN_DATA is not set")
    root = Path(value)
    assert root.is_dir(), f"FEDTRAIN_DATA names no folder: {root}"
    return root


TINY = """
seed = 3
rounds = 4
[task]
name = "mlp"
options = { hidden = [8] }
[data]
name = "digits"
clients = 6
partition = { kind = "dirichlet", alpha = 0.5 }
central_test = 0.2
test = 0.2
[clients]
per_round = 3
[training]
batch_size = 16
[run]
workers = 0
device = "cpu"
checkpoint_seconds = 0
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small experiment file on the offline data, in a folder of its own."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def fedtrain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command line, in this process."""
    from fedtrain.cli import main

    monkeypatch.setattr(gc, "freeze", lambda: None)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fedtrain", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return Result(int(exit_.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def simulated(tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    """Simulate in this process without a report: (file, name of the folder, overrides) -> folder, notices."""
    from fedtrain.cli.progress import RunObserver
    from fedtrain.experiment import load
    from fedtrain.simulations.run import Places, simulate

    class Notices(RunObserver):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def notice(self, text: str) -> None:
            self.texts.append(text)

    def run(file: Path, name: str, *overrides: str) -> tuple[Path, list[str]]:
        notices = Notices()
        places = Places(base=file.parent, out=tmp_path / name, data_root=None)
        return simulate(load(file, overrides), places, notices).path, notices.texts

    return run
