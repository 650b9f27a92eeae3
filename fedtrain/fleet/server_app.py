"""The ServerApp that a stub FAB points at, on a SuperLink whose machine has fedtrain installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtrain.errors import FedtrainError
from fedtrain.fleet.engine import FleetEngine
from fedtrain.fleet.events import EventWriter
from fedtrain.fleet.settings import RunSettings
from fedtrain.simulations.run import Backend, Places, Setup, simulate

__all__ = ["app", "serve"]

app = ServerApp()


@app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config over the fleet, and tell the run's log what happens."""
    events = EventWriter()

    @contextlib.contextmanager
    def engine(setup: Setup) -> Iterator[FleetEngine]:
        yield FleetEngine(grid, setup.data.client_ids(), settings, events.notice)

    try:
        settings = RunSettings.of(context.run_config)
        root = None if settings.data_root is None else Path(settings.data_root)
        places = Places(Path(settings.base), Path(settings.out), root)
        simulate(settings.read_experiment(), places, events, Backend(engine))
    except FedtrainError as error:
        events.failed(error)
        raise
