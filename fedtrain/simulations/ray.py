"""Clients in actors of Ray, on one machine or a cluster: flwr's actors and its pool of them, and our ClientApp.

The data lie in Ray's object store once per machine, and so do the parameters of a round. What a client keeps between
rounds, and its ledger, are files: on a cluster the run's folder must be on a file system that all machines share.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtrain import flower
from fedtrain.client.app import make_client_app
from fedtrain.errors import FedtrainError, InputError, MissingExtraError, RunError
from fedtrain.importing import blame
from fedtrain.params import snapshot
from fedtrain.simulations.grid import answer
from fedtrain.simulations.run import Setup
from fedtrain.tasks.adapted import experiment_task
from fedtrain.training.device import find_device

__all__ = ["RayEngine", "RayResources"]

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

_WINDOW = 8  # clients per actor among which the largest goes first; bounds how many updates can come early

_Serve = Callable[..., Any]
_Flat = tuple[npt.NDArray[np.uint8], torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class RayResources:
    """What Ray is asked for.

    Attributes:
        num_cpus: cores of each client that trains, more than 0.
        num_gpus: its GPUs, such as 0.25 for four clients on one; 0: clients train on the CPU.
        address: of a running cluster, or "auto"; None: that of RAY_ADDRESS, else a Ray of our own on this machine.

    Raises:
        InputError: such a client cannot be.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if not (self.num_cpus > 0 and self.num_gpus >= 0):
            raise InputError(
                "a client under Ray needs cores",
                got=f"{self.num_cpus} cores and {self.num_gpus} GPUs per client",
                expected="more than 0 cores and at least 0 GPUs",
            )


