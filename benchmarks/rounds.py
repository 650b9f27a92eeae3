"""Time a round of two clients that send back what they get, over fedtrain's link and Flower's, by size of the model.

fedtrain: one server and two client processes with mutual TLS, and the server's memory. Flower: flower-superlink and two
flower-supernode processes in plain text, as `fedtrain server --runtime flower` starts them. Both sum what comes back.

Run: python benchmarks/rounds.py [--rounds 5] [--skip-flower]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import tomli_w
from flower_echo import CLIENTS
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from measure import stolen_seconds

from fedtrain.fleet.control import Control
from fedtrain.fleet.processes import LocalFleet

GOALS = {0.4: 0.02, 40.0: 0.6, 200.0: 3.0}  # MB of a model -> seconds of a round
MOST_MODELS = 3.0  # that the server may hold above what it holds when idle
FLOWER_ROUNDS = 2  # a round takes it ten seconds and more, whatever the size
_BYTES = 4  # of a float32
_MARGIN = 1 << 20  # of headers
_NAMES = [f"site-{number}" for number in range(CLIENTS)]


class _Everybody:
    """Lets all clients in."""

    def ready(self, _name: str, _facts: dict[str, Any]) -> None:
        return None

    def left(self, _name: str) -> None:
        return None


def serve(folder: Path, rounds: int) -> None:
    """Be the server: wait for the clients, time the rounds, print them and the memory in models."""
    import torch
    from flwr.app import ArrayRecord, RecordDict

    from fedtrain import flower
    from fedtrain.deployment.remote import Remote, Waits
    from fedtrain.link.authority import Authority
    from fedtrain.link.control import Offer
    from fedtrain.link.enrolment import server_credentials
    from fedtrain.link.hub import Door, Hub
    from fedtrain.link.identity import adopt, pending_request
    from fedtrain.link.register import Revocations
    from fedtrain.simulations.grid import SimulationGrid

    authority = Authority.init(folder / "ca")
    for name in _NAMES:
        (folder / name).mkdir(mode=0o700)
        signed = authority.issue(pending_request(folder / name, name), name)
        adopt(folder / name, signed, authority.certificate)
    door = Door(server_credentials(authority, mutual=True), Revocations(authority.register).objection)
    offer = Offer(run="0" * 32, experiment_hash="0", facts={})
    with Hub("127.0.0.1:0", offer, _Everybody(), folder, door) as hub:
        print(json.dumps({"address": hub.address}), flush=True)
        while sum(member.connected for member in hub.members()) < CLIENTS:
            time.sleep(0.05)
        idle = _memory("VmRSS")
        for size in GOALS:
            count = int(size * 1e6 / _BYTES)
            grid = SimulationGrid(Remote(hub, _NAMES, count * _BYTES + _MARGIN, Waits()), CLIENTS)
            taken = []
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
            model = torch.ones(count)
            for number in range(rounds + 1):
                started = time.perf_counter()
                content = RecordDict({"model": flower.array_record({"w": model})})
                messages = [grid.create_message(content, "train", n, str(number)) for n in grid.get_node_ids()]
                total = torch.zeros(count)
                for reply in grid.send_and_receive(messages):
                    total += flower.tensors(cast("ArrayRecord", reply.content["model"]))["w"]
                    del reply
                taken.append(time.perf_counter() - started)
                assert total[0] == total[-1] == CLIENTS, "every client has answered"
                del total
            held = (_memory("VmHWM") - idle) / (count * _BYTES)
            print(json.dumps({"size": size, "seconds": taken[1:], "models": held}), flush=True)
            del model, messages, content


def echo(address: str, identity: Path) -> None:
    """Be a client until the server says farewell."""
    from fedtrain.link.channel import connect
    from fedtrain.link.control import Hello
    from fedtrain.link.frames import pack
    from fedtrain.link.identity import Identity

    own = Identity.load(identity)
    with connect(address, own.channel_credentials(), Hello(version="0", name=own.name, instance="0")) as link:
        link.ready({})
        for task in link.tasks():
            task.submit(pack(task.fetch(task.nbytes)))


def of_fedtrain(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one measurement per size."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, __file__, *arguments]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env=settings, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        server = start("--serve", scratch, "--rounds", str(rounds))
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        for name in _NAMES:
            start("--echo", address, str(Path(scratch, name)))
        for line in server.stdout:
            yield json.loads(line)


def of_flower(sizes: list[float]) -> list[float]:
    """Seconds of a round for each size, by medians."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "seconds.json")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        counts = json.dumps([int(size * 1e6 / _BYTES) for size in sizes])
        nodes = [{"partition-id": number} for number in range(CLIENTS)]
        with (
            LocalFleet(Path(scratch, "fleet"), nodes) as fleet,
            Control(fleet.address, None, plain=True) as control,
        ):
            fleet.wait_until(control.is_up)
            run = _submit(fleet.address, {"counts": counts, "rounds": FLOWER_ROUNDS, "out": str(out)})
            log = "".join(control.log(run))
            while not (outcome := control.outcome(run)).status:
                time.sleep(0.5)
        if outcome.status != "completed":
            sys.exit(f"flower's run {outcome.status}: {outcome.details}\n{log[-2000:]}")
        return [statistics.median(taken) for taken in json.loads(out.read_text())]


def _submit(address: str, config: dict[str, Any]) -> int:
    """Have a SuperLink run flower_echo.py; return the run's id."""
    apps = {"serverapp": "flower_echo:server_app", "clientapp": "flower_echo:client_app"}
    project = {"name": "echo", "version": "1.0.0", "license": "Apache-2.0"}
    flower = {"app": {"publisher": "fedtrain", "components": apps, "config": config}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # flwr's own
        content, _ = build_fab_from_files(
            {"pyproject.toml": tomli_w.dumps({"project": project, "tool": {"flwr": flower}}).encode()}
        )
    interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    client = ControlHttpClient.from_server_address(address, True, None, interceptors)
    try:
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        return int(client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id)
    finally:
        client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-flower", action="store_true")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--echo", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.rounds)
    if options.echo:
        return echo(options.echo[0], Path(options.echo[1]))
    started, stolen = time.perf_counter(), stolen_seconds()
    ours = list(of_fedtrain(options.rounds))
    theirs = [None] * len(ours) if options.skip_flower else of_flower([one["size"] for one in ours])
    share = (stolen_seconds() - stolen) / (time.perf_counter() - started)
    print(f"Load at the end: {os.getloadavg()[0]:.1f}. Taken by other guests of the host: {share:.2f} cores.")
    missed = False
    for one, flower in zip(ours, theirs, strict=True):
        seconds, goal = statistics.median(one["seconds"]), GOALS[one["size"]]
        line = f"{one['size']:5g} MB: fedtrain {seconds:.3f} s ({min(one['seconds']):.3f} at best; goal {goal:g})"
        # A model of 0.4 MB is less than what any process's memory varies by.
        heavy = one["size"] >= 40
        line += f", server {one['models']:.1f} models above idle (goal {MOST_MODELS:g})" if heavy else ""
        line += f", flower {flower:.1f} s, {flower / seconds:.0f} times as long" if flower else ""
        missed |= seconds > goal or (heavy and one["models"] > MOST_MODELS)
        print(line)
    sys.exit(1 if missed else 0)


def _memory(field: str) -> int:
    """Bytes that this process has in memory now (VmRSS), or had at most (VmHWM); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    main()
