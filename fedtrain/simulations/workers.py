"""Worker processes: persistent, one torch thread each, with parameters in shared memory.

The bytes of a run do not depend on how many there are: a client's result depends on (seed, round, client) alone, and
the server adds up in client order.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedtrain import flower
from fedtrain.client.app import Site, make_client_app
from fedtrain.data.base import Examples, FederatedData
from fedtrain.errors import RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params
from fedtrain.server.measuring import CentralTest
from fedtrain.simulations.forkserver import worker_context
from fedtrain.simulations.grid import answer
from fedtrain.simulations.shared import Arena, Index, SharedFolder, dumps, shared_bytes
from fedtrain.tasks.adapted import experiment_task

__all__ = ["WorkerPool", "Workers"]

_DEPTH = 2  # jobs per worker: one running, one waiting, so that a busy server does not keep a worker idle
_WINDOW = 8  # clients per worker among which the largest goes first; bounds how many answers can come early


@dataclass(frozen=True)
class _Place:
    """A worker's place in shared memory: files and their size in bytes."""

    down: str  # parameters from the server, the same for all workers
    up: tuple[str, ...]  # this worker's updates, one file per job in its queue
    size: int


@dataclass(frozen=True)
class _Tensors:
    """Tensors on their way between processes: in an arena, or along with this where they do not fit."""

    index: Index
    loose: dict[str, npt.NDArray[Any]]

    @classmethod
    def put(cls, tensors: Params, arena: Arena, offset: int = 0) -> tuple[_Tensors, int]:
        """Write them from `offset` on; also return the first free offset."""
        done = arena.write(tensors, offset)
        if done is None:
            return cls({}, {name: t.numpy() for name, t in tensors.items()}), offset
        return cls(done[0], {}), done[1]

    def get(self, arena: Arena, *, copy: bool) -> dict[str, Tensor]:
        """Read them: as views of the arena, or as copies where it will be written again."""
        views = arena.read(self.index)
        there = {name: t.clone() for name, t in views.items()} if copy else views
        return there | {name: torch.from_numpy(array) for name, array in self.loose.items()}


@dataclass(frozen=True)
class _Parcel:
    """A message on its way between processes, and its array records."""

    slot: int
    message: Message  # without array records
    records: dict[str, _Tensors]


@dataclass(frozen=True)
class _Batch:
    """A batch of the central test set, to be measured."""

    slot: int
    ticket: int  # of the measurement
    model: _Tensors
    first: int


@dataclass(frozen=True)
class _Sums:
    """What a batch says of the model, or why it could not be measured."""

    slot: int
    ticket: int
    first: int
    sums: _Tensors | Exception


class WorkerPool:
    """Starts the processes at once, so that they import torch while the main process loads the data.

    Args:
        count: processes.
        threads: intra-op threads of torch in each.
    """

    def __init__(self, count: int, threads: int) -> None:
        context = worker_context()
        self.connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(theirs, threads), daemon=True, name=f"fedtrain-worker-{number}"
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for connection in self.connections:
            connection.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def died(self, connection: Connection) -> RunError:
        """Describe the death of the worker behind a connection."""
        process = self._processes[self.connections.index(connection)]
        process.join(timeout=5)
        return RunError(
            "a worker process died",
            got=f"exit code {process.exitcode}",
            expected="it to live until the end of the run",
            hint="It may have run out of memory: try fewer, --set run.workers=1; the same command resumes",
        )


