"""Runs that are really killed, and really started again, end in the bytes of one that was not."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

KILL_AT = Path(__file__).with_name("kill_at.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LONG = ("rounds=200", "run.checkpoint_seconds=1000")
linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in Linux's /proc")


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def flags(overrides: tuple[str, ...]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def start(file: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedtrain", "simulate", str(file), "--out", str(out), *flags(overrides)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def kill_at(point: str, file: Path, out: Path) -> None:
    command = [sys.executable, str(KILL_AT), point, "simulate", str(file), "--out", str(out)]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "model.safetensors").exists()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}: {process.stderr.read() if process.stderr else ''}")


def workers_of(pid: int) -> list[int]:
    """Worker processes are the children of the fork server, which is a child of the main process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    return [worker for child in children.get(pid, []) for worker in children.get(child, [])]


def alive(pid: int) -> bool:
    """Running, not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_compression_has_lost_is_taken_up_again(tiny: Path, tmp_path: Path, simulated: Callable) -> None:
    with tiny.open("a") as file:
        file.write('[compression]\nup = ["powersgd:2", "int4"]\ndown = ["int8"]\ndown_of = "change"\n')
        file.write("[evaluation]\nclients_every = 1\n")  # which encodes the model too
    kill_at("mid-round", tiny, tmp_path / "killed")
    resumed, _ = simulated(tiny, "killed")
    whole, _ = simulated(tiny, "whole")
    assert digest(resumed) == digest(whole)
    one, _ = simulated(tiny, "without", "compression.error_feedback=false")
    assert digest(one) != digest(whole)


@pytest.mark.parametrize("point", ["before-round-1", "mid-round", "checkpoint", "after-last-round"])
def test_killed_and_resumed_is_byte_equal(point: str, tiny: Path, tmp_path: Path, simulated: Callable) -> None:
    kill_at(point, tiny, tmp_path / "killed")
    resumed, notices = simulated(tiny, "killed")
    whole, _ = simulated(tiny, "whole")
    assert digest(resumed) == digest(whole)
    lines = (resumed / "rounds.jsonl").read_text().splitlines()
    assert [line.split('"round_number":')[1].split(",")[0] for line in lines] == ["0", "1", "2", "3", "4"]
    resumed_after = {"mid-round": 2, "checkpoint": 2, "after-last-round": 4}.get(point)
    assert notices == ([f"resuming after round {resumed_after} of 4 rounds"] if resumed_after else [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_says_how_to_resume_and_resumes(
    number: signal.Signals, tiny: Path, tmp_path: Path, simulated: Callable
) -> None:
    process = start(tiny, tmp_path / "out", *LONG)
    wait_for(process, "round   3/200")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "are kept. Run the same command again to resume" in err
    assert (tmp_path / "out" / "report.html").exists()
    resumed, notices = simulated(tiny, "out", *LONG)
    assert "resuming after round" in notices[0]
    assert digest(resumed) == digest(simulated(tiny, "whole", *LONG)[0])


def test_ctrl_c_while_it_is_loading_is_an_interruption_too(tiny: Path, tmp_path: Path) -> None:
    process = start(tiny, tmp_path / "out", "run.workers=2")
    wait_for(process, "run ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.startswith("fedtrain: interrupted")


@linux
def test_a_killed_worker_ends_the_run_with_one_error_and_it_resumes(
    tiny: Path, tmp_path: Path, simulated: Callable
) -> None:
    process = start(tiny, tmp_path / "out", *LONG, "run.workers=2")
    wait_for(process, "round   2/200")
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process died: got exit code -9" in err
    assert "Traceback" not in err
    resumed, _ = simulated(tiny, "out", *LONG)
    assert digest(resumed) == digest(simulated(tiny, "whole", *LONG)[0])


@linux
def test_workers_do_not_outlive_a_killed_main_process(tiny: Path, tmp_path: Path) -> None:
    # Long jobs: a worker that only noticed a closed pipe would train on for minutes.
    process = start(tiny, tmp_path / "out", "training.local_steps=10000000", "run.workers=2")
    wait_for(process, "round 0/4")
    time.sleep(2)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(filter(alive, workers))


def test_the_bytes_do_not_depend_on_workers(tiny: Path, simulated: Callable) -> None:
    with_workers, _ = simulated(tiny, "two", "run.workers=2")
    assert digest(with_workers) == digest(simulated(tiny, "none")[0])


def test_a_corrupt_newest_checkpoint_falls_back(tiny: Path, tmp_path: Path, simulated: Callable) -> None:
    kill_at("after-last-round", tiny, tmp_path / "killed")
    newest = max((tmp_path / "killed" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed, notices = simulated(tiny, "killed")
    assert "round-0000004.safetensors is damaged" in notices[0]
    assert notices[1] == "resuming after round 3 of 4 rounds"
    assert digest(resumed) == digest(simulated(tiny, "whole")[0])


def test_a_full_disk_is_one_error_and_the_run_resumes(tiny: Path, tmp_path: Path, simulated: Callable) -> None:
    code = (
        "import resource\n"
        "from fedtrain.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))\n"  # the checkpoint does not fit, the rest does
        "main()"
    )
    wide = "task.options.hidden=[64]"
    command = [sys.executable, "-c", code, "simulate", str(tiny), "--out", str(tmp_path / "full"), "--set", wide]
    full = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert "checkpoints/round-0000001.safetensors (File too large)" in full.stderr
    assert "run the same command again: it resumes" in full.stderr
    assert not list((tmp_path / "full" / "checkpoints").iterdir())
    resumed, _ = simulated(tiny, "full", wide)
    assert digest(resumed) == digest(simulated(tiny, "whole", wide)[0])
