"""`fedtrain simulate`: an experiment on this machine, from the file to a run's folder."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedtrain import params
from fedtrain.client.app import Site, make_client_app
from fedtrain.client.state import ClientState
from fedtrain.compression.exchange import Exchange, make_exchange
from fedtrain.data.base import FederatedData
from fedtrain.data.federated import PartitionedData, build
from fedtrain.errors import InterruptedRunError, RunError, RunFolderError
from fedtrain.experiment.load import to_toml
from fedtrain.experiment.privacy import ClientPrivacy, SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params
from fedtrain.rundir import Checkpoint, RunFolder
from fedtrain.server.cohort import Cohort
from fedtrain.server.devices import Pace
from fedtrain.server.drift import Sketcher
from fedtrain.server.mail import Mail
from fedtrain.server.manifest import Circumstances, new_manifest, refuse_other_run, resumed_manifest
from fedtrain.server.measuring import CentralTest
from fedtrain.server.observer import Observer
from fedtrain.server.prices import ByteBudget, Prices
from fedtrain.server.result import Result, check_watched
from fedtrain.server.rounds import Server
from fedtrain.server.selection import eligible
from fedtrain.simulations.calibration import measure_step
from fedtrain.simulations.central import central_examples
from fedtrain.simulations.checks import check_noise_fits, check_private, check_times, try_task
from fedtrain.simulations.forkserver import wanted_workers
from fedtrain.simulations.grid import Engine, InProcess, SimulationGrid
from fedtrain.simulations.outlook import make_pace
from fedtrain.simulations.private import Accounts, Protection, protection, requests
from fedtrain.simulations.shared import Arena
from fedtrain.simulations.workers import WorkerPool, Workers
from fedtrain.strategies.adapter import AlgorithmRunner, RoundStrategy
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.registry import make_strategy
from fedtrain.strategies.stock import StockStrategy
from fedtrain.tasks.adapted import experiment_task
from fedtrain.tasks.base import Task
from fedtrain.training.device import check_device, deterministic, find_device
from fedtrain.training.loop import build_model
from fedtrain.training.optimizer import check_optimizer

__all__ = ["Backend", "EngineFactory", "Places", "Setup", "sigterm_interrupts", "simulate"]


class Setup(NamedTuple):
    """What an engine is made of, once the run's folder has been begun."""

    experiment: Experiment
    data: FederatedData
    site: Site
    capacity: int  # bytes of the tensors of one message, in either direction
    flowing: bool = False  # clients start at any time, and not in step with the rounds
    central: CentralTest | None = None


EngineFactory = Callable[[Setup], AbstractContextManager[Engine]]
"""Makes a run's engine, which is left when the run ends."""


