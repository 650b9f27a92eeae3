"""The user's own code that an experiment names."""

from __future__ import annotations

from fedtrain.experiment.losses import OwnLoss
from fedtrain.experiment.optimizers import OwnOptimizer
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import OwnStrategy

__all__ = ["code_of"]


def code_of(experiment: Experiment) -> list[str]:
    """Name the code of a user's own: "package.module:Name" or "file.py:Name", each once."""
    training, strategy = experiment.training, experiment.strategy
    named = [experiment.task.name, experiment.data.name or ""]
    named += [section.path for section in (strategy, training.optimizer, training.loss) if isinstance(section, _OWN)]
    named += [training.curriculum.score] if training.curriculum else []
    return list(dict.fromkeys(name for name in named if ":" in name))


_OWN = (OwnStrategy, OwnOptimizer, OwnLoss)
