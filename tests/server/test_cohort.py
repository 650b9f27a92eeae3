import json

import numpy as np
import torch

from fedtrain.experiment import Experiment
from fedtrain.server.cohort import Cohort
from fedtrain.server.devices import Traffic, pace_of
from fedtrain.server.schedule import Turn
from fedtrain.strategies.adapter import AlgorithmRunner
from fedtrain.strategies.fedavg import fedavg

START = {"w": torch.tensor([1.0])}
SIZES = np.full(4, 32)


def cohort(measured: float, memory: dict[str, object]) -> Cohort:
    devices = {"kind": "devices", "step_seconds": "measured"}
    document = {"data": {"name": "digits", "clients": 4}, "clients": {"duration": devices}}
    experiment = Experiment.model_validate(document)
    made = Cohort(experiment, SIZES, None, pace=pace_of(experiment, SIZES, Traffic(0, 0), measured))
    made.begin(AlgorithmRunner(fedavg().algorithm, START), START, memory)
    return made


def test_a_resumed_run_keeps_the_step_that_was_measured() -> None:
    first = cohort(1.0, {})
    turns = [first.turn(1), first.turn(2)]
    memory = json.loads(json.dumps(first.memory()))
    resumed = cohort(memory["step_seconds"], memory)
    assert [resumed.turn(1), resumed.turn(2)] == turns
    other: Turn = cohort(99.0, {}).turn(1)
    assert other.seconds > turns[0].seconds
