"""Where worker processes come from: a server process that has imported torch once and forks them.

This module imports nothing heavy, so that a command can start the server before it imports torch itself: both then
import at the same time, on two cores. A forked worker shares the imported code's memory and starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext

from fedtrain.experiment.sections import Experiment

__all__ = ["start_importing", "wanted_workers", "worker_context"]


def worker_context() -> ForkServerContext:
    """Start the server if it is not running, and return the context whose processes are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fedtrain.collecting", "fedtrain.simulations.workers", "fedtrain.simulations.preloaded"]
    )
    with _ignoring_interrupts():
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Let the server inherit that Ctrl-C is not its business: it reaches the whole group, also while it imports."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_importing(experiment: Experiment) -> None:
    """Start the server now if the experiment may need it; whether there is a GPU is known only later."""
    if wanted_workers(experiment):
        worker_context()


def wanted_workers(experiment: Experiment) -> int:
    """Worker processes on a machine without a GPU: one per core where there are two or more."""
    if experiment.run.gpus > 1:
        return 0  # a client's own processes share its batches
    if experiment.run.workers != "auto":
        return experiment.run.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores // experiment.run.threads, experiment.clients.per_round or cores)
    return workers if workers > 1 else 0
