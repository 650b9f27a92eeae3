"""What a run's messages weigh, before any is sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from flwr.app import RecordDict

from fedtrain import flower, wire
from fedtrain.compression.chain import Chain
from fedtrain.compression.exchange import Exchange
from fedtrain.experiment.compression import CompressionSection
from fedtrain.experiment.schedules import PlateauSchedule
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params
from fedtrain.records import PERSONAL, RoundRecord
from fedtrain.server.schedule import Turn
from fedtrain.training.metrics.pooled import NONE, PooledMetrics

__all__ = ["ByteBudget", "Prices", "due"]


@dataclass(frozen=True)
class Prices:
    """Bytes of each message as `wire.size` counts them: exact, or the most where a chain ends in an entropy coder.

    Attributes:
        experiment: what is run.
        exchange: how parameters travel.
        share: what the strategy sends beside the parameters.
        extra: what an update brings beside its delta.
        metrics: names of what clients measure, the loss included.
        personal: whether clients have models of their own, and measure them too.
        pooled: metrics whose sums clients send.
    """

    experiment: Experiment
    exchange: Exchange
    share: Params
    extra: Params
    metrics: Collection[str]
    personal: bool = False
    pooled: PooledMetrics = NONE

    @property
    def exact(self) -> bool:
        """Whether no message depends on what it holds."""
        receipts = self.experiment.privacy is not None and self.experiment.privacy.unit == "sample"
        return self.exchange.up.fixed_size and self.exchange.down.fixed_size and not receipts

    @cached_property
    def down(self) -> int:
        """Of an instruction to train."""
        return wire.size(self._instruction(share=True))

    @cached_property
    def measure_down(self) -> int:
        """Of an instruction to measure."""
        return wire.size(self._instruction(share=False))

    def up(self, client: str) -> int:
        """Of a client's update."""
        return self._up + len(client.encode())

    def measure_up(self, client: str, round_number: int) -> int:
        """Of a client's measurement."""
        names = [*self.metrics]
        fine_tuned = self.experiment.personalization.fine_tune_epochs and round_number == self.experiment.rounds
        personal = bool(self.personal or fine_tuned)
        if personal:
            names += [f"{PERSONAL}{name}" for name in self.metrics]
        sums = self.pooled.blank(personal=personal)
        return wire.size(wire.measurement_content(wire.Measurement(client, 1, dict.fromkeys(names, 0.0), sums)))

    def round(self, number: int, turn: Turn, evaluators: Iterable[int], names: Callable[[int], str]) -> tuple[int, int]:
        """Add up a round's bytes up and down, as long as everybody answers.

        Args:
            number: of the round.
            turn: whom it asks.
            evaluators: who can measure.
            names: position of a client -> its name.
        """
        every, rounds = self.experiment.evaluation.clients_every, self.experiment.rounds
        measuring = list(evaluators) if due(number, every, rounds) else []
        up = sum(self.up(names(client)) for client in turn.ask)
        up += sum(self.measure_up(names(client), number) for client in measuring)
        return up, self.down * (len(turn.ask) + len(turn.late)) + self.measure_down * len(measuring)

    @cached_property
    def _up(self) -> int:
        private = self.experiment.privacy is not None
        metrics = {} if private else {"loss": 0.0}
        update = wire.Update("", 1, _blank(self.exchange.up), 1, metrics, self.extra, self._receipt)
        return wire.size(wire.update_content(update))

    @property
    def _receipt(self) -> str:
        privacy = self.experiment.privacy
        return "0" * 64 if privacy and privacy.unit == "sample" else ""

    def _instruction(self, *, share: bool) -> RecordDict:
        arrays = flower.array_record(_blank(self.exchange.down))
        shared = flower.array_record(self.share) if share else None
        plateau = share and isinstance(self.experiment.training.schedule, PlateauSchedule)
        factor = 1.0 if plateau else None
        return wire.instruction_content(arrays, 1, shared, receipt=self._receipt, lr_factor=factor)


class ByteBudget:
    """Ends a run before its messages weigh more than they may.

    Args:
        most: bytes up and down of the whole run.
        spent: of the rounds so far.
    """

    def __init__(self, most: int, spent: int) -> None:
        self._most, self._spent = most, spent

    @classmethod
    def of(cls, section: CompressionSection, records: Iterable[RoundRecord]) -> ByteBudget | None:
        """The budget of an experiment, less what a run's rounds have taken; None without one."""
        if section.max_bytes is None:
            return None
        return cls(section.max_bytes, sum(record.bytes_up + record.bytes_down for record in records))

    def objection(self, next_round: int) -> str | None:
        """Say so if a round may weigh more than what is left."""
        left = max(0, self._most - self._spent)
        if next_round <= left:
            return None
        return f"compression.max_bytes = {self._most:,} leaves {left:,}, and the next round may take {next_round:,}"

    def note(self, record: RoundRecord) -> None:
        """Count what a round took."""
        self._spent += record.bytes_up + record.bytes_down


def due(round_number: int, every: int, rounds: int) -> bool:
    """Whether an evaluation of every so many rounds, and after the last, is due."""
    return round_number == rounds or (every > 0 and round_number % every == 0)


def _blank(chain: Chain) -> Params:
    return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in chain.encoded_schema().items()}
