"""What of the computation of a step goes with the rest of an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtrain.experiment.sections import Experiment

__all__ = ["objections"]

_SAMPLE = 'privacy.unit = "sample"'


def objections(experiment: Experiment) -> Iterator[str]:
    """Yield what contradicts each other, one sentence each."""
    training, privacy, run = experiment.training, experiment.privacy, experiment.run
    if run.gpus > 1 and run.workers not in ("auto", 0):
        yield f"run.gpus = {run.gpus} gives one client several devices, and run.workers one to each: set workers = 0"
    if training.compile and experiment.model.checkpoint:
        yield "training.compile = true decides itself what to compute again: leave out model.checkpoint"
    if privacy is None or privacy.unit != "sample":
        return
    for field, value in (("clip_norm", training.clip_norm), ("clip_value", training.clip_value)):
        if value is not None:
            yield f"training.{field} clips a mean, and {_SAMPLE} has clipped each example: set privacy.max_grad_norm"
    if training.micro_batch_size is not None:
        yield f"training.micro_batch_size is of a plain step; under {_SAMPLE} set privacy.physical_batch_size"
    if training.compile:
        yield f"training.compile = true hides the layers whose gradients {_SAMPLE} takes apart: leave it out"
    if experiment.model.checkpoint:
        yield (
            f"model.checkpoint computes layers twice, and {_SAMPLE} would count their examples' gradients twice: leave "
            "it out, and lower privacy.physical_batch_size to save memory"
        )
    if run.gpus > 1:
        yield f"run.gpus shares a batch over devices, and {_SAMPLE} draws, clips and noises it on one: set run.gpus = 1"
