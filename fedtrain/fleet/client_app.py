"""The ClientApp that a stub FAB points at, on SuperNodes whose machines have fedtrain installed.

flwr starts a process for each message, so what is heavy to import is imported only where a message needs it.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtrain.fleet.settings import NodeSettings, RunSettings

__all__ = ["app", "evaluate", "introduce", "train"]

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Say which client this SuperNode serves."""
    return Message(NodeSettings.of(context.node_config).introduction(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train as this SuperNode's client."""
    return _answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure as this SuperNode's client."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    import torch

    from fedtrain.client.app import Site, make_client_app
    from fedtrain.client.state import ClientState
    from fedtrain.data.federated import build
    from fedtrain.fleet.engine import plain
    from fedtrain.simulations.grid import answer
    from fedtrain.tasks.adapted import experiment_task
    from fedtrain.training.device import find_device

    run, node = RunSettings.of(context.run_config), NodeSettings.of(context.node_config)
    experiment, base = run.read_experiment(), Path(node.base)
    torch.set_num_threads(experiment.run.threads)
    root = None if node.data_root is None else Path(node.data_root)
    data = build(experiment.data, root, base, experiment.seed)
    task = experiment_task(experiment, data.spec, base)
    site = Site(base, ClientState(Path(node.states) / run.mark), find_device(node.device or experiment.run.device))
    app = make_client_app(experiment, task, data, site)
    reply = answer(app, message, node.name_among(data.client_ids()))
    if reply.has_content():
        reply.content = plain(reply.content)
    return reply
