"""From the experiment's [strategy] section to a strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flwr.serverapp.strategy import Strategy

from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import OwnStrategy
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.bulyan import bulyan
from fedtrain.strategies.clipping import centered_clipping, norm_bounding
from fedtrain.strategies.ditto import ditto
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.fedavgm import fedavgm
from fedtrain.strategies.fedbuff import fedbuff
from fedtrain.strategies.feddyn import feddyn
from fedtrain.strategies.fednova import fednova
from fedtrain.strategies.fedopt import fedadagrad, fedadam, fedopt, fedyogi
from fedtrain.strategies.fedprox import fedprox
from fedtrain.strategies.geometric_median import geometric_median
from fedtrain.strategies.krum import krum, multi_krum
from fedtrain.strategies.median import median, trimmed_mean
from fedtrain.strategies.own import load_own
from fedtrain.strategies.qfedavg import qfedavg
from fedtrain.strategies.scaffold import scaffold

__all__ = ["STRATEGIES", "Setting", "make_strategy"]


class Setting(NamedTuple):
    """What the mathematics of some strategies depends on besides their own section."""

    experiment: Experiment
    num_clients: int  # those that may be asked; only server halves use it


STRATEGIES: Mapping[str, Callable[[Any, Setting], FederatedStrategy]] = {
    "fedavg": lambda _section, _setting: fedavg(),
    "fedavgm": lambda section, _setting: fedavgm(section),
    "fedadagrad": lambda section, _setting: fedadagrad(section),
    "fedadam": lambda section, _setting: fedadam(section),
    "fedyogi": lambda section, _setting: fedyogi(section),
    "fedopt": lambda section, _setting: fedopt(section),
    "fedprox": lambda section, _setting: fedprox(section),
    "scaffold": lambda section, setting: scaffold(section, setting.num_clients),
    "fednova": lambda _section, setting: fednova(setting.experiment.training),
    "feddyn": lambda section, setting: feddyn(section, setting.num_clients),
    "qfedavg": lambda section, setting: qfedavg(section, setting.experiment.training.optimizer.lr),
    "median": lambda _section, _setting: median(),
    "trimmed-mean": lambda section, _setting: trimmed_mean(section),
    "krum": lambda section, _setting: krum(section),
    "multi-krum": lambda section, _setting: multi_krum(section),
    "bulyan": lambda section, _setting: bulyan(section),
    "geometric-median": lambda section, _setting: geometric_median(section),
    "centered-clipping": lambda section, _setting: centered_clipping(section),
    "norm-bounding": lambda section, _setting: norm_bounding(section),
    "ditto": lambda section, _setting: ditto(section),
    "fedbuff": lambda section, _setting: fedbuff(section),
}
"""Name of a built-in strategy -> its builder, given its section and the setting."""


def make_strategy(experiment: Experiment, num_clients: int, base: Path) -> FederatedStrategy | Strategy:
    """Build the strategy that an experiment names.

    Args:
        experiment: its [strategy] section, and what that depends on.
        num_clients: those that may be asked; only server halves use it.
        base: the experiment file's folder, against which "file.py:name" is resolved.

    Returns:
        Both halves of a strategy of ours, or a flwr Strategy, whose clients train plainly.

    Raises:
        InputError: the user's own strategy cannot be loaded or built.
    """
    section = experiment.strategy
    if isinstance(section, OwnStrategy):
        return load_own(section, base)
    return STRATEGIES[section.name](section, Setting(experiment, num_clients))
