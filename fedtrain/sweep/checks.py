"""What is found wrong with a sweep's runs before the first of them starts, beyond the faults of their files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedtrain.data.federated import PartitionedData, build
from fedtrain.errors import InputError
from fedtrain.experiment.sections import Experiment
from fedtrain.server.selection import eligible
from fedtrain.simulations.checks import check_noise_fits, check_times, try_task
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.registry import make_strategy
from fedtrain.sweep.grid import Trial
from fedtrain.tasks.adapted import experiment_task

__all__ = ["try_all"]


def try_all(trials: Sequence[Trial], base: Path, data_root: Path | None) -> None:
    """Load the data, the task and the strategy of each combination as its run will, with its first seed.

    Args:
        trials: the combinations.
        base: the experiment file's folder.
        data_root: folder of the built-in data sources; None if not set.

    Raises:
        InputError: of all combinations that do not fit their data or code, the first fault of each kind.
    """
    faults: dict[str, str] = {}
    loaded: tuple[str, PartitionedData] | None = None
    for trial in trials:
        experiment = trial.experiments[0]
        key = json.dumps([experiment.data.model_dump(mode="json"), experiment.seed])
        try:
            if loaded is None or loaded[0] != key:
                loaded = key, build(experiment.data, data_root, base, experiment.seed)
            _try(experiment, loaded[1], base)
        except InputError as error:
            faults.setdefault(str(error), trial.label)
    if len(faults) == 1:
        ((fault, label),) = faults.items()
        raise InputError(f"with {label}: {fault}")
    if faults:
        listed = "\n".join(f"  with {label}: {fault}" for fault, label in faults.items())
        raise InputError(f"the sweep has {len(faults)} faults\n{listed}")


def _try(experiment: Experiment, data: PartitionedData, base: Path) -> None:
    try_task(experiment_task(experiment, data.spec, base), data)
    asked = np.where(eligible(experiment.clients, base, data.client_ids()), data.sizes(), 0)
    strategy = make_strategy(experiment, int(np.count_nonzero(asked)), base)
    flowing = isinstance(strategy, FederatedStrategy) and strategy.asynchrony is not None
    check_times(experiment, live=False, flowing=flowing)
    check_noise_fits(experiment, strategy)