@dataclass(frozen=True)
class Backend:
    """Where a run's clients are, if not in processes of this run.

    Attributes:
        engine: runs the clients.
        load: gives the clients' data, or what is known of them; the experiment's [data] is read unless given.
        live: clients take their own time, and not that of `clients.duration`.
        joined: whether there are clients that `load` would give, and has not given yet.
        locked: `load` has locked the run's folder.
    """

    engine: EngineFactory
    load: Callable[[], PartitionedData] | None = None
    live: bool = False
    joined: Callable[[], bool] = lambda: False
    locked: bool = False


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes.

    Attributes:
        base: the experiment file's folder, against which its relative paths are resolved.
        out: the run's folder.
        data_root: folder of the built-in data sources; None if not set.
    """

    base: Path
    out: Path
    data_root: Path | None


def simulate(
    experiment: Experiment,
    places: Places,
    observer: Observer,
    backend: Backend | None = None,
) -> RunFolder:
    """Run an experiment, or go on with it where it was stopped.

    Args:
        experiment: what to run.
        places: where to read and write.
        observer: is told what happens.
        backend: where the clients are; in this machine's processes unless given.

    Returns:
        The folder of the complete run.

    Raises:
        InputError: the data, the task or the folder does not fit.
        InterruptedRunError: stopped by a signal; resumable.
        ClientsJoinedError: to be resumed at once, with the clients that joined.
        RunError: the run cannot go on; resumable.
    """
    folder = RunFolder(places.out)
    refuse_other_run(folder, experiment, places.base)
    if folder.manifest.exists() and folder.read_manifest().status == "complete":
        return folder
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(sigterm_interrupts())
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(experiment.run.threads)
            device = find_device(experiment.run.device)
            if backend is None:  # a server's clients check their own
                check_device(experiment.training, experiment.run.gpus, device)
            stack.enter_context(deterministic(experiment.run.deterministic))
            count = 0 if backend else _worker_count(experiment, device)
            backend = backend or Backend(_in_process)
            if count:
                pool = WorkerPool(count, experiment.run.threads)
                stack.callback(pool.close)
                backend = Backend(partial(_workers, pool))
            load = backend.load or partial(build, experiment.data, places.data_root, places.base, experiment.seed)
            data = load()
            task = experiment_task(experiment, data.spec, places.base)
            try_task(task, data)
            sizes = np.where(eligible(experiment.clients, places.base, data.client_ids()), data.sizes(), 0)
            strategy = make_strategy(experiment, int(np.count_nonzero(sizes)), places.base)
            flowing = isinstance(strategy, FederatedStrategy) and strategy.asynchrony is not None
            check_times(experiment, live=backend.live, flowing=flowing)
            protects = protection(experiment, (places.base, folder), data, sizes, task)
            check_noise_fits(experiment, strategy)
            simulation = _Simulation(
                experiment, places, observer, folder, data, sizes, task, strategy, device, protects
            )
            model, central = simulation.checked()
            if not backend.locked:
                stack.enter_context(folder.locked())
            refuse_other_run(folder, experiment, places.base)
            simulation.run(model, central, backend, count)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "interrupted; what was finished is kept", hint="Run the same command again to go on"
            ) from None
    return folder


@dataclass(frozen=True)
class _Simulation:
    """One call of `simulate`, once everything that it needs has been found."""

    experiment: Experiment
    places: Places
    observer: Observer
    folder: RunFolder
    data: PartitionedData
    sizes: npt.NDArray[np.int64]  # training examples; 0 for clients that are not to be asked
    task: Task
    strategy: FederatedStrategy | Strategy
    device: torch.device
    protection: Protection | None

    def checked(self) -> tuple[nn.Module, CentralTest]:
        """Build what is to be trained and what measures it; refuse what does not fit, before anything is written."""
        model = build_model(self.task, self.experiment.seed)
        check_private(tuple(self.experiment.personalization.private), params.exchanged(model), self._initial(model))
        check_optimizer(self.experiment.training, self.places.base, model)
        examples = central_examples(self.experiment, self.data)
        central = CentralTest(self.experiment, self.task, self.data, self.device, examples)
        check_watched(self.experiment, central.names, examples)
        return model, central

    def _initial(self, model: nn.Module) -> Params:
        private = self.experiment.personalization.private
        return {name: t for name, t in params.exchanged(model).items() if not params.is_private(name, private)}

    def run(self, model: nn.Module, central: CentralTest, backend: Backend, workers: int) -> None:
        self._begin(model, workers)
        try:
            exchange = make_exchange(self.experiment, model)
            with self._accounts(model) as accounts:
                result = self._rounds(params.snapshot(self._initial(model)), exchange, backend, accounts, central)
            params.load(model, result.params)
            digest = self.folder.write_model(model.state_dict())
            ClientState(self.folder.clients).keep_last()
        except (InterruptedRunError, KeyboardInterrupt, BrokenPipeError):  # the last: of `| head`
            self._update_manifest(status="interrupted")
            raise
        except BaseException:
            with contextlib.suppress(RunError):  # the first error is the one to tell
                self._update_manifest(status="failed")
            raise
        told = {"result_round": result.round_number, "ended": result.ended}
        self._update_manifest(status="complete", model_sha256=digest, **told)

    def _begin(self, model: nn.Module, workers: int) -> None:
        """Write what is known before the first round, or check that it still holds."""
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        now = Circumstances(self.places.base, self.device, workers, self.data.fingerprint(), parameters)
        if self.folder.manifest.exists():
            before = self.folder.read_manifest()
            manifest = resumed_manifest(before, self.experiment, now, self.observer.notice)
        else:
            self.folder.write_experiment(to_toml(self.experiment))
            self.folder.write_preparation(self.data.preparation)
            if self.protection:
                self.folder.write_privacy(self.protection.summary(self.folder))
            manifest = new_manifest(self.experiment, now)
        summary = self.data.summary()
        self.folder.write_data(summary)  # also anew: clients may have joined
        if told := summary.told_left_out():
            self.observer.notice(told)
        self.folder.write_manifest(manifest)
        self._warn_if_nothing_is_held_out()
        section = self.experiment.privacy
        mode = self.protection.mode if self.protection else "auto"
        if isinstance(section, SamplePrivacy) and section.mode not in ("auto", mode):
            self.observer.notice(f'privacy.mode = "{section.mode}" does not cover this model: "{mode}" is used')
        if self.experiment.clients.where:
            fit = int(np.count_nonzero(self.sizes))
            self.observer.notice(f"clients.where leaves {fit} of {len(self.sizes)} clients to be asked")

    def _warn_if_nothing_is_held_out(self) -> None:
        private = bool(self.experiment.personalization.private)  # then there is no central evaluation
        if self.data.dataset.test_targets is not None and not private:
            return
        if self.experiment.privacy is not None:
            self.observer.notice(
                "there is no test set of the server's own, and privacy lets no client's measurements out, so the "
                "model is not measured; set data.central_test=0.2"
            )
            return
        if self.experiment.data.tests_clients:
            return
        ways = "data.test=0.2" if private else "data.central_test=0.2 or data.test=0.2"
        self.observer.notice(
            f"nothing is held out to test the model on, so its loss in training is all there is; set {ways}"
        )

    def _accounts(self, model: nn.Module) -> contextlib.AbstractContextManager[Accounts]:
        if self.protection is None:
            return contextlib.nullcontext(Accounts())
        manifest = self.folder.read_manifest()
        request = requests(self.experiment, f"{self.experiment.name} {manifest.created_at}", model)
        return self.protection.accounts(request, self.data, self.folder.asked)

    def _rounds(
        self, initial: Params, exchange: Exchange, backend: Backend, accounts: Accounts, central: CentralTest
    ) -> Result:
        experiment, data = self.experiment, self.data
        names = data.client_ids()

        def client_name(node_id: int) -> str:
            return names[node_id - 1]

        asynchrony = None
        runner: RoundStrategy
        personal = False
        if isinstance(self.strategy, FederatedStrategy):
            strategy = accounts.guard(self.strategy)
            runner = AlgorithmRunner(strategy.algorithm, initial, exchange.buffers)
            asynchrony, personal = strategy.asynchrony, strategy.personal_rule is not None
        else:
            runner = StockStrategy(self.strategy, experiment.seed, client_name)
        metrics = ["loss", *self.task.metrics()]
        prices = Prices(experiment, exchange, runner.share(), runner.extra(initial), metrics, personal, central.metrics)
        start = self._start(Checkpoint(0, initial, runner.state))
        pace = None if backend.live else self._pace(prices, start.server.get("step_seconds"))
        cohort = Cohort(experiment, self.sizes, asynchrony, live=backend.live, pace=pace, held_out=data.held_out())
        site = Site(self.places.base, ClientState(self.folder.clients), self.device, accounts.budget)
        beside = max(Arena.size_for(runner.share()), Arena.size_for(runner.extra(initial)))
        sums = Arena.size_for(central.metrics.blank(personal=True))
        largest = max(Arena.size_for(initial), exchange.largest(), sums)
        setup = Setup(experiment, data, site, largest + beside, asynchrony is not None, central)
        with backend.engine(setup) as engine:
            grid = SimulationGrid(engine, len(names))
            server = Server(
                experiment,
                runner,
                cohort,
                grid,
                self.folder,
                central.measure,
                self.observer,
                Mail(prices, runner, cohort, self.folder, client_name),
                accounts.spending,
                ByteBudget.of(experiment.compression, self.folder.read_rounds()),
                self._sketcher(initial, exchange.buffers),
                backend.joined,
                central.confusion,
                central.look,
            )
            server.run(start)
            return server.result

    def _start(self, fresh: Checkpoint) -> Checkpoint:
        """Take up the newest whole checkpoint; forget what was recorded after it."""
        start = self.folder.latest_checkpoint(self.observer.notice) or fresh
        if {n: t.shape for n, t in start.params.items()} != {n: t.shape for n, t in fresh.params.items()}:
            raise RunFolderError(
                "the checkpoint does not fit the task's model: the task's code has changed",
                got=self.folder.path,
                hint="Bring the old code back, or start anew in another folder with --out",
            )
        if self.folder.rounds.exists():
            self.folder.drop_rounds_after(start.round_number or -1)  # round 0 is measured again
            where = f"after round {start.round_number}" if start.round_number else "at the first"
            self.observer.notice(f"resuming {where} of {self.experiment.rounds} rounds")
        return start

    def _pace(self, prices: Prices, known: float | None) -> Pace:
        def measure() -> float:
            if known is not None:  # as the run began
                return known
            seconds = measure_step(self.experiment, self.task, self.data, self.device)
            self.observer.notice(
                f"one local step takes {seconds * 1000:.3g} ms here: that is the clock's median device"
            )
            return seconds

        return make_pace(prices, self.places.base, self.data.client_ids(), self.sizes, measure)

    def _sketcher(self, initial: Params, buffers: Collection[str]) -> Sketcher | None:
        """Nothing may be told of single clients where each is protected."""
        if not self.experiment.evaluation.drift or isinstance(self.experiment.privacy, ClientPrivacy):
            return None
        return Sketcher({name: t for name, t in initial.items() if name not in buffers})

    def _update_manifest(self, **changes: object) -> None:
        self.folder.write_manifest(self.folder.read_manifest().model_copy(update=changes))


@contextlib.contextmanager
def _in_process(setup: Setup) -> Iterator[Engine]:
    experiment, data, site = setup[:3]
    task = experiment_task(experiment, data.spec, site.base)
    yield InProcess(make_client_app(experiment, task, data, site), data.client_ids())


@contextlib.contextmanager
def _workers(pool: WorkerPool, setup: Setup) -> Iterator[Engine]:
    yield Workers(pool, setup[:3], setup.capacity, setup.central)


def _worker_count(experiment: Experiment, device: torch.device) -> int:
    """One process keeps a GPU busy; on the CPU there is a worker per core."""
    return 0 if experiment.run.workers == "auto" and device.type != "cpu" else wanted_workers(experiment)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C while a run is on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
