"""Who takes part in a round, and how long they take: the section `[clients]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedtrain.experiment.base import Section, tag_defaults_to

__all__ = [
    "AvailabilitySection",
    "ClientsSection",
    "ConstantDuration",
    "DeviceDuration",
    "DeviceFileDuration",
    "DevicesDuration",
    "DurationSection",
    "FileAvailability",
    "LognormalDuration",
    "PeriodicAvailability",
    "StragglersDuration",
]


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


class PeriodicAvailability(Section):
    """Each client is there once in each period, from a moment of its own on."""

    kind: Literal["periodic"] = "periodic"
    period: float = Field(default=86400.0, ge=1)
    """Seconds after which a client's availability repeats."""
    share: float = Field(default=0.5, ge=0.001, le=1)
    """Share of each period in which a client is there; when its share begins is drawn once per client."""


class FileAvailability(Section):
    """Clients are there as a file says."""

    kind: Literal["file"]
    file: str = Field(examples=["windows.csv"])
    """A CSV file with the columns `client`, `start` and `end`, in seconds since the run began, relative to the
    experiment file; a client may have many lines, and one without any is never asked."""
    period: float | None = Field(default=None, ge=1, examples=[604800.0])
    """Seconds after which all windows repeat; without it, nobody is there after the last of them."""


AvailabilitySection = Annotated[
    PeriodicAvailability | FileAvailability, Field(discriminator="kind"), tag_defaults_to("kind", "periodic")
]


class DeviceDuration(Section):
    """What a device's time is made of: its steps, its messages each way, and when it is there."""

    kind: str
    latency: float = Field(default=0.05, ge=0)
    """Seconds that a message is on its way beside what its bytes take, in either direction."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of each participation that the client vanishes, after a uniformly drawn part of its time."""
    availability: AvailabilitySection | None = None
    """When clients are there; always unless given. One that has to leave while it works has vanished."""


class DevicesDuration(DeviceDuration):
    """Steps and bytes take their time, on devices and links that are drawn once per client."""

    kind: Literal["devices"]
    step_seconds: Annotated[float, Field(gt=0)] | Literal["measured"] = "measured"
    """Seconds of one local step on a device of median speed; "measured" times one on this machine as the run begins."""
    slowness_sigma: float = Field(default=0.5, ge=0)
    """Standard deviation of the logarithm of a step's seconds over clients; 0 for equal devices."""
    bandwidth_up: float = Field(default=1e6, gt=0)
    """Median bytes per second from a client to the server."""
    bandwidth_down: float = Field(default=5e6, gt=0)
    """Median bytes per second from the server to a client."""
    bandwidth_sigma: float = Field(default=0.5, ge=0)
    """Standard deviation of the logarithm of a client's bandwidths, which are drawn together; 0 for equal links."""


class DeviceFileDuration(DeviceDuration):
    """Steps and bytes take their time, on devices and links of a CSV file such as FedScale's."""

    kind: Literal["device-file"]
    file: str = Field(examples=["devices.csv"])
    """A CSV file, relative to the experiment file: computation (milliseconds of inference per example), communication
    (kbit/s), and, if links differ by direction, upload (kbit/s). Without a column client, each client gets a line by
    lot."""
    step_seconds: Annotated[float, Field(gt=0)] | Literal["measured", "file"] = "measured"
    """Seconds of one local step on the file's median device; "measured" times one on this machine as the run begins;
    "file" goes by the file alone: three times computation per example of a batch, as FedScale has it."""


DurationSection = Annotated[
    ConstantDuration | LognormalDuration | StragglersDuration | DevicesDuration | DeviceFileDuration,
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
