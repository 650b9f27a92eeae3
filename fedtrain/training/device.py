"""Where to train, and how: the devices of this machine by name, and what is asked of them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedtrain.errors import InputError
from fedtrain.experiment.training import TrainingSection

__all__ = ["check_device", "deterministic", "find_device", "set_deterministic"]


def find_device(name: str) -> torch.device:
    """Find a device by name.

    Args:
        name: auto (the first GPU if there is one), cpu, cuda or cuda:N.

    Raises:
        InputError: there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError("this names no device", got=name, expected="auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            "there is no such CUDA device on this machine",
            got=f"run.device = {name}",
            expected="cpu" + "".join(f", cuda:{number}" for number in range(torch.cuda.device_count())),
            hint="Use --set run.device=cpu",
        )
    return device


def check_device(training: TrainingSection, gpus: int, device: torch.device) -> None:
    """Refuse what a device, or this machine, cannot do.

    Args:
        training: how to train.
        gpus: devices of one client, of which `device` is the first.
        device: where to train.

    Raises:
        InputError: names the field and what is allowed.
    """
    if training.precision == "float16" and device.type != "cuda":
        raise InputError(
            "float16 is for CUDA alone",
            got=f'training.precision = "float16" on {device}',
            expected='"bfloat16" or "float32"',
        )
    if training.compile and device.type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            raise InputError(
                "training.compile = true needs a C++ compiler",
                got=f"no {compiler} on this machine",
                hint="Install one, name it in the environment variable CXX, or leave out training.compile",
            )
    there = torch.cuda.device_count() - (device.index or 0)
    if device.type == "cuda" and gpus > there:
        raise InputError(
            "there are not so many CUDA devices on this machine",
            got=f"run.gpus = {gpus} from {device} on",
            expected=f"at most {there}",
        )


def set_deterministic(on: bool) -> None:
    """Let torch use deterministic algorithms alone in this process, or whatever is fastest."""
    if on:
        # cuBLAS reads it when it is first used; these are the buffers that NVIDIA asks for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _use_deterministic(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = False


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Run a block with `set_deterministic(on)`, then put the settings back."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    set_deterministic(on)
    try:
        yield
    finally:
        _use_deterministic(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


def _use_deterministic(on: bool) -> None:
    if on != torch.are_deterministic_algorithms_enabled():  # to set it imports torch's compiler: two seconds
        torch.use_deterministic_algorithms(on)
