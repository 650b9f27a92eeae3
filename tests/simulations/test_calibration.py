import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtrain.data.federated import PartitionedData, build
from fedtrain.errors import RunError
from fedtrain.experiment import Experiment, load
from fedtrain.simulations.calibration import measure_step
from fedtrain.tasks.base import Task
from fedtrain.tasks.registry import make_task

pytest.importorskip("sklearn")
CPU = torch.device("cpu")


def prepared(file: Path, *overrides: str) -> tuple[Experiment, Task, PartitionedData]:
    experiment = load(file, overrides)
    data = build(experiment.data, None, file.parent, experiment.seed)
    return experiment, make_task(experiment.task, data.spec, file.parent), data


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[float]], None]:
    """Step by step, the clock shows these seconds more."""

    def set_to(steps: Iterator[float]) -> None:
        shown = [0.0]

        def perf_counter() -> float:
            shown[0] += next(steps)
            return shown[0]

        monkeypatch.setattr(time, "perf_counter", perf_counter)

    return set_to


def test_the_median_step_counts_and_the_first_ones_do_not(tiny: Path, clock: Callable) -> None:
    clock(iter([9.0, 9.0, 9.0, *[0.01, 0.02, 0.03, 0.02, 5.0] * 20]))
    assert measure_step(*prepared(tiny), CPU) == pytest.approx(0.02)


def test_slow_steps_are_timed_a_few_times_only(tiny: Path, clock: Callable) -> None:
    clock(iter([7.0] * 9))  # a tenth reading would raise
    assert measure_step(*prepared(tiny), CPU) == 7.0


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.optimizer.name=adam", "training.local_epochs=3"),
        ("privacy={epsilon=8.0, delta=1e-5}", "data.test=0"),
        ("clients.per_round=2", "personalization.private=['fc2.*']"),
    ],
)
def test_a_step_of_each_kind_takes_a_while(tiny: Path, overrides: tuple[str, ...]) -> None:
    assert 0 < measure_step(*prepared(tiny, *overrides), CPU) < 60


def test_no_random_stream_is_touched(tiny: Path) -> None:
    setting = prepared(tiny)
    before, numpys = torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    measure_step(*setting, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()  # noqa: NPY002


class _Nobody:
    """Clients that keep their rows elsewhere."""

    def __init__(self, data: PartitionedData) -> None:
        self._data, self.spec = data, data.spec

    def client_ids(self) -> list[str]:
        return ["a"]

    def sizes(self) -> np.ndarray:
        return np.array([500])

    def client(self, client_id: str) -> object:
        own = self._data.client(self._data.client_ids()[0])
        return type(own)(*(type(part)(part.inputs[:0], part.targets[:0]) for part in vars(own).values()))


def test_without_examples_no_step_is_timed(tiny: Path) -> None:
    experiment, task, data = prepared(tiny)
    with pytest.raises(RunError, match=r"without examples. Give clients.duration.step_seconds a number"):
        measure_step(experiment, task, _Nobody(data), CPU)
