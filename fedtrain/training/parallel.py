"""Several devices in one client: each computes the gradient of its share of every batch.

Helper processes hold a replica of the model, one per further device. At each step the client's process sends them the
parameters and the batch, every process computes its share, and the weighted sum comes back; whatever is done with a
gradient is done in the client's process alone. Orders and errors go through pipes, tensors through torch.distributed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedtrain.errors import RunError
from fedtrain.experiment.training import TrainingSection
from fedtrain.importing import blame
from fedtrain.tasks.base import Task
from fedtrain.training.batches import Batch
from fedtrain.training.device import set_deterministic
from fedtrain.training.gradients import BatchGradients
from fedtrain.training.layout import in_layout, memory_format
from fedtrain.training.rules import Tensors

__all__ = ["ParallelGradients", "Replicas"]

_PATIENCE = timedelta(minutes=10)  # for one share of a batch


@dataclass(frozen=True)
class Replicas:
    """The devices that share a client's batches.

    Attributes:
        count: devices, the client's own included; at least 2.
        task: builds the task once more, in a helper process; it can be pickled.
    """

    count: int
    task: Callable[[], Task]


@dataclass(frozen=True)
class _Helper:
    """What a helper process is started with."""

    rank: int
    size: int
    store: str
    task: Callable[[], Task]
    training: TrainingSection
    device: torch.device
    threads: int
    deterministic: bool


@dataclass(frozen=True)
class _Order:
    """One step."""

    batch: tuple[tuple[torch.Size, torch.dtype] | None, ...]  # of each of its tensors
    trained: tuple[int, ...]  # places among the model's parameters
    factor: float
    seed: int  # of what the model draws
    first: bool  # then frozen parameters travel too


class ParallelGradients:
    """Computes the gradient of a batch's mean loss on several devices.

    The processes start at the first call. They end with `close`, with this object, or with its process.

    Args:
        own: computes the share of this process.
        replicas: how many devices, and how a helper builds its task.
    """

    def __init__(self, own: BatchGradients, replicas: Replicas) -> None:
        self._own, self._replicas = own, replicas
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._group: Any = None
        # Its priority lets it run before multiprocessing waits for the processes at exit.
        self._finalize = util.Finalize(self, _end, (self._processes, self._connections), exitpriority=10)

    def __call__(self, batch: Batch, trained: Sequence[Tensor], factor: float = 1.0) -> tuple[Tensor, Tensors]:
        """Compute the mean loss, and the gradients of it times a factor with regard to `trained`.

        Raises:
            RunError: a helper process failed or died.
        """
        try:
            return self._step(batch, trained, factor)
        except (EOFError, OSError, RuntimeError) as error:
            wait([process.sentinel for process in self._processes], timeout=1)
            code = next((p.exitcode for p in self._processes if p.exitcode is not None), None)
            self.close()
            if code is None:
                raise
            raise RunError(
                "a helper process of run.gpus died",
                got=f"exit code {code}",
                hint="It may have run out of memory: lower training.batch_size or run.gpus",
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the helper processes; another call would start new ones."""
        self._group = None
        _end(self._processes, self._connections)

    def _step(self, batch: Batch, trained: Sequence[Tensor], factor: float) -> tuple[Tensor, Tensors]:
        first = self._group is None
        if first:
            self._start()
        model = self._own.model
        places = {id(p): place for place, p in enumerate(model.parameters())}
        order = _Order(
            tuple(None if t is None else (t.shape, t.dtype) for t in batch),
            tuple(places[id(p)] for p in trained),
            factor,
            # From the stream of this client's round, so that it depends on nothing else.
            int(torch.randint(1 << 62, ())),
            first,
        )
        for connection in self._connections:
            connection.send(order)
        _exchange_state(self._group, model, first, sending=True)
        for tensor in batch:
            if tensor is not None:
                self._group.broadcast(tensor.contiguous(), 0).wait()
        share = _share(self._own, batch, trained, factor, (0, self._replicas.count))
        for connection in self._connections:
            failure = connection.recv()
            if failure is not None:
                raise RunError(f"training on several devices failed at {failure}")
        return _summed(self._group, share, trained)

    def _start(self) -> None:
        """Start the helpers, and wait until each has built its model."""
        context = multiprocessing.get_context("forkserver")  # a fork of this process could not use CUDA
        context.set_forkserver_preload([__name__])
        count, device = self._replicas.count, self._own.device
        with tempfile.TemporaryDirectory(prefix="fedtrain-") as folder:
            store = str(Path(folder) / "store")
            for rank in range(1, count):
                ours, theirs = context.Pipe()
                place = torch.device("cuda", (device.index or 0) + rank) if device.type == "cuda" else device
                settings = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
                helper = _Helper(rank, count, store, self._replicas.task, self._own.training, place, *settings)
                process = context.Process(
                    target=_help, args=(theirs, helper), daemon=True, name=f"fedtrain-helper-{rank}"
                )
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)
            for connection in self._connections:
                failure = connection.recv()
                if failure is not None:
                    raise RunError(f"preparing a further device failed at {failure}")
            self._group = _group(store, 0, count, device)
            for connection in self._connections:
                connection.recv()  # it has joined, and needs the store no more


