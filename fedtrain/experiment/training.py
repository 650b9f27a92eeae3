"""What a client does in a round: `[training]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedtrain.experiment.augment import AugmentationSection
from fedtrain.experiment.base import Section
from fedtrain.experiment.losses import BalanceSection, CurriculumSection, LossSection, PenaltySection
from fedtrain.experiment.optimizers import OptimizerSection, SgdSection
from fedtrain.experiment.schedules import ConstantSchedule, ScheduleSection
from fedtrain.experiment.stopping import AveragingSection, EarlyStoppingSection

__all__ = ["TrainingSection"]


class TrainingSection(Section):
    """What a client does in a round."""

    local_epochs: int | None = Field(default=None, ge=1, examples=[1])
    """Passes over the client's training examples per round; 1 unless local_steps is given."""
    local_steps: int | None = Field(default=None, ge=1, examples=[100])
    """Optimiser steps per round, in place of local_epochs; passes are repeated as needed."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per step; the last batch of a pass may be smaller."""
    micro_batch_size: int | None = Field(default=None, ge=1, examples=[8])
    """Most examples of one forward pass: the gradients of a batch are added up over several, which takes less memory.
    Batch normalisation sees each of them by itself."""
    optimizer: OptimizerSection = SgdSection()
    """Local optimiser."""
    optimizer_state: Literal["reset", "keep", "average"] = "reset"
    """What becomes of the optimiser's moments between a client's rounds: they start at zero in each; stay on the
    client; or are averaged by the server as buffers of the model are, and sent with the model."""
    schedule: ScheduleSection = ConstantSchedule()
    """Learning rate over rounds."""
    layer_lr: dict[str, Annotated[float, Field(ge=0)]] = Field(default={}, examples=[{"fc1.*": 0.1}])
    """Factors of the learning rate by name or pattern of parameters; the first pattern that fits counts."""
    loss: LossSection | None = None
    """The loss; the task's own unless given."""
    penalty: PenaltySection = PenaltySection()
    """L1 and L2 penalties on the weights; both together are the elastic net."""
    clip_norm: float | None = Field(default=None, gt=0, examples=[1.0])
    """Most L2 norm of a step's gradient, before penalties and a strategy's corrections; a larger one is scaled down."""
    clip_value: float | None = Field(default=None, gt=0, examples=[0.5])
    """Most absolute value of an entry of a step's gradient; taken before clip_norm."""
    augment: list[AugmentationSection] = []
    """Random changes of the training inputs, in this order; "flip" is short for { name = "flip" }."""
    balance: BalanceSection = "none"
    """Against uneven classes on a client."""
    curriculum: CurriculumSection | None = None
    """Easy examples first."""
    early_stopping: EarlyStoppingSection | None = None
    """Ends the run when the model does not get better any more, and restores the best one."""
    average: AveragingSection | None = None
    """Averages the global model over rounds; the average is measured, and is the run's result."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16, or float16 with loss scaling (CUDA alone): the model computes its loss in mixed precision
    (torch.autocast); parameters, updates and measurements stay in float32."""
    compile: bool = False
    """Whether the model's forward and backward pass are compiled (torch.compile), once per process and for all batch
    sizes. Half a minute on a CPU, where it makes the built-in models slower or no faster; on GPUs not measured."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSection:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("local_epochs and local_steps contradict each other: give one")
        return self

    def steps_for(self, size: int, work: float = 1.0) -> int:
        """Count the optimiser steps of a client's round.

        Args:
            size: examples in the client's training set, at least 1.
            work: share of the steps that there is time for; at least one is taken.
        """
        per_pass = -(-size // min(self.batch_size, size))
        whole = self.local_steps or per_pass * (self.local_epochs or 1)
        return max(1, int(whole * work + 1e-9))
