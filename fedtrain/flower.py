"""The only module with private flwr imports; the contract tests over them are in tests/test_flower.py."""

from __future__ import annotations

import io
import os
from typing import Any, cast

# Before flwr is imported: no telemetry, no update check, and no lines of gRPC's own on standard error.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Error, Message, Metadata, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedtrain.errors import RunError
from fedtrain.params import Params

__all__ = [
    "CLIENT_AWAY",
    "CLIENT_FAILED",
    "BaseGrid",
    "TensorArray",
    "array_record",
    "enter_run",
    "message",
    "set_message_id",
    "tensor",
    "tensors",
]

CLIENT_FAILED = ErrorCode.UNKNOWN
"""Code of an error whose reason is a sentence of ours."""

CLIENT_AWAY = ErrorCode.NODE_UNAVAILABLE
"""Code of an error that stands for a client of which nothing was heard."""

_SERVER_NODE = 1  # flwr's own id for the server end of a grid


class TensorArray(Array):
    """A flwr Array that keeps the tensor, and serialises it only if somebody asks for the bytes.

    Passing a model through flwr's own Array copies it twice through a .npy buffer; between our own ends that is waste.
    Any flwr code that calls `numpy()` or reads `data` sees an ordinary array.

    Args:
        tensor: a contiguous CPU tensor that nobody writes to any more.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__.update(
            tensor=tensor,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            stype="numpy.ndarray",
        )

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The .npy bytes, made now."""
        buffer = io.BytesIO()
        np.save(buffer, self.numpy(), allow_pickle=False)
        return buffer.getvalue()

    def numpy(self) -> np.ndarray[Any, Any]:
        """The tensor's memory as a NumPy array."""
        tensor: Tensor = self.__dict__["tensor"]
        return tensor.numpy()


def array_record(params: Params) -> ArrayRecord:
    """Wrap named tensors for flwr without copying them."""
    record = ArrayRecord()
    for name, tensor in params.items():
        record[name] = TensorArray(tensor)
    return record


def tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Unwrap a record: our own arrays without a copy, those of other flwr code through NumPy.

    Raises:
        RunError: the bytes of an array cannot be read, or torch has no such dtype.
    """
    return {name: tensor(array) for name, array in record.items()}


def tensor(array: Array) -> Tensor:
    """Unwrap an array: one of our own without a copy.

    Raises:
        RunError: its bytes cannot be read, or torch has no such dtype.
    """
    if isinstance(array, TensorArray):
        found: Tensor = array.__dict__["tensor"]
        return found
    try:
        return torch.from_numpy(array.numpy().copy())
    except Exception as error:  # of many kinds: whatever the bytes drive NumPy's reader to
        raise RunError("arrays cannot be read", got=error) from error


def enter_run(run_id: int) -> None:
    """Give this process the identity without which flwr makes no Message: one run per process."""
    TaskIdentity.task_id = run_id
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = _SERVER_NODE


def set_message_id(message: Message, message_id: str) -> None:
    """Name a message, which flwr leaves to its own server."""
    message.metadata.__dict__["_message_id"] = message_id


def message(content: RecordDict | Error, metadata: Metadata) -> Message:
    """Put a message together again that came through a pipe or a socket."""
    build: Any = Message  # flwr keeps this signature to itself
    return cast("Message", build(content, metadata=metadata))


class BaseGrid(Grid):
    """What every grid of fedtrain shares: identity of the run, and messages made by name."""

    def __init__(self, run_id: int) -> None:
        enter_run(run_id)
        self._run = Run.create_empty(run_id)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
