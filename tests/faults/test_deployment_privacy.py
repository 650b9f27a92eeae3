"""A private run over a deployment: what was made once is sent again, and paid for once."""

import signal
from pathlib import Path
from typing import Any

from fedtrain.privacy.accounting import Spend, bound_within
from fedtrain.privacy.book import Book, ledgers

PRIVATE = """
seed = 3
rounds = 3
[task]
name = "logistic"
[data]
name = "digits"
clients = 3
central_test = 0.2
[training]
batch_size = 200
local_steps = 2
[privacy]
noise_multiplier = 2.0
delta = 1e-4
accountant = "rdp"
[run]
workers = 0
device = "cpu"
"""


def spent(home: Path) -> list[Spend]:
    (path,) = ledgers(home / "ledgers")
    return Book(path, bound_within(1e9)).history()


def test_a_server_that_is_killed_gets_the_same_updates_again_and_nobody_pays_twice(deployment: Any) -> None:
    deployment.experiment = PRIVATE
    clients = deployment.clients(flags=())
    deployment.server(took_5="die").ends(-signal.SIGKILL)
    for client in clients:
        client.says("round 2: sends")
    deployment.server().ends(0)
    for client in clients:
        assert sum(point.startswith("asked") for point in client.points()) == 3
        (charge,) = spent(deployment.folder / "homes" / client.name)
        assert charge.steps == 3 * 2
    assert [len(record["participants"]) for record in deployment.rounds()] == [3, 3, 3]
    assert not any(record["ended"] for record in deployment.rounds())