class Workers:
    """The engine over a pool.

    Args:
        pool: running processes.
        setup: experiment, data, and where clients train: what the ClientApp is built from.
        capacity: bytes of the tensors of one message, in either direction.
        central: to be spread over the workers; None if there is none.

    Raises:
        RunError: there is no room for the shared memory, or a worker died.
    """

    def __init__(
        self,
        pool: WorkerPool,
        setup: tuple[Experiment, FederatedData, Site],
        capacity: int,
        central: CentralTest | None = None,
    ) -> None:
        test = central.examples if central and len(central.firsts) > 1 else None
        self._pool = pool
        self._tickets = itertools.count()
        self._sizes = setup[1].sizes()
        self._free: dict[Connection, list[int]] = {c: list(range(_DEPTH)) for c in pool.connections}
        folder = SharedFolder(capacity * (1 + len(pool.connections) * _DEPTH) + shared_bytes((*setup, test)))
        try:
            content = dumps((*setup, test), folder.path)
            down = folder.path / "down"
            self._down = Arena(down, capacity)
            self._up: dict[Connection, list[Arena]] = {}
            for number, connection in enumerate(pool.connections):
                up = [folder.path / f"up-{number}-{slot}" for slot in range(_DEPTH)]
                self._up[connection] = [Arena(path, capacity) for path in up]
                self._send(connection, content)
                self._send(connection, _Place(str(down), tuple(map(str, up)), capacity))
            for connection in pool.connections:
                self._receive(connection)
        finally:
            folder.remove()
        if central:
            central.spread = self.measure

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yield replies as workers finish; the largest clients start first."""
        jobs = self._pack(messages)
        position_of = {m.metadata.message_id: position for position, m in enumerate(messages)}
        waiting = sorted(range(len(messages)))
        unfinished = set(waiting)
        while unfinished:
            self._dispatch(messages, jobs, waiting, min(unfinished))
            for ready, parcel in self._answers():
                if not isinstance(parcel, _Parcel):
                    continue  # it answers a measurement that nobody reads any more
                reply = _unpack(parcel, self._up[ready][parcel.slot], copy=True)
                position = position_of.get(reply.metadata.reply_to_message_id)
                if position is not None:  # else it answers a batch that nobody reads any more
                    unfinished.discard(position)
                    self._dispatch(messages, jobs, waiting, min(unfinished, default=0))
                    yield reply

    def measure(self, model: Params, firsts: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Yield what batches of the central test set say of a model, `CentralTest.part` of each, in this order.

        Args:
            model: global parameters.
            firsts: position of each batch's first example.

        Raises:
            RunError: the task's code fails, or a worker died.
        """
        ticket = next(self._tickets)
        tensors, _ = _Tensors.put(model, self._down)
        asked, window = 0, _WINDOW * len(self._up)
        found: dict[int, dict[str, Tensor]] = {}
        for position, wanted in enumerate(firsts):
            while wanted not in found:
                while asked < min(len(firsts), position + window) and (connection := self._idle()):
                    slot = self._free[connection].pop()
                    self._send(connection, _Batch(slot, ticket, tensors, firsts[asked]))
                    asked += 1
                for ready, said in self._answers():
                    if not isinstance(said, _Sums) or said.ticket != ticket:
                        continue  # of what nobody reads any more
                    if isinstance(said.sums, Exception):
                        raise said.sums
                    found[said.first] = said.sums.get(self._up[ready][said.slot], copy=True)
            yield found.pop(wanted)

    def _answers(self) -> Iterator[tuple[Connection, _Parcel | _Sums]]:
        """Wait for answers, which may be to what nobody reads any more; note who is free."""
        for ready in wait(list(self._up)):
            assert isinstance(ready, Connection)
            answer: _Parcel | _Sums = self._receive(ready)
            self._free[ready].append(answer.slot)
            yield ready, answer

    def _idle(self) -> Connection | None:
        """The worker with the shortest queue; None if all are full."""
        connection = max(self._free, key=lambda c: len(self._free[c]))
        return connection if self._free[connection] else None

    def _pack(self, messages: Sequence[Message]) -> list[_Parcel]:
        """Write the arrays of a batch into shared memory, each shared record once."""
        written: dict[int, _Tensors] = {}
        offset = 0
        parcels = []
        for message in messages:
            records = message.content.array_records
            for record in records.values():
                if id(record) not in written:
                    written[id(record)], offset = _Tensors.put(flower.tensors(record), self._down, offset)
            places = {key: written[id(record)] for key, record in records.items()}
            parcels.append(_Parcel(0, _without_arrays(message), places))
        return parcels

    def _dispatch(self, messages: Sequence[Message], jobs: list[_Parcel], waiting: list[int], oldest: int) -> None:
        """Fill the workers' queues, evenly, from the clients within reach of the oldest unfinished one."""
        window = _WINDOW * len(self._up)
        while waiting and (connection := self._idle()):
            reach = list(itertools.takewhile(lambda position: position < oldest + window, waiting))
            if not reach:
                return
            largest = max(reach, key=lambda position: self._size_of(messages[position]))
            waiting.remove(largest)
            slot = self._free[connection].pop()
            self._send(connection, replace(jobs[largest], slot=slot))

    def _size_of(self, message: Message) -> int:
        return int(self._sizes[message.metadata.dst_node_id - 1])

    def _send(self, connection: Connection, value: object) -> None:
        try:
            connection.send(value)
        except OSError as error:
            raise self._pool.died(connection) from error

    def _receive(self, connection: Connection) -> Any:
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise self._pool.died(connection) from error
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _worker(connection: Connection, threads: int) -> None:
    """The life of a worker process: set up once, then answer messages until the main process is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the main process decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        # These bytes come from the parent process over its private pipe, never from a peer.
        setup: tuple[Experiment, FederatedData, Site, Examples | None]
        setup = pickle.loads(connection.recv())  # noqa: S301
        place: _Place = connection.recv()
        try:
            experiment, data, site, test = setup
            task = experiment_task(experiment, data.spec, site.base)
            app = make_client_app(experiment, task, data, site)
            central = CentralTest(experiment, task, data, site.device, test)
            client_ids = data.client_ids()
            down = Arena(Path(place.down), place.size)
            up = [Arena(Path(path), place.size) for path in place.up]
        except Exception as error:  # told to the main process, which raises it
            connection.send(error)
            return
        connection.send("ready")
        while True:
            parcel: _Parcel | _Batch = connection.recv()
            if isinstance(parcel, _Batch):
                connection.send(_measured(central, parcel, down, up[parcel.slot]))
                continue
            message = _unpack(parcel, down, copy=False)
            reply = answer(app, message, client_ids[message.metadata.dst_node_id - 1])
            records, offset = {}, 0
            for key, record in reply.content.array_records.items() if reply.has_content() else ():
                records[key], offset = _Tensors.put(flower.tensors(record), up[parcel.slot], offset)
            connection.send(_Parcel(parcel.slot, _without_arrays(reply), records))


def _measured(central: CentralTest, batch: _Batch, down: Arena, up: Arena) -> _Sums:
    sums: _Tensors | Exception
    try:
        sums, _ = _Tensors.put(central.part(batch.model.get(down, copy=False), batch.first), up)
    except Exception as error:  # told to the main process, which raises it
        sums = error
    return _Sums(batch.slot, batch.ticket, batch.first, sums)


def _end_with_parent() -> None:
    """Do not train on for a main process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by the main process"
    parent.join()
    os._exit(1)


def _without_arrays(message: Message) -> Message:
    if message.has_error():
        return flower.message(message.error, message.metadata)
    content = RecordDict({k: r for k, r in message.content.items() if not isinstance(r, ArrayRecord)})
    return flower.message(content, message.metadata)


def _unpack(parcel: _Parcel, arena: Arena, *, copy: bool) -> Message:
    """Put a parcel's array records back into its message."""
    for key, tensors in parcel.records.items():
        parcel.message.content[key] = flower.array_record(tensors.get(arena, copy=copy))
    return parcel.message
