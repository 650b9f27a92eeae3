"""Whether a folder may be gone on with, and what is said when it is."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtrain.cli.progress import RunObserver
from fedtrain.errors import InterruptedRunError, RunError, RunFolderError
from fedtrain.rundir import RunFolder
from fedtrain.training.evaluation import add_up

OWN_TASK = """
from torch import nn
from fedtrain.tasks.dense import Logistic

class Own(Logistic):
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, {outputs}))
"""

Simulated = Callable[..., tuple[Path, list[str]]]


@pytest.fixture
def own(tiny: Path) -> Path:
    """The tiny experiment, with a task in a file of its own."""
    tiny.with_name("own.py").write_text(OWN_TASK.format(outputs=10))
    text = tiny.read_text().replace('"mlp"', '"own.py:Own"').replace("options = { hidden = [8] }\n", "")
    tiny.write_text(text.replace("rounds = 4", "rounds = 1"))
    return tiny


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rounds(folder: Path) -> list[int]:
    return [record.round_number for record in RunFolder(folder).read_rounds()]


def refused(file: Path, folder: Path, simulated: Simulated) -> None:
    before = files(folder)
    with pytest.raises(
        RunFolderError, match=r"other contents of the files that the experiment names.*nothing was changed"
    ):
        simulated(file, folder.name)
    assert files(folder) == before


def test_an_own_task_that_was_edited_after_the_run_is_refused(own: Path, simulated: Simulated) -> None:
    folder, _ = simulated(own, "run")
    assert simulated(own, "run") == (folder, [])  # complete: nothing to do
    own.with_name("own.py").write_text(OWN_TASK.format(outputs=10) + "# edited\n")
    refused(own, folder, simulated)


def test_the_same_text_beside_other_own_files_is_another_experiment(own: Path, simulated: Simulated) -> None:
    folder, _ = simulated(own, "run")
    elsewhere = own.parent / "elsewhere"
    elsewhere.mkdir()
    twin = elsewhere / own.name
    twin.write_text(own.read_text())
    (elsewhere / "own.py").write_text(OWN_TASK.format(outputs=12))
    refused(twin, folder, simulated)
    (elsewhere / "own.py").write_text(OWN_TASK.format(outputs=10))
    assert simulated(twin, "run") == (folder, [])  # the same contents are the same experiment


@pytest.fixture
def interrupted(tiny: Path, simulated: Simulated) -> Callable[[int], Path]:
    """A run that got Ctrl-C while the clients of a round were answering."""

    def until(number: int) -> Path:
        def interrupt(_observer: RunObserver, round_number: int) -> None:
            if round_number == number:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunObserver, "client_finished", interrupt)
            with pytest.raises(InterruptedRunError, match=f"{number - 1} of 4 rounds are kept"):
                simulated(tiny, "run")
        folder = tiny.parent / "run"
        assert RunFolder(folder).read_manifest().status == "interrupted"
        return folder

    return until


def test_interrupted_in_round_1_and_resumed_has_each_record_once(
    interrupted: Callable[[int], Path], tiny: Path, simulated: Simulated
) -> None:
    folder = interrupted(1)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["round-0000000.safetensors"]
    _, notices = simulated(tiny, "run")
    assert notices == ["resuming at the first of 4 rounds"]
    assert rounds(folder) == [0, 1, 2, 3, 4]
    assert digest(folder) == digest(simulated(tiny, "whole")[0])
    manifest = RunFolder(folder).read_manifest()
    assert (manifest.status, manifest.resumed) == ("complete", 1)


def test_with_all_checkpoints_damaged_it_starts_anew_and_says_so(
    interrupted: Callable[[int], Path], tiny: Path, simulated: Simulated
) -> None:
    folder = interrupted(4)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    _, notices = simulated(tiny, "run")
    assert "round-0000003.safetensors is damaged" in notices[0]
    assert "round-0000002.safetensors is damaged" in notices[1]
    assert notices[2:] == ["resuming at the first of 4 rounds"]
    assert rounds(folder) == [0, 1, 2, 3, 4]
    assert digest(folder) == digest(simulated(tiny, "whole")[0])


def test_other_threads_are_noticed(interrupted: Callable[[int], Path], tiny: Path, simulated: Simulated) -> None:
    folder = interrupted(2)
    _, notices = simulated(tiny, "run", "run.threads=2")
    assert "threads was 1 and is 2 now: the last bits may differ from an uninterrupted run" in notices
    assert RunFolder(folder).read_manifest().threads == 2


def test_other_data_are_refused(
    interrupted: Callable[[int], Path], tiny: Path, simulated: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(2)
    monkeypatch.setattr("fedtrain.data.federated.PartitionedData.fingerprint", lambda *_: "f" * 64)
    with pytest.raises(RunFolderError, match="the data have changed since this run was started"):
        simulated(tiny, "run")
    assert rounds(folder) == [0, 1]


def test_a_fault_in_central_evaluation_is_one_error_and_the_run_resumes(tiny: Path, simulated: Simulated) -> None:
    calls = itertools.count()

    def failing(*arguments: Any) -> torch.Tensor:
        if next(calls) == 2:  # after rounds 0 and 1
            raise ValueError("no such tumour")
        return add_up(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedtrain.server.measuring.add_up", failing)
        with pytest.raises(
            RunError, match=r"evaluating on the central test set failed at .*: ValueError: no such tumour"
        ):
            simulated(tiny, "run", "run.checkpoint_seconds=1000", "evaluation.batch_size=1000")  # all in one batch
    folder = tiny.parent / "run"
    assert RunFolder(folder).read_manifest().status == "failed"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["round-0000001.safetensors"]
    _, notices = simulated(tiny, "run", "evaluation.batch_size=1000")
    assert notices == ["resuming after round 1 of 4 rounds"]
    assert rounds(folder) == [0, 1, 2, 3, 4]
