import os

import pytest
import torch

from fedtrain.errors import InputError
from fedtrain.experiment.training import TrainingSection
from fedtrain.training.device import check_device, deterministic, find_device, set_deterministic

CPU = torch.device("cpu")


def test_cpu_is_found_and_a_device_that_is_not_there_is_named() -> None:
    assert find_device("cpu") == CPU
    with pytest.raises(InputError, match=r"no such CUDA device.*run\.device = cuda:99; expected cpu"):
        find_device("cuda:99")


def test_float16_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r'training\.precision = "float16" on cpu; expected "bfloat16" or "float32"'):
        check_device(TrainingSection(precision="float16"), 1, CPU)
    for precision in ("float32", "bfloat16"):
        check_device(TrainingSection.model_validate({"precision": precision}), 1, CPU)
    check_device(TrainingSection(precision="float16"), 1, torch.device("cuda", 0))


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_device(TrainingSection(), 1, CPU)
    with pytest.raises(InputError, match=r"training\.compile = true needs a C\+\+ compiler: got no no-such-compiler"):
        check_device(TrainingSection(compile=True), 1, CPU)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"a C\+\+ compiler"):
        check_device(TrainingSection(compile=True), 1, CPU)


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_device(TrainingSection(), 2, torch.device("cuda", 2))
    with pytest.raises(InputError, match=r"run\.gpus = 3 from cuda:2 on; expected at most 2"):
        check_device(TrainingSection(), 3, torch.device("cuda", 2))
    check_device(TrainingSection(), 3, CPU)  # processes


def test_deterministic_mode_is_set_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        set_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
