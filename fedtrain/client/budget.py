"""What stands between a server's wish and a client's examples: its policy, and the ledger of its own data."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedtrain.data.base import FederatedData
from fedtrain.errors import BudgetError
from fedtrain.params import Params
from fedtrain.privacy.accounting import Spend, bound_within
from fedtrain.privacy.book import Account
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.plan import SamplePlan
from fedtrain.privacy.policy import Policy, Request
from fedtrain.wire import Instruction

__all__ = ["Budget", "Reserved"]


@dataclass
class Reserved:
    """A round that is paid for.

    Attributes:
        charge: the noise, the sample rate, and the steps that it may take.
    """

    charge: Spend
    _commit: Callable[[str], str]

    def commit(self, *sent: Params) -> str:
        """Note that these tensors are finished and may leave; return the ledger's head, or "" where there is none."""
        digest = hashlib.sha256()
        for params in sent:
            for name, tensor in params.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return self._commit(digest.hexdigest())


@dataclass(frozen=True)
class Budget:
    """The ledgers of the clients that a process serves.

    Attributes:
        plan: what a round costs a client.
        request: (round_number=, noise_multiplier=, sample_rate=, steps=) -> a request of this run.
        ledgers: folder of the ledgers; None where noise is seeded and nothing is protected.
        policy: what the clients' owner allows.
        data: whose fingerprints name the accounts.
    """

    plan: SamplePlan
    request: Callable[..., Request]
    ledgers: Path | None
    policy: Policy
    data: FederatedData
    _fingerprints: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def reserved(self, client_id: str, instruction: Instruction, size: int) -> Iterator[Reserved]:
        """Pay for a round before its first step; hold the ledger until the round has ended.

        Args:
            client_id: who is to train.
            instruction: in which round, with which share of the steps (which is what is charged), and the receipt that
                its ledger must have.
            size: examples in its training set.

        Raises:
            PrivacyError: the round is not to be paid for, or the ledger cannot be used; nothing was computed.
        """
        whole = self.plan.charge(size)
        charge = Spend(whole.noise_multiplier, whole.sample_rate, max(1, int(whole.steps * instruction.work + 1e-9)))
        if self.ledgers is None:
            yield Reserved(charge, lambda _: "")
            return
        request = self.request(round_number=instruction.round_number, **vars(charge))
        account = Account(client_id, self._fingerprint(client_id), "sample")
        with Ledger(self.ledgers, account, self._epsilon_of(whole), instruction.receipt or None) as ledger:
            if ledger.reservations(request.run) >= self.plan.participations:
                raise BudgetError(f"all {self.plan.participations} rounds that the noise is calibrated for are used up")
            reservation = ledger.reserve(request, self.policy)

            def commit(digest: str) -> str:
                ledger.commit(reservation, charge.steps, digest)
                return ledger.head

            yield Reserved(charge, commit)

    def _epsilon_of(self, round_charge: Spend) -> Callable[[Sequence[Spend], float], float]:
        """An accountant that does not prove again, for each client and round, what the calibration has proved."""
        section, most = self.plan.section, self.plan.participations * round_charge.steps
        prove = bound_within(self.policy.max_epsilon)

        def epsilon_of(history: Sequence[Spend], delta: float) -> float:
            proved = section.epsilon is not None and section.epsilon <= self.policy.max_epsilon
            if proved and section.epsilon is not None and len(history) == 1 and delta >= section.delta:
                spent = history[0]
                noise = (spent.noise_multiplier, spent.sample_rate)
                if noise == (round_charge.noise_multiplier, round_charge.sample_rate) and spent.steps <= most:
                    return section.epsilon
            return prove(history, delta)

        return epsilon_of

    def _fingerprint(self, client_id: str) -> str:
        if client_id not in self._fingerprints:
            self._fingerprints[client_id] = self.data.fingerprint(client_id)
        return self._fingerprints[client_id]
