"""The local optimisers: the kinds of `[training] optimizer`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedtrain.experiment.base import Section, tag_defaults_to

if TYPE_CHECKING:
    from fedtrain.experiment.sections import Experiment
    from fedtrain.experiment.training import TrainingSection

__all__ = [
    "AdamSection",
    "OptimizerSection",
    "OtherOptimizer",
    "OwnOptimizer",
    "SgdSection",
    "objections",
    "rooted",
]


class SgdSection(Section):
    """Stochastic gradient descent, as torch.optim.SGD."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    """Learning rate."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum; optimizer_state says what becomes of the buffer between rounds."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty added to the gradient."""

    @model_validator(mode="after")
    def _consistent(self) -> SgdSection:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum greater than 0")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether a step is the learning rate times the gradient, and nothing else."""
        return self.momentum == 0 and self.weight_decay == 0


_Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamSection(Section):
    """Adam or AdamW, as in torch.optim."""

    name: Literal["adam", "adamw"]
    lr: float = Field(default=0.001, gt=0)
    """Learning rate."""
    betas: tuple[_Beta, _Beta] = Field(default=(0.9, 0.999), strict=False)  # a TOML list is not strictly a tuple
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty (adam) or decoupled decay (adamw)."""


class OtherOptimizer(Section):
    """Another optimiser of torch.optim, or AdaBound (Luo et al. 2019)."""

    name: Literal[
        "adabound", "adadelta", "adafactor", "adagrad", "adamax", "asgd", "muon", "nadam", "radam", "rmsprop", "rprop"
    ]
    lr: float = Field(default=0.01, gt=0)
    """Learning rate; torch's own default is 1.0 for adadelta, 0.002 for adamax and nadam, 0.001 for muon and radam."""
    options: dict[str, Any] = {}
    """Further keyword arguments of its constructor, such as { weight_decay = 0.01 }."""


class OwnOptimizer(Section):
    """Your own optimiser: a class or function (params, lr, **options) -> torch.optim.Optimizer."""

    name: Literal["own"]
    path: str = Field(pattern=":", examples=["torch.optim:Adam", "own_optimizer.py:Mine"])
    """"package.module:Name" or "file.py:Name"."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate."""
    options: dict[str, Any] = {}
    """Further keyword arguments."""


_NOT_OFFERED = {
    "lbfgs": "evaluates the loss several times in a step, and here a step has one gradient",
    "sparseadam": "takes sparse gradients, and here they are dense",
}


def _explain(value: Any) -> Any:
    """Say why an optimiser of torch.optim is not among the kinds."""
    name = value.get("name") if isinstance(value, dict) else None
    plain = name.lower().replace("-", "").replace("_", "") if isinstance(name, str) else ""
    if plain in _NOT_OFFERED:
        raise ValueError(f'name = "{plain}" is not offered: it {_NOT_OFFERED[plain]}')
    return value


OptimizerSection = Annotated[
    SgdSection | AdamSection | OtherOptimizer | OwnOptimizer,
    Field(discriminator="name"),
    tag_defaults_to("name", "sgd"),
    BeforeValidator(_explain),
]


def rooted(training: TrainingSection, base: Path) -> TrainingSection:
    """The same training, with the file of an own optimiser named wherever the process may be.

    Args:
        training: of an experiment.
        base: the experiment file's folder.
    """
    section = training.optimizer
    if not isinstance(section, OwnOptimizer) or ".py:" not in section.path:
        return training
    file, _, name = section.path.rpartition(":")
    own = section.model_copy(update={"path": f"{(base / file).resolve()}:{name}"})
    return training.model_copy(update={"optimizer": own})


def objections(experiment: Experiment) -> Iterator[str]:
    """Say what of optimiser, learning rates and their schedule does not go with the rest of an experiment."""
    training, strategy = experiment.training, experiment.strategy
    if strategy.needs_sgd or strategy.needs_plain_sgd:
        needs = f'strategy.name = "{strategy.name}" counts on one learning rate for all steps and layers of a round'
        if training.schedule.by == "step":
            yield f'{needs}, which training.schedule.by = "step" changes'
        if training.layer_lr:
            yield f"{needs}, which training.layer_lr changes"
    if training.optimizer_state == "reset":
        return
    if strategy.name == "fednova":
        yield (
            'strategy.name = "fednova" counts how often each gradient enters the steps of a round: '
            'training.optimizer_state = "reset"'
        )
    if training.optimizer_state == "average":
        yield from _objections_to_averaging(experiment)


_NO_MEAN = ["median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median", "centered-clipping"]
_NO_MEAN += ["norm-bounding", "own", "fedbuff"]


def _objections_to_averaging(experiment: Experiment) -> Iterator[str]:
    averaged, strategy = 'training.optimizer_state = "average"', experiment.strategy
    if experiment.privacy is not None:
        yield f"{averaged} sends moments beside the update, which the noise of privacy does not cover"
    if strategy.name in _NO_MEAN:
        yield f'{averaged} needs a plain mean of buffers, which strategy.name = "{strategy.name}" does not promise'
    if experiment.personalization.private:
        yield f"{averaged} would send moments of the parameters that personalization.private keeps on the clients"
