"""Who watches a run."""

from __future__ import annotations

from typing import Protocol

from fedtrain.records import RoundRecord

__all__ = ["Observer"]


class Observer(Protocol):
    """Who watches a run: the terminal, a pipe, a test."""

    def round_started(self, round_number: int, clients: int) -> None:
        """So many clients were asked to train."""

    def client_finished(self, round_number: int) -> None:
        """One more of them has answered."""

    def round_finished(self, record: RoundRecord) -> None:
        """The record was written."""

    def notice(self, text: str) -> None:
        """Something that a person should know, in one line."""
