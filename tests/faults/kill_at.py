"""Runs `fedtrain simulate` and kills this process with SIGKILL at a point: python kill_at.py POINT ARGUMENTS..."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedtrain.cli import main
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.policy import Policy, Request
from fedtrain.records import RoundRecord
from fedtrain.rundir import Checkpoint, RunFolder
from fedtrain.server.rounds import Server


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_round_1(_server: Server, _params: object) -> None:
    die()


def in_mid_round(
    _server: Server, _turn: object, seen: Any, _nodes: object, replies: Iterable[Message]
) -> Iterator[Message]:
    for number, reply in enumerate(replies):
        if seen.number == 3 and number == 1:
            die()
        yield reply


def while_the_checkpoint_is_written(folder: RunFolder, checkpoint: Checkpoint) -> None:
    if checkpoint.round_number == 3:
        real_replace = Path.replace

        def die_instead(path: Path, target: Path) -> Any:
            assert path.stat().st_size > 0
            return die() if target.name.startswith("round-") else real_replace(path, target)

        Path.replace = die_instead  # type: ignore[assignment,method-assign]
    write_checkpoint(folder, checkpoint)


def after_the_last_round(_folder: RunFolder, _state: object) -> str:
    die()
    return ""


def after_the_reservation(ledger: Ledger, request: Request, policy: Policy) -> str:
    name = reserve(ledger, request, policy)
    return die() or name if request.round_number == 2 else name  # type: ignore[func-returns-value]


def after_the_commit(ledger: Ledger, reservation: str, steps_taken: int, update_sha256: str | None = None) -> None:
    commit(ledger, reservation, steps_taken, update_sha256)
    if ledger.summary(1e-3).rounds == 2:
        die()


def with_the_noise_in_the_model(server: Server, record: RoundRecord) -> None:
    if record.round_number == 2:
        die()
    finish(server, record)


write_checkpoint = RunFolder.write_checkpoint
reserve, commit, finish = Ledger.reserve, Ledger.commit, Server._finish
POINTS = {
    "before-round-1": (Server, "_record_untrained", before_round_1),
    "mid-round": (Server, "_counted", in_mid_round),
    "checkpoint": (RunFolder, "write_checkpoint", while_the_checkpoint_is_written),
    "reserved": (Ledger, "reserve", after_the_reservation),
    "committed": (Ledger, "commit", after_the_commit),
    "released": (Server, "_finish", with_the_noise_in_the_model),
    "after-last-round": (RunFolder, "write_model", after_the_last_round),
}

if __name__ == "__main__":
    owner, method, replacement = POINTS[sys.argv.pop(1)]
    setattr(owner, method, replacement)
    main()
