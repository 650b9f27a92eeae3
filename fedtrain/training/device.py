"""Where to train: the devices of this machine by name."""

from __future__ import annotations

import torch

from fedtrain.errors import InputError

__all__ = ["find_device"]


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
