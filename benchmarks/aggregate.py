"""Aggregate updates of 40 MB each by fedtrain's FedAvg and by flwr's, and compare seconds and peak memory.

fedtrain's share is the strategy's `apply`; flwr's is `FedAvg.aggregate_train` on messages with its own Arrays. The pass
over each update that fedtrain's gate makes (its norm, which also finds NaN and infinite values) is shown apart: flwr
has none. Both take their updates from a generator that makes one at a time; the seconds that it takes to make and to
free them are left out on both sides. Each contender runs in turn as a process of its own with one thread, several times
over, and the least figures are compared: a busy machine only ever adds to them. Seconds are of processor time, as
nothing waits for anything. Memory is the peak less what was there before: everything imported, the global model made
and a tiny one aggregated. The updates that are held count.

Run: python benchmarks/aggregate.py [--updates 100] [--repeat 3]
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedtrain import flower
from fedtrain.params import Params, l2_norm
from fedtrain.strategies.fedavg import fedavg
from fedtrain.wire import Update

_Made = TypeVar("_Made")
OURS, GATED, FLWR = "fedtrain", "fedtrain with its gate", "flwr"
TENSORS, SHAPE = 10, (1000, 1000)
MODEL_BYTES = TENSORS * SHAPE[0] * SHAPE[1] * 4
MOST_TIME, MOST_MODELS = 1 / 3, 3.0


class Figures(NamedTuple):
    """Of one contender."""

    seconds: float
    peak: int  # bytes beyond the start


class Source:
    """Make updates one at a time, free those that nobody holds, and count the seconds that both take."""

    def __init__(self, count: int) -> None:
        self.count, self.seconds = count, 0.0

    def __call__(self, make: Callable[[int], _Made]) -> Iterator[_Made]:
        for number in range(self.count):
            started = time.process_time()
            made = [make(number)]
            self.seconds += time.process_time() - started
            yield made[0]
            started = time.process_time()
            made.clear()  # before the next is made; a receiver that has let go of it has it freed here
            self.seconds += time.process_time() - started


def aggregate_ours(model: Params, source: Source, *, gated: bool) -> None:
    def make(number: int) -> Update:
        return Update("client", 1, {name: t * (1 + number / 100) for name, t in model.items()}, 10 + number)

    def gate(update: Update) -> Update:
        assert l2_norm(update.delta) < float("inf")
        return update

    algorithm = fedavg().algorithm
    updates = source(make)
    algorithm.apply(algorithm.init(model), model, map(gate, updates) if gated else updates)


def aggregate_flwr(model: Params, source: Source) -> None:
    flower.enter_run(1)

    def make(number: int) -> Message:
        arrays = ArrayRecord({name: Array(t.numpy() * np.float32(1 + number / 100)) for name, t in model.items()})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10 + number})})
        return Message(content, reply_to=Message(RecordDict({}), 1, "train", group_id="1"))

    FedAvg().aggregate_train(1, source(make))


def peak_bytes() -> int:
    """The most memory that this process has held; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def contend(contender: str, updates: int) -> None:
    """Be one contender: aggregate, and print the figures."""
    torch.set_num_threads(1)
    logging.disable()  # flwr's
    rng = torch.Generator().manual_seed(1)
    model = {f"layer{number}": torch.randn(SHAPE, generator=rng) for number in range(TENSORS)}
    aggregate = aggregate_flwr if contender == FLWR else functools.partial(aggregate_ours, gated=contender == GATED)
    aggregate({"tiny": torch.ones(1)}, Source(2))
    source = Source(updates)
    at_start, started = peak_bytes(), time.process_time()
    aggregate(model, source)
    seconds = time.process_time() - started - source.seconds
    print(json.dumps({"seconds": seconds, "peak": peak_bytes() - at_start}))


def measured(contender: str, updates: int) -> Figures:
    command = [sys.executable, __file__, "--updates", str(updates), "--only", contender]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Figures(**json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare fedtrain's FedAvg with flwr's.")
    parser.add_argument("--updates", type=int, default=100, help="of 40 MB each; flwr holds all of them")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each")
    parser.add_argument("--only", choices=[OURS, GATED, FLWR], help="run one contender, in this process")
    args = parser.parse_args()
    if args.only:
        contend(args.only, args.updates)
        return
    figures: dict[str, list[Figures]] = {OURS: [], GATED: [], FLWR: []}
    for _ in range(args.repeat):
        for contender, found in figures.items():
            found.append(measured(contender, args.updates))
    seconds = {contender: min(f.seconds for f in found) for contender, found in figures.items()}
    peaks = {contender: min(f.peak for f in found) for contender, found in figures.items()}
    print(f"{args.updates} updates of {MODEL_BYTES / 1e6:.0f} MB{'seconds':>10}{'ms/update':>12}{'peak MB':>9}")
    for contender in figures:
        each = 1e3 * seconds[contender] / args.updates
        print(f"{contender:<23}{seconds[contender]:>10.2f}{each:>12.1f}{peaks[contender] / 1e6:>9.0f}")
    for what, figure, most in (
        ("fedtrain / flwr, seconds", seconds[OURS] / seconds[FLWR], MOST_TIME),
        ("fedtrain's peak in models", peaks[OURS] / MODEL_BYTES, MOST_MODELS),
    ):
        print(f"  {what}: {figure:.2f} (at most {most:.2f}): {'ok' if figure <= most else 'MISSED'}")


if __name__ == "__main__":
    main()