def _help(connection: Connection, helper: _Helper) -> None:
    """The life of a helper process: build the model, then take steps until the client's process is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the client's process decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(helper.threads)
    set_deterministic(helper.deterministic)
    try:
        task = helper.task()
        layout = memory_format(task)
        model = task.model().to(helper.device)
        model.to(memory_format=layout)  # type: ignore[call-overload]
        own = BatchGradients(model.train(), task, helper.training, helper.device)
    except Exception as error:
        connection.send(blame(error))
        return
    connection.send(None)
    group = _group(helper.store, helper.rank, helper.size, helper.device)
    connection.send(None)
    parameters = list(model.parameters())
    while True:
        try:
            order: _Order = connection.recv()
        except (EOFError, OSError):
            return
        _exchange_state(group, model, order.first, sending=False)
        batch = _received(group, order, helper.device)
        trained = [parameters[place] for place in order.trained]
        torch.manual_seed(order.seed + helper.rank)
        try:
            batch = batch._replace(inputs=in_layout(batch.inputs, layout))
            share = _share(own, batch, trained, order.factor, (helper.rank, helper.size))
        except Exception as error:  # told to the client's process, which ends this one
            connection.send(blame(error))
            continue
        connection.send(None)
        _summed(group, share, trained)


def _received(group: Any, order: _Order, device: torch.device) -> Batch:
    tensors: list[Any] = []
    for kind in order.batch:
        tensors.append(None if kind is None else torch.empty(kind[0], dtype=kind[1], device=device))
        if kind is not None:
            group.broadcast(tensors[-1], 0).wait()
    return Batch(*tensors)


def _share(
    own: BatchGradients, batch: Batch, trained: Sequence[Tensor], factor: float, place: tuple[int, int]
) -> Tensor:
    """Compute what one of several processes adds to the gradients and the loss: one vector, the loss last."""
    (rank, size), whole = place, len(batch.inputs)
    first, end = whole * rank // size, whole * (rank + 1) // size
    share = (end - first) / whole
    loss = torch.zeros((), device=own.device)
    gradients: Tensors = [torch.zeros_like(p) for p in trained]
    if share:
        loss, gradients = own(batch.rows(slice(first, end)), trained, factor * share)
    return torch.cat([*(g.reshape(-1) for g in gradients), (loss * share).reshape(1)])


def _summed(group: Any, share: Tensor, trained: Sequence[Tensor]) -> tuple[Tensor, Tensors]:
    """Add up the shares of all processes, and take the vector apart."""
    group.allreduce(share).wait()
    *parts, loss = torch.split(share, [*(p.numel() for p in trained), 1])
    return loss[0], [part.view(p.shape).to(p.dtype) for part, p in zip(parts, trained, strict=True)]


@torch.no_grad()
def _exchange_state(group: Any, model: nn.Module, first: bool, *, sending: bool) -> None:
    """Make the replicas' parameters and buffers equal to those of the client's process."""
    trained = [p for p in model.parameters() if p.requires_grad or first]
    vector = torch.cat([p.reshape(-1) for p in trained])
    group.broadcast(vector, 0).wait()
    if not sending:
        for p, part in zip(trained, torch.split(vector, [p.numel() for p in trained]), strict=True):
            p.copy_(part.view(p.shape))
    for buffer in model.buffers():  # each by itself: they differ in type
        values = buffer.contiguous()
        group.broadcast(values, 0).wait()
        buffer.copy_(values)


def _group(store: str, rank: int, size: int, device: torch.device) -> Any:
    """Join the processes: by NCCL between GPUs, else by Gloo over this machine's loopback.

    Not as torch's default group, of which a process has one: a user's own code may want it.
    """
    shared = dist.FileStore(store, size)  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.cuda.set_device(device)
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = _PATIENCE
        return dist.ProcessGroupNCCL(shared, rank, size, nccl)
    gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    gloo._timeout = _PATIENCE
    return dist.ProcessGroupGloo(shared, rank, size, gloo)


def _end(processes: list[BaseProcess], connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    connections.clear()
    processes.clear()


def _end_with_parent() -> None:
    """Do not wait on for a client that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "helpers are started by the client's process"
    parent.join()
    os._exit(1)
