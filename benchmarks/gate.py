"""What one bad reply among eleven good ones does to flwr's FedAvg and to ours, and what the gate costs.

The table of bad replies is that of tests/contracts/test_bad_updates.py. Both sides get the same messages. flwr's own
strategy does not read rounds and clients in a reply: it leaves those to the transport. What it raises ends the run, for
`Strategy.start` catches nothing. Ends with exit code 1 if a bad reply leaves a trace in our model.

Run: python benchmarks/gate.py [--megabytes 40] [--repeats 9]
"""

from __future__ import annotations

import argparse
import logging
import math
import runpy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedtrain import flower
from fedtrain.experiment.gate import GateSection
from fedtrain.params import Params, RunningMean
from fedtrain.server.gate import Gate
from fedtrain.wire import Update, update_content

TABLE: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parents[1] / "tests" / "contracts" / "test_bad_updates.py"), run_name="table"
)
POSITION = 6  # of the bad reply


def aggregated(contents: list[RecordDict]) -> tuple[Params, dict[str, float]]:
    """Let flwr's FedAvg aggregate replies."""
    asked = [Message(RecordDict(), node, "train") for node in range(1, len(contents) + 1)]
    replies = [Message(content, reply_to=message) for content, message in zip(contents, asked)]
    arrays, metrics = FedAvg().aggregate_train(1, replies)
    assert isinstance(arrays, ArrayRecord)
    return flower.tensors(arrays), {k: float(v) for k, v in (metrics or {}).items() if isinstance(v, int | float)}


def theirs(good: list[RecordDict], honest: RecordDict, bad: RecordDict | Update) -> str:
    """Say in a few words what becomes of a round with a bad reply.

    Args:
        good: the other replies.
        honest: what the bad client should have sent.
        bad: what it sent.
    """
    if isinstance(bad, Update):
        return "(flwr's records cannot hold it)"
    try:
        arrays, metrics = aggregated([*good[:POSITION], bad, *good[POSITION:]])
    except Exception as error:
        return f"raised {type(error).__name__}"
    as_good, as_absent = (aggregated([*good[:POSITION], *one, *good[POSITION:]])[0] for one in ([honest], []))
    if not all(t.isfinite().all() for t in arrays.values()):
        return "model is NaN or infinite"
    if not all(map(math.isfinite, metrics.values())):
        return "metrics are NaN or infinite"
    if same(arrays, as_absent):
        return "not counted"
    if same(arrays, as_good):
        return "counted as if it were good"
    if {n: t.shape for n, t in arrays.items()} != {n: t.shape for n, t in as_good.items()}:
        return "model has other shapes"
    return f"model is off by {float(max((arrays[n] - t).abs().max() for n, t in as_absent.items())):.2g}"


def same(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def ours(bad: RecordDict | Update) -> str:
    good = TABLE["good_replies"]("fedavg")
    left, quarantined = TABLE["aggregated"]("fedavg", [*good[:POSITION], ("bad", bad), *good[POSITION:]])
    alone, _ = TABLE["aggregated"]("fedavg", good)
    return f"quarantined: {quarantined['bad']}" if left == alone else "MISSED"


def milliseconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def print_cost(megabytes: int, repeats: int) -> None:
    delta = {str(i): torch.randn(megabytes * 250_000 // 8) for i in range(8)}
    update = Update("a", 1, delta, 10, {"loss": 0.5})
    gate, total = Gate(GateSection(), delta, {}), RunningMean(like=delta)
    times: dict[str, list[float]] = {"gate": [], "sum": []}
    for _ in range(repeats):
        times["gate"].append(milliseconds(lambda: gate.objection(update, "a", 1)))
        times["sum"].append(milliseconds(lambda: total.add(delta, 10)))
    checked, added = (statistics.median(found) for found in times.values())
    print(f"\none update of {megabytes} MB; CPU ms, median of {repeats}, one thread")
    print(f"  gate {checked:.1f}, RunningMean.add {added:.1f}: the gate costs {checked / added:.2f} of adding it up")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare what bad replies do, and measure the gate.")
    parser.add_argument("--megabytes", type=int, default=40, help="of the update that is timed")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # NumPy's, of what flwr multiplies
    logging.getLogger("flwr").setLevel(logging.ERROR)
    flower.enter_run(1)
    good = [content for _, content in TABLE["good_replies"]("fedavg")]
    print(f"{'one of 12 replies':<34}{'flwr FedAvg':<36}fedtrain")
    missed = 0
    for name, change in TABLE["BAD"].items():
        honest = TABLE["client_update"]("bad", len(good), {})
        bad = change(honest)
        verdict = ours(bad)
        missed += verdict == "MISSED"
        print(f"{name:<34}{theirs(good, update_content(honest), bad):<36}{verdict[:110]}")
    print_cost(args.megabytes, args.repeats)
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
