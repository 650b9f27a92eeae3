"""Let 200 light clients take part in 200 rounds while processes of them are killed every few seconds.

Each process holds many sessions, and is started again as soon as it was killed (SIGKILL). Every client adds one to each
number that it gets, and says who it is and for which round. What must hold: each client's update is there once in every
round, no client hears twice that an update of one round was accepted, all are there at the end, and the server's memory
stays as it was after the first quarter.

Run: python benchmarks/soak.py [--clients 200] [--rounds 200] [--processes 20] [--kill-every 3]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedtrain import flower
from fedtrain.deployment.remote import Remote, Waits
from fedtrain.errors import FedtrainError
from fedtrain.link.channel import Task, connect
from fedtrain.link.control import Hello, Offer
from fedtrain.link.frames import pack
from fedtrain.link.hub import Door, Hub
from fedtrain.simulations.grid import SimulationGrid

NUMBERS = 10_000  # 40 kB
MOST_GROWTH = 0.1  # of the server's memory after a quarter of the rounds
PATIENCE = 60.0  # seconds; a client that is missing from a round was lost


class Doorman:
    """Lets all in, and counts who is there."""

    def __init__(self) -> None:
        self.here: Counter[str] = Counter()
        self.visits = 0

    def ready(self, name: str, _facts: dict[str, Any]) -> None:
        self.here[name] += 1
        self.visits += 1

    def left(self, name: str) -> None:
        self.here[name] -= 1


def stay(address: str, names: Sequence[str], accepted: Path) -> None:
    """Be some clients until killed, or until the server says farewell to them."""
    flower.enter_run(1)
    instance = secrets.token_hex(8)
    threads = [threading.Thread(target=_client, args=(address, name, instance, accepted)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _client(address: str, name: str, instance: str, accepted: Path) -> None:
    over = False
    while not over:
        with (
            contextlib.suppress(FedtrainError),
            connect(address, None, Hello(version="0", name=name, instance=instance)) as link,
        ):
            link.ready({})
            for task in link.tasks():
                _answer(task, name, accepted)
            over = True
        time.sleep(random.uniform(0.1, 0.5))


def _answer(task: Task, name: str, accepted: Path) -> None:
    content = cast("RecordDict", task.fetch(task.nbytes))
    numbers = flower.tensors(cast("ArrayRecord", content["model"]))["w"] + 1
    told = ConfigRecord({"name": name, "round": task.group})
    ack = task.submit(pack(RecordDict({"model": flower.array_record({"w": numbers}), "told": told})))
    if ack.verdict == "accepted":
        with accepted.open("a") as log:  # one line, written at once
            log.write(f"{name} {task.group}\n")


class Crowd:
    """Processes of clients, of which one is killed now and then."""

    def __init__(self, address: str, names: Sequence[str], processes: int, log: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["fedtrain.link.channel"])  # so starts are quick
        self._arguments = [(address, names[number::processes], log) for number in range(processes)]
        self._running = [self._start(arguments) for arguments in self._arguments]
        self.kills = 0

    def _start(self, arguments: tuple[str, Sequence[str], Path]) -> Any:
        process = self._context.Process(target=stay, args=arguments, daemon=True)
        process.start()
        return process

    @contextlib.contextmanager
    def suffering(self, seconds: float) -> Iterator[None]:
        """Kill while the block runs, after `seconds` on average; what was killed is started again."""
        ended = threading.Event()

        def kill() -> None:
            while not ended.wait(random.uniform(0.5, 1.5) * seconds):
                number = random.randrange(len(self._running))
                os.kill(self._running[number].pid, signal.SIGKILL)
                self._running[number].join()
                self._running[number] = self._start(self._arguments[number])
                self.kills += 1

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def end(self) -> None:
        """Wait for all processes; kill those that stay."""
        for process in self._running:
            process.join(20)
            process.kill()


def one_round(grid: SimulationGrid, names: Sequence[str], number: int) -> list[str]:
    """Ask every client once, and say what is wrong with the answers."""
    content = RecordDict({"model": flower.array_record({"w": torch.full((NUMBERS,), float(number))})})
    messages = [grid.create_message(content, "train", node, str(number)) for node in grid.get_node_ids()]
    got: Counter[str] = Counter()
    faults = []
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            faults.append(f"round {number}: {reply.error.reason}")
            continue
        told = cast("ConfigRecord", reply.content["told"])
        name = names[reply.metadata.src_node_id - 1]
        numbers = flower.tensors(cast("ArrayRecord", reply.content["model"]))["w"]
        got[name] += 1
        if dict(told) != {"name": name, "round": str(number)} or not bool((numbers == number + 1).all()):
            faults.append(f"round {number}: {name} got the answer {dict(told)}, {numbers[0]:g}")
    faults += [f"round {number}: {got[name]} updates of {name}" for name in names if got[name] != 1]
    return faults


def soak(options: argparse.Namespace, folder: Path) -> list[str]:
    """Run it all; return what was wrong."""
    names = [f"site-{number}" for number in range(options.clients)]
    doorman, log = Doorman(), folder / "accepted"
    log.touch()
    offer, door = Offer(run="0" * 32, experiment_hash="0", facts={}), Door(max_clients=options.clients)
    faults: list[str] = []
    memory: list[float] = []
    with Hub("127.0.0.1:0", offer, doorman, folder, door) as hub:
        crowd = Crowd(hub.address, names, options.processes, log)
        grid = SimulationGrid(Remote(hub, names, NUMBERS * 4 + (1 << 20), Waits(PATIENCE)), len(names))
        started = time.perf_counter()
        with crowd.suffering(options.kill_every):
            for number in range(1, options.rounds + 1):
                faults += one_round(grid, names, number)
                gc.collect()  # so that what is measured is held, and not only not collected yet
                memory.append(_resident())
                if number % max(1, options.rounds // 10) == 0:
                    held = f"{memory[-1]:.0f} MB, {threading.active_count()} threads"
                    print(f"round {number}: {crowd.kills} kills, server {held}", flush=True)
        seconds = time.perf_counter() - started
        faults += one_round(grid, names, options.rounds + 1)  # nobody is killed in it: all are back at its end
        connected = {member.name for member in hub.members() if member.connected}
        faults += [f"{name} came back and was not counted" for name in names if name not in connected]
        faults += [f"{name} is counted {doorman.here[name]} times" for name in names if doorman.here[name] != 1]
    crowd.end()
    twice = [f"accepted twice: {key}" for key, count in Counter(log.read_text().splitlines()).items() if count > 1]
    before, after = memory[len(memory) // 4], memory[-1]
    if after > before * (1 + MOST_GROWTH):
        faults.append(f"the server grew from {before:.0f} to {after:.0f} MB")
    each = options.processes
    print(
        f"{options.clients} clients in {each} processes, {options.rounds} rounds in {seconds:.0f} s "
        f"({seconds / options.rounds:.2f} s each), {crowd.kills} kills of {options.clients // each} clients, "
        f"{doorman.visits} arrivals; server {before:.0f} MB after a quarter, {after:.0f} MB at the end"
    )
    return faults + twice


def _resident() -> float:
    """MB that this process has in memory; Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--kill-every", type=float, default=3.0, metavar="SECONDS")
    with tempfile.TemporaryDirectory() as folder:
        faults = soak(parser.parse_args(), Path(folder))
    for fault in faults[:20]:
        print(f"FAULT: {fault}")
    print(f"{len(faults)} faults" if faults else "No update was lost or doubled; every client was counted.")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
