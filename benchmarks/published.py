"""What the experiments of `paper.py` share: run an example from scratch, and print a figure beside its expectation."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fedtrain.cli.progress import RunObserver
from fedtrain.experiment import load
from fedtrain.records import RoundRecord
from fedtrain.simulations.run import Places, simulate

# The numbers are the same with workers, but these runs take less time than workers take to start.
IN_PROCESS = "run.workers=0"

_EXAMPLES = Path(__file__).parents[1] / "examples"


class _Silent(RunObserver):
    def notice(self, text: str) -> None:
        """Say nothing: rounds without an update are part of the experiment on stragglers."""


def run(
    name: str, data_root: Path, *overrides: str, privacy: Mapping[str, object] | None = MappingProxyType({})
) -> list[RoundRecord]:
    """Run an example from scratch and return its rounds, with changes of its [privacy]; None leaves that out."""
    experiment = load(_EXAMPLES / f"{name}.toml", overrides)
    if experiment.privacy:
        changed = None if privacy is None else experiment.privacy.model_copy(update=dict(privacy))
        experiment = experiment.model_copy(update={"privacy": changed})
    with tempfile.TemporaryDirectory() as folder:
        return simulate(experiment, Places(_EXAMPLES, Path(folder) / "run", data_root), _Silent()).read_rounds()


def first_round(records: list[RoundRecord], accuracy: float) -> float:
    """Find the first round with so much accuracy on the central test set; infinite if there is none."""
    return next((r.round_number for r in records if r.central["accuracy"] >= accuracy), math.inf)


def verdict(what: str, expected: str, measured: str, *, reached: bool, beside: str = "") -> bool:
    """Print a result; `beside` is what helps to judge it but decides nothing."""
    print(f"{what}\n  expected: {expected}\n  measured: {measured}")
    if beside:
        print(f"  beside:   {beside}")
    print(f"  {'ok' if reached else 'MISSED'}", flush=True)
    return reached
