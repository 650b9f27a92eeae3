"""What privacy costs in accuracy: MNIST at several epsilons, each example protected, and each of 1,000 clients.

Noise comes from the operating system, so figures vary from run to run. Needs the data root in FEDTRAIN_DATA.

Run: python benchmarks/private.py [sample] [client] [--epsilons 1 3 8]
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from published import run

UNITS = {"sample": "private-mnist", "client": "private-mnist-clients"}
# What epsilon = inf is: these rates diverge without clipping, so that stays.
UNLIMITED: dict[str, Mapping[str, object] | None] = {
    "sample": {"epsilon": None, "noise_multiplier": 0.01},
    "client": None,
}
EPSILONS = (1.0, 3.0, 8.0, math.inf)


def accuracy(unit: str, epsilon: float, data_root: Path) -> tuple[float, float]:
    """The accuracy after the last round, and the epsilon that was spent."""
    last = run(UNITS[unit], data_root, privacy=UNLIMITED[unit] if math.isinf(epsilon) else {"epsilon": epsilon})[-1]
    return last.central["accuracy"], math.inf if last.epsilon is None else last.epsilon


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure accuracy over epsilon on MNIST.")
    parser.add_argument("units", nargs="*", default=[*UNITS], metavar="UNIT", help=f"of {', '.join(UNITS)}")
    parser.add_argument("--epsilons", nargs="+", type=float, default=[*EPSILONS])
    options = parser.parse_args()
    if "FEDTRAIN_DATA" not in os.environ:
        sys.exit("FEDTRAIN_DATA must name the data root")
    data_root = Path(os.environ["FEDTRAIN_DATA"])
    print("| unit | epsilon | accuracy |\n|---|---|---|")
    for unit in options.units:
        for epsilon in options.epsilons:
            started = time.monotonic()
            reached, spent = accuracy(unit, epsilon, data_root)
            print(f"| {unit} | {spent:.2f} | {reached:.1%} |", flush=True)
            print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
