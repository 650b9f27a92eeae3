"""The model before and beside training: `[model]`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from fedtrain.experiment.base import Section, tag_defaults_to

if TYPE_CHECKING:
    from fedtrain.experiment.sections import Experiment

__all__ = [
    "InitSection",
    "LoraSection",
    "LsuvInit",
    "ModelSection",
    "OrthogonalInit",
    "TaskInit",
    "VarianceInit",
    "objections",
]


class TaskInit(Section):
    """The task's own initial weights."""

    name: Literal["task"] = "task"


class VarianceInit(Section):
    """Independent weights of mean 0, with the variance that a layer's width asks for; biases are zero.

    xavier: 2 / (inputs + outputs) (Glorot & Bengio 2010); he: 2 / inputs (He et al. 2015); lecun: 1 / inputs (LeCun et
    al. 1998).
    """

    name: Literal["xavier", "he", "lecun"]
    distribution: Literal["uniform", "normal"] = "normal"
    """What weights are drawn from; the variance is the same."""
    gain: float = Field(default=1.0, gt=0)
    """Factor of the weights."""


class OrthogonalInit(Section):
    """Matrices with orthonormal rows or columns (Saxe et al. 2014); biases are zero."""

    name: Literal["orthogonal"]
    gain: float = Field(default=1.0, gt=0)
    """Factor of the weights."""


class LsuvInit(Section):
    """Orthogonal weights, scaled so that each layer's outputs have variance 1 (Mishkin & Matas 2016).

    It is measured on random inputs, standard normal numbers or uniform tokens, in which nobody's data are.
    """

    name: Literal["lsuv"]


InitSection = Annotated[
    TaskInit | VarianceInit | OrthogonalInit | LsuvInit, Field(discriminator="name"), tag_defaults_to("name", "task")
]


class LoraSection(Section):
    """Low-rank adapters beside frozen Linear layers (Hu et al. 2022); only what is trained travels."""

    rank: int = Field(default=8, ge=1)
    """Inner width of an adapter."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance that an adapter's input is left out in training."""
    layers: list[str] = Field(default=["*"], min_length=1, examples=[["fc1", "block*.attention_in"]])
    """Linear layers that get one, by name or pattern."""
    train: list[str] = Field(default=[], examples=[["fc2.*"]])
    """Parameters that are trained beside the adapters, by name or pattern; all others are frozen."""


class ModelSection(Section):
    """How the task's model starts, and which of its parameters are trained."""

    init: InitSection = TaskInit()
    """Initial weights of Linear, convolutional and recurrent layers."""
    gains: str | None = Field(default=None, examples=["gains.csv"])
    """Scales the first layer's initial weights by each feature's information gain: a CSV file with the columns
    `feature` and `gain`, relative to the experiment file. Gains must be public, or have been noised: they shape what
    everybody sees."""
    start: str | None = Field(default=None, examples=["pretrained.safetensors"])
    """Weights to start from: a safetensors file, relative to the experiment file."""
    drop: list[str] = Field(default=[], examples=[["fc2.*"]])
    """Tensors that keep their initial values, by name or pattern, whatever the file of start holds."""
    rename: dict[str, str] = Field(default={}, examples=[{"encoder.": "features."}])
    """Beginnings of names in the file of start, and what stands there in the model."""
    freeze: list[str] = Field(default=[], examples=[["conv*"]])
    """Parameters that are not trained and do not travel, by name or pattern."""
    unfreeze: dict[str, Annotated[int, Field(ge=1)]] = Field(default={}, examples=[{"fc1.*": 5}])
    """First round in which parameters are trained, by name or pattern (gradual unfreezing, Howard & Ruder 2018); the
    first pattern that fits counts. They travel all the time."""
    lora: LoraSection | None = None
    """Low-rank adapters in place of the Linear layers' own weights."""
    checkpoint: list[str] = Field(default=[], examples=[["block*"]])
    """Submodules, by name or pattern, that are computed again in the backward pass and keep only their input until
    then: less memory for about a third more time."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelSection:
        if self.start is None and (self.drop or self.rename):
            raise ValueError("drop and rename go with start, the file whose tensors they are about")
        if self.start is not None and (self.gains is not None or isinstance(self.init, LsuvInit)):
            raise ValueError(
                'start brings the layers that gains and init.name = "lsuv" would scale: leave them out, '
                "or leave out start"
            )
        if self.lora is not None and self.freeze:
            raise ValueError(
                "lora freezes all but the adapters and lora.train: leave out freeze, or name what is trained there"
            )
        return self

    @property
    def files(self) -> list[str]:
        """The files that initial values come from."""
        return [name for name in (self.start, self.gains) if name is not None]

    def without_files(self) -> ModelSection:
        """The same model with other initial values: for where all of them are replaced anyway."""
        return self.model_copy(update={"start": None, "drop": [], "rename": {}, "gains": None})


def objections(experiment: Experiment) -> Iterator[str]:
    """What in [model] contradicts other sections, one sentence each."""
    rounds = experiment.rounds
    if late := [pattern for pattern, first in experiment.model.unfreeze.items() if first > rounds]:
        yield (
            f'model.unfreeze would train "{late[0]}" after the last of rounds = {rounds}: '
            "give an earlier round, or use model.freeze"
        )
