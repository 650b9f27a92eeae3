from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedtrain.errors import InputError, InterruptedRunError, RunError, RunFolderError
from fedtrain.experiment.sections import Experiment
from fedtrain.sweep.grid import Trial
from fedtrain.sweep.runner import carry_through, final_value, holding

EXPERIMENTS = tuple(
    Experiment.model_validate({"name": "x", "seed": n, "data": {"name": "digits", "clients": 3}}) for n in range(3)
)
TRIAL = Trial(("lr=0.1",), EXPERIMENTS)


@pytest.mark.parametrize("error", [RunError("no quorum"), ValueError("odd\x1b[2J\nthing")])
def test_a_run_that_fails_is_told_of_and_the_others_go_on(tmp_path: Path, error: Exception) -> None:
    ran, failed = [], {}

    def run(experiment: Experiment, folder: Path) -> None:
        ran.append(experiment.seed)
        if experiment.seed == 1:
            raise error

    assert not carry_through(TRIAL, tmp_path, run, failed.__setitem__)
    assert ran == [0, 1, 2]
    expected = {RunError: "no quorum", ValueError: "ValueError: odd\N{REPLACEMENT CHARACTER}[2J thing"}
    assert failed == {TRIAL.folders(tmp_path)[1]: expected[type(error)]}
    assert carry_through(TRIAL, tmp_path, lambda *_: None, failed.__setitem__)


@pytest.mark.parametrize("stop", [InterruptedRunError("stopped"), KeyboardInterrupt()])
def test_a_stop_ends_the_sweep(tmp_path: Path, stop: BaseException) -> None:
    def run(experiment: Experiment, folder: Path) -> None:
        raise stop

    with pytest.raises(type(stop)):
        carry_through(TRIAL, tmp_path, run, lambda *_: pytest.fail("told as a failure"))


def test_the_value_is_the_mean_of_the_last_measurements() -> None:
    central: list[dict[str, float]] = [{"accuracy": n / 10} for n in range(3)]
    assert final_value([[*central, {}], [{"accuracy": 0.6}]], "accuracy") == pytest.approx(0.4)
    assert math.isnan(final_value([central, [{"accuracy": math.inf}]], "accuracy"))
    with pytest.raises(InputError, match=r"do not measure this: got acuracy.*Did you mean accuracy\?"):
        final_value([central], "acuracy")


def test_a_folder_holds_one_sweep_at_a_time(tmp_path: Path) -> None:
    held, again = holding(tmp_path / "a" / "b"), holding(tmp_path / "a" / "b")
    with held, pytest.raises(RunFolderError, match="another sweep"), again:
        pass
    with holding(tmp_path / "a" / "b"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot be written"), holding(tmp_path / "file"):
        pass
