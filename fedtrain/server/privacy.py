"""What a run spends, as the server knows it: written down before anything is released, and never taken back."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedtrain.errors import BudgetError, LedgerError, RunError, RunFolderError
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import FedBuffStrategy
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.plan import ClientPlan, SamplePlan, client_plan, sample_plan
from fedtrain.privacy.policy import Policy, Request
from fedtrain.privacy.rng import NoiseSource
from fedtrain.seeds import seed_of
from fedtrain.server.selection import Crowd

__all__ = ["CentralSpending", "LocalSpending", "Spending", "privacy_plan"]


class Spending(Protocol):
    """Keeps count of what a run has released."""

    def begin(self, round_number: int, clients: Sequence[int]) -> None:
        """Note that clients, by their position, are about to be asked.

        Raises:
            BudgetError: the round is not to be paid for; nobody was asked.
        """

    def epsilon(self) -> float:
        """Bound what was spent so far."""

    def memory(self) -> dict[str, Any]:
        """What a checkpoint remembers, so that an account that was taken away is missed."""

    def expect(self, memory: Mapping[str, Any]) -> None:
        """Hold the account against what a checkpoint remembers.

        Raises:
            PrivacyError: it is missing, or an older copy.
        """


class LocalSpending:
    """Clients add the noise and keep their own ledgers; the server counts how often it has asked each.

    A client spends only when it is asked, and no more often than planned, so that count bounds every ledger. It is kept
    in a journal of its own: rounds that a resumed run repeats count twice; repeated noise, which follows from a seed,
    once.

    Args:
        plan: what a round costs each client.
        sizes: `(clients,)` training examples.
        journal: one line per round that was begun.
    """

    def __init__(self, plan: SamplePlan, sizes: npt.NDArray[np.int64], journal: Path) -> None:
        self._plan, self._sizes, self._journal = plan, sizes, journal
        self._asked: Counter[int] = Counter()
        self._rounds: set[int] = set()
        self._lines = 0
        try:
            *lines, torn = journal.read_bytes().split(b"\n") if journal.exists() else [b""]
            for entry in map(json.loads, lines):
                self._count(entry["round"], entry["clients"])
            if torn:  # a crash came before the line was whole, and so before anybody was asked
                os.truncate(journal, journal.stat().st_size - len(torn))
        except (OSError, ValueError, KeyError) as error:
            raise RunFolderError(
                f"{journal} is damaged: it tells how often clients were asked",
                hint="Count their budget as spent, and start anew in another folder with --out",
            ) from error

    def begin(self, round_number: int, clients: Sequence[int]) -> None:
        line = json.dumps({"round": round_number, "clients": list(clients)}) + "\n"
        try:
            with self._journal.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self._journal} ({error.strerror})", hint="Free some space") from error
        self._count(round_number, clients)

    def memory(self) -> dict[str, Any]:
        return {"lines": self._lines}

    def expect(self, memory: Mapping[str, Any]) -> None:
        if self._lines < memory.get("lines", 0):
            raise LedgerError(
                f"{self._journal} is missing, or an older copy: it tells how often clients were asked",
                got=f"{self._lines} lines",
                expected=f"at least {memory['lines']}",
                hint="Bring it back, or count the run's budget as spent",
            )

    def epsilon(self) -> float:
        taken: dict[int, int] = {}
        for client, count in self._asked.items():
            size = int(self._sizes[client])
            taken[size] = max(min(count, self._plan.participations), taken.get(size, 0))
        return self._plan.epsilon(taken)

    def _count(self, round_number: int, clients: Sequence[int]) -> None:
        if not (self._plan.section.noise_seed is not None and round_number in self._rounds):
            self._asked.update(clients)
        self._lines += 1
        self._rounds.add(round_number)


class CentralSpending:
    """The server adds the noise, and keeps the ledger of it; it is `central_dp`'s release.

    Args:
        plan: what a round costs.
        request: (round_number=, noise_multiplier=, sample_rate=, steps=) -> a request of this run.
        ledger: of all clients together; None where noise is seeded and nothing is protected.
        policy: its limits.
    """

    def __init__(
        self, plan: ClientPlan, request: Callable[..., Request], ledger: Ledger | None, policy: Policy
    ) -> None:
        self._plan, self._request, self._ledger, self._policy = plan, request, ledger, policy
        self.noise = NoiseSource()
        self._round = 0

    def begin(self, round_number: int, clients: Sequence[int]) -> None:
        self._round = round_number
        if self._ledger is None:
            self.noise = NoiseSource(seed_of(self._plan.section.noise_seed or 0, "noise", round_number))
            return
        request = self._wanted()
        if self._ledger.reservations(request.run) >= self._plan.rounds:
            raise BudgetError(f"all {self._plan.rounds} rounds of noise that the plan has are used up")
        self._ledger.affordable(request, self._policy)

    def memory(self) -> dict[str, Any]:
        return {"head": self._ledger.head} if self._ledger else {}

    def expect(self, memory: Mapping[str, Any]) -> None:
        if self._ledger is not None and "head" in memory:
            self._ledger.expect(memory["head"])

    def charge(self) -> None:
        """Pay for the round, just before its noise is drawn."""
        if self._ledger is not None:
            self._ledger.commit(self._ledger.reserve(self._wanted(), self._policy), 1)

    def epsilon(self) -> float:
        if self._ledger is None:
            return self._plan.epsilon(self._round)
        return self._plan.epsilon(self._ledger.reservations(self._wanted().run))

    def _wanted(self) -> Request:
        return self._request(round_number=self._round, **vars(self._plan.charge))


def privacy_plan(experiment: Experiment, sizes: npt.NDArray[np.int64]) -> SamplePlan | ClientPlan | None:
    """Price a run before its first round.

    Args:
        experiment: with its [privacy] section.
        sizes: `(clients,)` training examples; 0 for clients that are not to be asked.

    Returns:
        None where nothing is protected.
    """
    section, crowd = experiment.privacy, Crowd(experiment.clients, experiment.seed, sizes)
    if section is None:
        return None
    if not isinstance(section, SamplePrivacy):
        return client_plan(section, int(np.count_nonzero(sizes)), crowd.wanted(), experiment.rounds)
    participations = section.max_participations or _most_draws(experiment, crowd, sizes)
    return sample_plan(section, experiment.training, np.unique(sizes[sizes > 0]).tolist(), participations)


def _most_draws(experiment: Experiment, crowd: Crowd, sizes: npt.NDArray[np.int64]) -> int:
    """How often the draw, which is a function of the seed, takes the client that it takes most often."""
    if crowd.section.per_round is None or isinstance(experiment.strategy, FedBuffStrategy):
        return experiment.rounds
    counts = np.zeros(len(sizes), dtype=np.int64)
    for round_number in range(1, experiment.rounds + 1):
        counts[crowd.draw(round_number)] += 1
    return max(1, int(counts.max()))
