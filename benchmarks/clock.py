"""The clock's prediction beside a real server whose clients sit behind slow lines.

Four client processes on this machine dial through proxies of 150 to 1200 kB/s each way. `fedtrain plan` is given the
same speeds as a CSV file, and times one local step here. Printed: seconds of a round as predicted and as measured.

Run: python benchmarks/clock.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

MOST_OFF = 0.20
RATES = (1_200_000, 600_000, 300_000, 150_000)  # bytes per second
FEDTRAIN = (sys.executable, "-m", "fedtrain")
EXPERIMENT = """
rounds = {rounds}
task = {{ name = "mlp", options = {{ hidden = [1024] }} }}
data = {{ name = "digits", clients = {count} }}
training = {{ local_steps = 300, batch_size = 16 }}
evaluation = {{ max_clients = 0, central_every = 0 }}
[clients]
{choice}
duration = {{ kind = "device-file", file = "devices.csv", latency = 0.0, step_seconds = "measured" }}
"""
CHOICES = {"everybody": "", "the first two of four": "per_round = 2\nover_selection = 2.0"}


class Line(threading.Thread):
    """Forwards TCP to a server at so many bytes per second in each direction."""

    def __init__(self, port: int, rate: int) -> None:
        super().__init__(daemon=True)
        self._port, self._rate = port, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        while True:
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self._port))
            except ConnectionRefusedError:  # not yet
                client.close()
                continue
            for one in (client, server):  # what waits in the system's buffers has passed nothing yet
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        free = time.monotonic()
        with contextlib.suppress(OSError):
            while data := source.recv(max(1024, self._rate // 100)):
                free = max(free, time.monotonic()) + len(data) / self._rate
                time.sleep(max(0.0, free - time.monotonic()))
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def predicted(file: Path) -> float:
    """Seconds of a round, as planned."""
    plan = subprocess.run([*FEDTRAIN, "plan", str(file), "--json"], check=True, capture_output=True, text=True)
    return float(json.loads(plan.stdout)["clock"]["round_seconds_p50"])


def measured(file: Path) -> float:
    """Seconds of a round of a real server, the first left out."""
    folder = file.parent
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = [*FEDTRAIN, "server", str(file), "--listen", f"127.0.0.1:{port}", "--out", str(folder / "run")]
    with _running([*server, "--min-clients", str(len(RATES))], folder) as process, contextlib.ExitStack() as clients:
        for number, rate in enumerate(RATES):
            line = Line(port, rate)
            line.start()
            dial = ["--server", line.address, "--insecure", f"client-{number}", "--home", str(folder / f"{number}")]
            clients.enter_context(_running([*FEDTRAIN, "client", *dial, "--data", str(folder), "--once"], folder))
        if process.wait():
            raise SystemExit("the server failed")
    records = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]
    return float(statistics.median(record["seconds_train"] for record in records[2:]))


@contextlib.contextmanager
def _running(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    reached = True
    for what, choice in CHOICES.items():
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "experiment.toml"
            file.write_text(EXPERIMENT.format(rounds=rounds, count=len(RATES), choice=choice))
            lines = [f"client-{number},100,{rate * 8 / 1024}" for number, rate in enumerate(RATES)]
            (file.parent / "devices.csv").write_text("\n".join(["client,computation,communication", *lines]))
            expected, found = predicted(file), measured(file)
        ok = abs(found / expected - 1) <= MOST_OFF
        reached = reached and ok
        print(f"{what}: a round takes {expected:.2f} s as predicted, {found:.2f} s as measured: ", end="")
        print(f"{found / expected - 1:+.0%} (at most {MOST_OFF:.0%} off): {'ok' if ok else 'MISSED'}", flush=True)
    sys.exit(not reached)


if __name__ == "__main__":
    main()
