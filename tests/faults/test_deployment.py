"""A server and three clients as processes, with certificates: what they train is what a simulation trains."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_the_commands_as_a_user_gives_them_end_in_the_bytes_of_a_simulation(deployment: Any, tmp_path: Path) -> None:
    fedtrain = [sys.executable, "-m", "fedtrain"]
    file = tmp_path / "experiment.toml"
    file.write_text(deployment.experiment)
    out, ca = tmp_path / "run", deployment.authority.folder
    server = [*fedtrain, "server", file, "--out", out, "--listen", deployment.address, "--ca", ca]
    processes = [subprocess.Popen(server, cwd=tmp_path, env=ENVIRONMENT)]
    for name in ("client-0", "client-1", "client-2"):
        client = [*fedtrain, "client", "--server", deployment.address, "--identity", deployment.identity(name)]
        client += ["--data", tmp_path, "--home", tmp_path / name, "--once"]
        processes.append(subprocess.Popen(client, cwd=tmp_path, env=ENVIRONMENT))
    try:
        assert [process.wait(120) for process in processes] == [0, 0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    whole = deployment.reference(deployment.experiment, ())
    assert deployment.digest() == whole
