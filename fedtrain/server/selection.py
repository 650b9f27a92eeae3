"""Who takes part in a round: a function of (seed, round, what is known), so a resumed run asks the same clients."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtrain.errors import InputError
from fedtrain.experiment.clients import ClientsSection
from fedtrain.privacy.rng import NoiseSource
from fedtrain.seeds import generator
from fedtrain.server.tables import read_rows, refuse_strangers

__all__ = ["Crowd", "eligible", "fixed_sample"]

Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass
class Crowd:
    """The clients that may be asked to train, and the draw among them.

    Attributes:
        section: how many, and by which sampling.
        seed: the experiment's seed.
        sizes: `(clients,)` training examples; a client without any is never asked, nor one that is not eligible.
        losses: position of a client -> its last training loss; written by whoever learns of it.
        absent: positions of clients that are set aside, or have ended.
        coins: by which Poisson sampling draws where nobody may foresee it; None for the experiment's seed.
    """

    section: ClientsSection
    seed: int
    sizes: Positions
    losses: dict[int, float] = field(default_factory=dict)
    absent: set[int] = field(default_factory=set)
    coins: NoiseSource | None = None

    def __post_init__(self) -> None:
        self._eligible = np.flatnonzero(self.sizes > 0)

    def wanted(self) -> int:
        """Clients that a round is meant to have."""
        return min(self.section.per_round or len(self._eligible), len(self._eligible))

    def sample_rate(self) -> float:
        """The chance of each client to be in a round, for Poisson sampling."""
        return self.wanted() / len(self._eligible)

    def left(self) -> int:
        """Clients that may still be asked."""
        return len(self.present())

    def present(self, busy: Collection[int] = (), here: Mask | None = None) -> Positions:
        """Clients that may still be asked, in ascending order.

        Args:
            busy: are not asked now.
            here: `(clients,)`, who is available; None for everybody.
        """
        gone = {*self.absent, *busy}
        if not gone and here is None:
            return self._eligible
        mask = np.ones(len(self.sizes), dtype=bool) if here is None else here.copy()
        mask[np.fromiter(gone, np.int64, len(gone))] = False
        left: Positions = self._eligible[mask[self._eligible]]
        return left

    def draw(self, round_number: int, here: Mask | None = None) -> Positions:
        """Draw who is asked in a round, in ascending order; more than wanted where there is over-selection.

        Args:
            round_number: names the random stream.
            here: `(clients,)`, who is available; None for everybody.
        """
        rng = generator(self.seed, "participants", round_number)
        present, wanted = self.present(here=here), self.wanted()
        count = min(int(np.ceil(wanted * self.section.over_selection - 1e-9)), len(present))
        if self.section.sampling == "poisson" and self.coins:
            heads = self.coins.poisson_mask(len(present), self.sample_rate()).numpy()
            return np.asarray(present[heads])
        if self.section.sampling == "poisson":
            # A coin for each client is the same as a binomial number of clients, then that many uniformly.
            count = int(rng.binomial(len(present), self.sample_rate())) if len(present) else 0
        elif self.section.sampling == "power-of-choice":
            return self._power_of_choice(rng, present, count)
        return np.sort(present if count == len(present) else self._some(rng, present, count))

    def draw_one(self, number: int, busy: Collection[int] = (), here: Mask | None = None) -> int | None:
        """Draw one more client for an asynchronous run: the `number`-th, not one of the busy."""
        present = self.present(busy, here)
        if not len(present):
            return None
        return int(self._some(generator(self.seed, "in-flight", number), present, 1)[0])

    def _some(self, rng: np.random.Generator, present: Positions, count: int) -> Positions:
        shares = None
        if self.section.sampling in ("by-size", "power-of-choice"):
            shares = self.sizes[present] / self.sizes[present].sum()
        return present[rng.choice(len(present), count, replace=False, p=shares)]

    def _power_of_choice(self, rng: np.random.Generator, present: Positions, count: int) -> Positions:
        """Of d candidates drawn by size, those with the highest loss; one that is not known yet comes first.

        The variant rpow-d, which asks nobody for anything: a client's loss is that of its last participation.

        References:
            Cho, Wang, Joshi, "Towards Understanding Biased Client Selection in Federated Learning", AISTATS 2022.
        """
        candidates = min(max(self.section.candidates or 2 * self.wanted(), count), len(present))
        drawn = self._some(rng, present, candidates)  # in random order, which decides between equal losses
        known = np.array([self.losses.get(int(position), np.inf) for position in drawn])
        return np.sort(drawn[np.argsort(-known, kind="stable")[:count]])


def fixed_sample(most: int, seed: int, count: int) -> Positions:
    """Choose the same clients in every round, for evaluation: at most `most` of `count`, drawn once."""
    if most >= count:
        return np.arange(count)
    return np.sort(generator(seed, "evaluators").choice(count, most, replace=False))


def eligible(section: ClientsSection, base: Path, client_ids: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Tell which clients have the tags that `clients.where` asks for.

    Args:
        section: the wanted tags, and the file with all of them.
        base: the experiment file's folder.
        client_ids: names, in the order of the positions.

    Returns:
        `(clients,)`, true for those that may be asked.

    Raises:
        InputError: the file cannot be read, lacks a tag, or no client has all of them.
    """
    if section.tags is None or not section.where:
        return np.ones(len(client_ids), dtype=bool)
    rows = read_rows(base / section.tags, "clients.tags", ("client", *section.where))
    tags = {row["client"]: row for row in rows}
    wanted = {tag: str(value) for tag, value in section.where.items()}

    def fit(has: Mapping[str, str]) -> bool:
        return all(_same(has.get(tag, "").strip(), value) for tag, value in section.where.items())

    fits = np.fromiter((fit(tags.get(name, {})) for name in client_ids), bool, len(client_ids))
    refuse_strangers(tags, "clients.tags", client_ids)
    if not fits.any():
        raise InputError(
            "no client has the tags of clients.where",
            got=", ".join(f"{tag} = {value}" for tag, value in wanted.items()),
            expected=f"one of the {len(client_ids)} clients, such as {client_ids[0]}, with them in {section.tags}",
        )
    return fits


def _same(text: str, value: str | bool | int) -> bool:
    return text.lower() == str(value).lower() if isinstance(value, bool) else text == str(value)
