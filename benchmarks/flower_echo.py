"""Flower's side of rounds.py: a ClientApp that sends back what it gets, and a ServerApp that times the rounds.

SuperLink and SuperNodes import this module: its folder has to be on PYTHONPATH.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

CLIENTS = 2

client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def echo(message: Message, _context: Context) -> Message:
    return Message(message.content, reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Time each round of each size; the config says which, and where to write the seconds."""
    while len(nodes := list(grid.get_node_ids())) < CLIENTS:
        time.sleep(0.2)
    seconds = []
    for count in json.loads(str(context.run_config["counts"])):
        content = RecordDict({"model": ArrayRecord({"w": Array(np.ones(count, np.float32))})})
        taken = []
        for _ in range(int(str(context.run_config["rounds"]))):
            started = time.perf_counter()
            messages = [Message(content, node, "train") for node in nodes]
            total = np.zeros(count, np.float32)
            for reply in grid.send_and_receive(messages):
                total += cast("ArrayRecord", reply.content["model"])["w"].numpy()
            taken.append(time.perf_counter() - started)
            assert total[0] == total[-1] == CLIENTS, "every client has answered"
        seconds.append(taken)
    Path(str(context.run_config["out"])).write_text(json.dumps(seconds))