class RayEngine:
    """The engine over Ray. A process has one at a time: `close` it, or use it as a context manager.

    Args:
        resources: of each client that trains.
        setup: what the ClientApp is built from.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: Ray does not start, or has no room for a client.
        RunError: an actor died, or cannot build the ClientApp.
    """

    def __init__(self, resources: RayResources, setup: Setup) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "ray", "--engine ray") from error
        experiment, data, site = setup[:3]
        if site.device.type != "cpu" and not resources.num_gpus:
            raise InputError(
                "under Ray a client sees no GPU that it was not given",
                got=f"device {site.device} and 0 GPUs per client",
                hint="Give each client a GPU or a part of one, or use --set run.device=cpu",
            )
        self._ray, self._sizes = ray, data.sizes()
        _start(ray, resources.address)
        try:
            self._pool = _pool(ray, resources, experiment.clients.per_round or len(self._sizes))
            device = torch.device("cuda" if resources.num_gpus else "cpu")  # an actor sees the GPUs that it was given
            self._setup = ray.put(setup._replace(site=replace(site, device=device)))
            prepare = partial(_preparing, self._setup)
            for future in [self._submit(prepare, None) for _ in range(self._pool.num_actors)]:
                if (fault := self._fetch(future)) is not None:
                    raise fault
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and Ray itself where it is our own."""
        self._ray.util.deregister_serializer(Tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            self._ray.shutdown()
            gc.collect()  # Ray leaves its ended processes to the collector, and those complain

    def run(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yield replies as actors finish; the largest clients start first."""
        stored = self._stored(messages)
        waiting = list(range(len(messages)))
        running: dict[Any, int] = {}
        self._dispatch(messages, stored, waiting, running)
        try:
            while running:
                (done,), _ = self._ray.wait(list(running))
                reply: Message = self._fetch(done)
                del running[done]
                if reply.has_content():
                    for key, record in reply.content.array_records.items():
                        reply.content[key] = _owned(flower.tensors(record))
                self._dispatch(messages, stored, waiting, running)
                yield reply
        finally:
            for future in running:  # nobody reads it any more; the actor takes its next job once it has finished
                self._pool.add_actor_back_to_pool(future)

    def _stored(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Put the arrays of a batch into the object store, each shared record once."""
        known: dict[int, Any] = {}
        stored: list[dict[str, Any]] = []
        for message in messages:
            records = message.content.array_records
            for record in records.values():
                if id(record) not in known:
                    known[id(record)] = self._ray.put(flower.tensors(record))
            stored.append({key: known[id(record)] for key, record in records.items()})
        return stored

    def _dispatch(
        self,
        messages: Sequence[Message],
        stored: Sequence[dict[str, Any]],
        waiting: list[int],
        running: dict[Any, int],
    ) -> None:
        """Give idle actors work from the clients within reach of the oldest unfinished one."""
        while waiting and self._pool.is_actor_available():
            end = min([waiting[0], *running.values()]) + _WINDOW * self._pool.num_actors
            reach = waiting[: bisect_left(waiting, end)]
            position = max(reach, key=lambda p: self._sizes[messages[p].metadata.dst_node_id - 1], default=None)
            if position is None:
                return
            waiting.remove(position)
            message = messages[position]
            bare = RecordDict({k: r for k, r in message.content.items() if not isinstance(r, ArrayRecord)})
            serve = partial(_serving, self._setup, stored[position])
            running[self._submit(serve, flower.message(bare, message.metadata))] = position

    def _submit(self, app_fn: Callable[[], _Serve], message: Message | None) -> Any:
        # The name of the client and its context are flwr's bookkeeping; `answer` makes the context.
        job: Any = (app_fn, message, "", None)
        return self._pool.submit(lambda actor, *parts: actor.run.remote(*parts), job)

    def _fetch(self, future: Any) -> Any:
        try:
            result, _ = self._pool.fetch_result_and_return_actor_to_pool(future)
        except self._ray.exceptions.RayError as error:
            raise RunError(
                "an actor of Ray died",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                expected="it to live until the end of the run",
                hint="It may have run out of memory: give clients more cores, so that fewer train at once; "
                "the same command resumes",
            ) from error
        return result


def _start(ray: Any, address: str | None) -> None:
    """Start Ray or join a cluster, quietly, and leave the handling of signals as it was."""
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own: files left to the collector, a change in a version to come
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            gc.collect()  # now, for the files complain when they go
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError("Ray does not start or cannot be reached", got=error) from error
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, handler)
    ray.util.register_serializer(Tensor, serializer=_flat, deserializer=_unflat)


def _pool(ray: Any, resources: RayResources, most: int) -> Any:
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool, ClientAppActor

    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    rooms = [(machine.get("CPU", 0), machine.get("GPU", 0)) for machine in machines]
    if not any(cpus >= resources.num_cpus and gpus >= resources.num_gpus for cpus, gpus in rooms):
        raise InputError(
            "no machine of Ray has room for one client",
            got=f"{resources.num_cpus:g} cores and {resources.num_gpus:g} GPUs per client",
            expected=f"at most what one of them has: {', '.join(f'{c:g} cores and {g:g} GPUs' for c, g in rooms)}",
        )
    pool = BasicActorPool(ClientAppActor, {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}, {})
    pool.add_actors_to_pool(min(pool.actors_capacity, most))
    return pool


# What follows runs in the actors, except that both ends flatten tensors.


def _preparing(setup: Any) -> _Serve:
    """Build the ClientApp before the first message; what goes wrong is the answer."""

    def prepare(**_: object) -> FedtrainError | None:
        try:
            _app(setup)
        except FedtrainError as error:
            return error
        except Exception as error:
            return RunError(f"an actor of Ray cannot serve clients: {blame(error)}")
        return None

    return prepare


def _serving(setup: Any, arrays: dict[str, Any]) -> _Serve:
    """What flwr's actor takes for a ClientApp: ours, given the message's arrays from the object store."""

    def serve(message: Message, **_: object) -> Message:
        import ray

        app, client_ids = _app(setup)
        for key, reference in arrays.items():
            message.content[key] = _owned(ray.get(reference))
        return answer(app, message, client_ids[message.metadata.dst_node_id - 1])

    return serve


@lru_cache(maxsize=1)
def _app(reference: Any) -> tuple[ClientApp, Sequence[str]]:
    """The ClientApp of this process, and the names of its clients."""
    import ray

    ray.util.register_serializer(Tensor, serializer=_flat, deserializer=_unflat)
    experiment, data, site = ray.get(reference)[:3]
    site = replace(site, device=find_device(site.device.type))
    torch.set_num_threads(experiment.run.threads)
    app = make_client_app(experiment, experiment_task(experiment, data.spec, site.base), data, site)
    return app, data.client_ids()


def _owned(params: dict[str, Tensor]) -> ArrayRecord:
    """Copy tensors out of the object store, which is read-only and of limited size."""
    return flower.array_record(snapshot(params))


def _flat(tensor: Tensor) -> _Flat:
    """Let Ray see a tensor as bytes, which it maps instead of copying them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape)


def _unflat(flat: _Flat) -> Tensor:
    raw, dtype, shape = flat
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody writes to it
        return torch.from_numpy(raw).view(dtype).view(shape)
