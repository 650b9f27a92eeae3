"""Bytes from clients to server until a goal is reached, by how updates are compressed; each against plain float32.

2NN on MNIST to 97 %, on equal clients and on two shards of labels each: bytes and rounds to the goal. NIID-Bench's
simple CNN on Fashion-MNIST, Dirichlet 0.3: bytes of the run, and accuracy over its last five rounds.

Run: python benchmarks/communication.py [iid|shards|cnn ...] [--chains "int8 zstd" ...] [--seeds 3] [--picture FILE]
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from published import first_round, run

from fedtrain.records import RoundRecord

GOAL = 0.97
LEAST = {"int8 zstd": (7.0, 4.0), "int4 zstd": (15.0, 8.0)}  # times fewer bytes: of the 2NN, of the CNN
MOST_ROUNDS, MOST_LOST = 1.1, 0.005  # times the rounds; of the accuracy
CHAINS = ["int8 zstd", "int4 zstd", "qsgd:2 zstd", "topk:0.1 int4 zstd"]
_QUIET = ("evaluation.max_clients=0", "evaluation.drift=false")  # bytes of training alone
SETTINGS: dict[str, tuple[str, Sequence[str]]] = {
    "iid": ("mnist-2nn-iid", (*_QUIET, "rounds=60")),
    "shards": (
        "mnist-2nn-iid",
        (*_QUIET, "rounds=400", 'data.partition={kind="shards", shards_per_client=2}', "training.optimizer.lr=0.05"),
    ),
    "cnn": (
        "fashion-noniid",
        (
            *_QUIET,
            "rounds=80",
            "data.clients=50",
            'data.partition={kind="dirichlet", alpha=0.3, min_examples=10}',
            "clients.per_round=10",
            "training.batch_size=32",
            "training.optimizer={lr=0.05}",
        ),
    ),
}


@dataclass(frozen=True)
class Result:
    """What a run took, and what it gave."""

    rounds: float  # to the goal, infinite if a run does not reach it; of the CNN all
    bytes_up: float  # until then
    accuracy: float  # mean of the last five rounds
    curve: Sequence[tuple[float, float]]  # MB up, accuracy; of the first seed


def result(runs: list[list[RoundRecord]], *, to_goal: bool) -> Result:
    """Sum up runs that differ in their seeds: means."""
    rounds = [first_round(records, GOAL) if to_goal else records[-1].round_number for records in runs]
    pairs = list(zip(runs, rounds))
    return Result(
        statistics.fmean(rounds),
        statistics.fmean(sum(r.bytes_up for r in records if r.round_number <= last) for records, last in pairs),
        statistics.fmean(r.central["accuracy"] for records in runs for r in records[-5:]),
        [
            (up / 1e6, r.central["accuracy"])
            for r, up in zip(runs[0], itertools.accumulate(r.bytes_up for r in runs[0]))
            if up
        ],
    )


def measure(setting: str, chain: str, data_root: Path, seeds: int) -> Result:
    """Run a setting with a chain of stages; an empty one is plain float32."""
    name, overrides = SETTINGS[setting]
    stages = ", ".join(f'"{stage}"' for stage in chain.split())
    changes = (*overrides, f"compression.up=[{stages}]")
    runs = [run(name, data_root, *changes, f"seed={seed}") for seed in range(1, seeds + 1)]
    return result(runs, to_goal=setting != "cnn")


def draw(curves: dict[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw accuracy over bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        axes.plot(*zip(*points), label=label, linewidth=1.2)
    axes.set(xscale="log", xlabel="MB up, all clients", ylabel="test accuracy", ylim=(0.9, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def compare(setting: str, chains: Sequence[str], data_root: Path, seeds: int, picture: Path | None) -> bool:
    """Print a setting's table; tell whether all goals are reached."""
    plain = measure(setting, "", data_root, seeds)
    cnn = setting == "cnn"
    print(f"{setting}: plain float32: {plain.rounds:.1f} rounds, {plain.bytes_up / 1e6:,.1f} MB up", end="")
    print(f", accuracy {plain.accuracy:.2%}", flush=True)
    reached, curves = True, {"plain float32": plain.curve}
    for chain in chains:
        found = measure(setting, chain, data_root, seeds)
        curves[chain.replace(" ", ", ")] = found.curve
        fewer = plain.bytes_up / found.bytes_up if math.isfinite(found.rounds) else 0.0
        more, lost = found.rounds / plain.rounds, plain.accuracy - found.accuracy
        line = f"  {chain:22} {fewer:6.1f}x fewer bytes, {more:5.2f}x the rounds, {-100 * lost:+.2f} points"
        if chain in LEAST:
            least = LEAST[chain][cnn]
            ok = fewer >= least and (lost <= MOST_LOST if cnn else more <= MOST_ROUNDS)
            reached = reached and ok
            line += f"  (at least {least:g}x): {'ok' if ok else 'MISSED'}"
        print(line, flush=True)
    if picture:
        draw(curves, picture)
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", choices=[*SETTINGS, []], help="which settings; all unless given")
    parser.add_argument("--chains", nargs="+", default=CHAINS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="an SVG or PNG file: accuracy over bytes, of the last setting")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("FEDTRAIN_DATA"))
    options = parser.parse_args()
    if options.data_root is None:
        parser.error("name the data root: --data-root DIR or FEDTRAIN_DATA=DIR")
    how = options.chains, Path(options.data_root), options.seeds, options.picture
    missed = [setting for setting in options.settings or SETTINGS if not compare(setting, *how)]
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
