"""What happens in a ServerApp, told to who submitted the run through the run's log, which flwr carries."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from fedtrain.errors import FedtrainError, InputError, RunError
from fedtrain.records import RoundRecord
from fedtrain.server.observer import Observer

__all__ = ["EventWriter", "follow"]

_MARK = "fedtrain-event "


class EventWriter:
    """An observer that writes a line for each event to standard output, which a ServerApp's log takes in."""

    def round_started(self, round_number: int, clients: int) -> None:
        _write("round_started", round_number, clients)

    def client_finished(self, round_number: int) -> None:
        _write("client_finished", round_number)

    def round_finished(self, record: RoundRecord) -> None:
        _write("round_finished", record.model_dump_json())

    def notice(self, text: str) -> None:
        _write("notice", text)

    def failed(self, error: FedtrainError) -> None:
        """Tell why the run ends."""
        _write("failed", isinstance(error, InputError), str(error))


def follow(log: Iterable[str], observer: Observer) -> FedtrainError | None:
    """Tell an observer what a run's log says; return the error that ended the run, if there was one.

    Args:
        log: pieces of text, cut anywhere.
        observer: is told.
    """
    failure: FedtrainError | None = None
    for line in _lines(log):
        if not line.startswith(_MARK):
            continue  # flwr's own
        try:
            match json.loads(line.removeprefix(_MARK)):
                case ["round_started", int(number), int(clients)]:
                    observer.round_started(number, clients)
                case ["client_finished", int(number)]:
                    observer.client_finished(number)
                case ["round_finished", str(record)]:
                    observer.round_finished(RoundRecord.model_validate_json(record))
                case ["notice", str(text)]:
                    observer.notice(text)
                case ["failed", bool(is_input), str(text)]:
                    failure = InputError(text) if is_input else RunError(text)
        except ValueError:
            continue  # another thread wrote into the line
    return failure


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines


def _write(*event: Any) -> None:
    sys.stdout.write(f"{_MARK}{json.dumps(event)}\n")  # in one call: other threads write too
    sys.stdout.flush()
