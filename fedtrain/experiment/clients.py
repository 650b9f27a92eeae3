"""Who takes part in a round, and how long they take: the section `[clients]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedtrain.experiment.base import Section, tag_defaults_to

__all__ = ["ClientsSection", "ConstantDuration", "DurationSection", "LognormalDuration", "StragglersDuration"]


class _Duration(Section):
    kind: str  # declared here so that it is the first key of every kind
    seconds: float = Field(default=1.0, gt=0)
    """Seconds of a client's whole local work; the median where durations are drawn."""


class ConstantDuration(_Duration):
    """Every client takes equally long."""

    kind: Literal["constant"] = "constant"


class LognormalDuration(_Duration):
    """Some clients are always slower than others."""

    kind: Literal["lognormal"]
    sigma: float = Field(default=0.5, gt=0)
    """Standard deviation of the logarithm of the seconds."""
    drawn: Literal["client", "round"] = "client"
    """Whether a duration is drawn once per client or anew for each of its rounds."""


class StragglersDuration(_Duration):
    """A fraction of the clients asked gets only a uniformly drawn part of its work done in these seconds."""

    kind: Literal["stragglers"]
    fraction: float = Field(ge=0, le=1)
    """Expected fraction of stragglers in a round; with deadline = seconds, those of the FedProx paper."""


DurationSection = Annotated[
    ConstantDuration | LognormalDuration | StragglersDuration,
    Field(discriminator="kind"),
    tag_defaults_to("kind", "constant"),
]


class ClientsSection(Section):
    """Who takes part in a round."""

    per_round: int | None = Field(default=None, ge=1, examples=[10])
    """Clients wanted in each round (their expected number for Poisson sampling); leave out for all."""

    sampling: Literal["uniform", "poisson", "by-size", "power-of-choice"] = "uniform"
    """uniform: a fixed number, all equally likely; poisson: each by its own coin; by-size: more examples, likelier;
    power-of-choice: of some candidates drawn by size, those with the highest last training loss (Cho et al. 2022)."""

    candidates: int | None = Field(default=None, ge=1, examples=[30])
    """Candidates of power-of-choice, d; twice per_round unless given."""

    tags: str | None = Field(default=None, examples=["tags.csv"])
    """A CSV file with a column `client` and one per tag, relative to the experiment file."""

    where: dict[str, str | bool | int] = Field(default={}, examples=[{"gpu": True, "site": "north"}])
    """Ask only clients whose tags have these values."""

    over_selection: float = Field(default=1.0, ge=1, le=10)
    """Ask this many times per_round clients, and use the first per_round to finish; a simulation needs `duration`."""

    deadline: float | None = Field(default=None, gt=0, examples=[60.0])
    """Seconds after which a round waits for no client; a simulation needs `duration`."""

    late: Literal["drop", "partial"] = "drop"
    """At the deadline, slower clients are dropped, or send what they have done until then."""

    duration: DurationSection | None = None
    """How long clients train, on the virtual clock of a simulation; a server's clients take their own time."""

    quorum: float = Field(default=0.5, ge=0, le=1)
    """Least fraction of the clients wanted whose update must pass; below it the run stops, resumable."""

    @model_validator(mode="after")
    def _consistent(self) -> ClientsSection:
        if self.sampling == "power-of-choice" and self.per_round is None:
            raise ValueError('sampling = "power-of-choice" needs per_round: how many to choose')
        if self.candidates is not None and self.sampling != "power-of-choice":
            raise ValueError('candidates goes with sampling = "power-of-choice"')
        if self.candidates is not None and self.candidates < (self.per_round or 0):
            raise ValueError("candidates must be at least per_round")
        if self.where and self.tags is None:
            raise ValueError("where needs tags, the file that says which client has which")
        if self.over_selection > 1 and self.per_round is None:
            raise ValueError("over_selection needs per_round: all clients are asked already")
        if self.over_selection > 1 and self.sampling == "poisson":
            raise ValueError('over_selection contradicts sampling = "poisson", in which no client replaces another')
        if self.late == "partial" and self.deadline is None:
            raise ValueError('late = "partial" needs deadline')
        return self
