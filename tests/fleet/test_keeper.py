import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the keeper needs Linux to find what has left its group"
)

# Starts a process in a session of its own, which ignores SIGTERM, and tells both ids; then waits.
FAMILY = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
Path(sys.argv[1]).with_suffix(".tmp").write_text(f"{os.getpid()} {child.pid}")
Path(sys.argv[1]).with_suffix(".tmp").rename(sys.argv[1])
time.sleep(600)
"""


def keeper(parent: int, *command: str) -> list[str]:
    return [sys.executable, "-m", "fedtrain.fleet.keeper", str(parent), *command]


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def family_of(ids: Path) -> list[int]:
    wait_for(ids.exists)
    return [int(text) for text in ids.read_text().split()]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_told_to_stop_it_leaves_nobody_behind(tmp_path: Path) -> None:
    kept = subprocess.Popen(keeper(os.getpid(), sys.executable, "-c", FAMILY, str(tmp_path / "ids")))
    family = family_of(tmp_path / "ids")
    assert all(map(is_alive, family))
    kept.terminate()
    assert kept.wait() == 1
    assert not any(map(is_alive, family))


def test_when_its_parent_is_killed_it_leaves_nobody_behind(tmp_path: Path) -> None:
    start = (
        "import os, subprocess, sys, time; subprocess.Popen([*sys.argv[1:4], str(os.getpid()), *sys.argv[4:]]).wait()"
    )
    python = [sys.executable, "-m", "fedtrain.fleet.keeper"]
    parent = subprocess.Popen(
        [sys.executable, "-c", start, *python, sys.executable, "-c", FAMILY, str(tmp_path / "ids")]
    )
    family = family_of(tmp_path / "ids")
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(is_alive, family)))


def test_it_ends_with_its_command_and_ends_what_that_leaves_behind(tmp_path: Path) -> None:
    leaving = FAMILY.replace("time.sleep(600)\n", "sys.exit(3)\n")
    ended = subprocess.run(keeper(os.getpid(), sys.executable, "-c", leaving, str(tmp_path / "ids")))
    assert ended.returncode == 3
    assert not any(map(is_alive, family_of(tmp_path / "ids")))


def test_without_its_parent_it_starts_nothing(tmp_path: Path) -> None:
    command = keeper(1 if os.getppid() != 1 else 2, sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert subprocess.run(command).returncode == 1
    assert not (tmp_path / "ran").exists()
