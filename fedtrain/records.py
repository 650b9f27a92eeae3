"""What a run writes down: one typed record per round, and the manifest of where it ran."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedtrain.errors import shorten

__all__ = ["PERSONAL", "DataSummary", "Heterogeneity", "Histogram", "Manifest", "PrivacySummary", "RoundRecord"]

PERSONAL = "personal_"
"""Prefix of a metric that was measured on the client's own model rather than the global one."""
_MOST_NAMED = 5  # clients that are left out


class _Record(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="strings",  # a run may diverge
    )


class RoundRecord(_Record):
    """One round of a run; a line of `rounds.jsonl`. Round 0 is the evaluation of the untrained model."""

    round_number: int
    participants: list[str] = Field(default_factory=list)
    """Clients whose update was used, in the order of the sum."""
    quarantined: dict[str, str] = Field(default_factory=dict)
    """Client -> why its update was not used."""
    set_aside: list[str] = Field(default_factory=list)
    """Clients that this round's quarantine was one too many for: they are asked no more in this run."""
    ended: list[str] = Field(default_factory=list)
    """Clients that were asked and take no further part: their budget or policy does not allow it."""
    late: list[str] = Field(default_factory=list)
    """Clients that were asked, but not waited for."""
    num_examples: int = 0
    """Training examples behind the updates used; 0 under privacy, which does not tell."""
    train: dict[str, float] = Field(default_factory=dict)
    """Mean loss over the participants' training examples, while the model changed; empty under privacy."""
    central: dict[str, float] = Field(default_factory=dict)
    """Loss and metrics on the central test set; empty if not evaluated in this round."""
    clients: dict[str, float] = Field(default_factory=dict)
    """Means over the clients' held-out examples, weighted by examples; empty if not evaluated in this round."""
    central_confusion: list[list[int]] = Field(default_factory=list)
    """(classes, classes) examples of the central test set by their class and by the predicted one; empty unless
    evaluation.metrics asks for a confusion-matrix."""
    clients_confusion: list[list[int]] = Field(default_factory=list)
    """Likewise of the clients' held-out examples, all together."""
    per_client: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Client -> its own held-out loss, metrics and num_examples; empty if not evaluated in this round."""
    bytes_up: int = 0
    """Serialised bytes of all replies of the round, evaluation included, clients to server."""
    bytes_down: int = 0
    """Serialised bytes of all instructions of the round, evaluation included, server to clients."""
    client_bytes: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Client -> bytes up and bytes down of the round, evaluation included; empty under client privacy."""
    update_norm: float = 0.0
    """L2 norm of the change of the global model."""
    drift: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Client -> cosine between its update and the mean of the round's updates, and its L2 norm over that of the mean;
    cosines are estimated from a sketch. Empty where evaluation.drift is off, and under client privacy."""
    diversity: float | None = None
    """Gradient diversity of the updates used, sum of |u|^2 over |sum of u|^2 (Yin et al. 2018): 1/n if all are equal,
    1 if all are orthogonal. None where drift is empty."""
    lr_factor: float = 1.0
    """Factor of the learning-rate schedule in this round, that of a plateau included."""
    result_round: int | None = None
    """In the round that ended a run with early stopping: the round whose model is the result. What is not watched
    (the clients' evaluation, or the central one) has measured that model here. None in all other records."""
    epsilon: float | None = None
    """Upper bound of epsilon spent up to and with this round, replays after a crash included; the largest over clients
    where each example is protected. None without privacy."""
    staleness: float = 0.0
    """Mean over the updates used of the rounds since the model they are based on; 0 but for asynchronous strategies."""
    virtual_seconds: float = 0.0
    """Length of the round on the virtual clock of clients.duration; 0 without one."""
    client_seconds: float = 0.0
    """Virtual seconds that the clients asked have worked in this round, waits not counted; 0 without a clock."""
    wasted_seconds: float = 0.0
    """The part of client_seconds whose update was not used: too late, dropped out, or one too many."""
    seconds_train: float = 0.0
    """Wall-clock seconds from the first instruction to the last update aggregated."""
    seconds_evaluate: float = 0.0
    """Wall-clock seconds of both evaluations."""
    finished_at: str = ""
    """UTC, ISO 8601."""


class Histogram(_Record):
    """Counts of numbers between edges, and what their mean and deviation need."""

    edges: list[float]
    """(bins + 1) ascending."""
    counts: list[int]
    """(bins)."""
    total: float
    """Sum of the numbers."""
    squares: float
    """Sum of their squares."""


class Heterogeneity(_Record):
    """Distances between the clients' label distributions and the pooled one, and how uneven the sizes are."""

    l1: float
    """Size-weighted mean over clients of sum_y |p_client(y) - p_pooled(y)|; 0 to 2."""
    hellinger: float
    """Size-weighted mean Hellinger distance; 0 to 1."""
    jensen_shannon: float
    """Size-weighted mean Jensen-Shannon divergence, in bits; 0 to 1."""
    labels_per_client: float
    """Mean number of labels that a client holds."""
    size_gini: float
    """Gini coefficient of the clients' sizes; 0 is equal, towards 1 is one client with everything."""


class DataSummary(_Record):
    """How the data lies on the clients, before splits; `data.json` in a run's folder."""

    source: str
    target: str
    """class, number or tokens."""
    num_clients: int
    num_examples: int
    num_central_test: int
    smallest_client: int
    median_client: float
    largest_client: int
    label_names: list[str]
    """Class names; for numeric targets the quantile bins they were counted in; empty for tokens."""
    shown_clients: list[str]
    """Clients in the label map: all, or an evenly spaced sample of at most 200."""
    label_counts: list[list[int]]
    """(shown clients, labels) examples."""
    shown_sizes: list[int]
    """(shown clients,) examples."""
    heterogeneity: Heterogeneity | None
    """None where targets are tokens."""
    left_out: dict[str, int] = {}
    """Natural clients that take no part, for they have fewer examples than data.partition.min_examples."""

    def told_left_out(self) -> str:
        """Name the clients that are left out, the first of many; "" if there are none."""
        if not self.left_out:
            return ""
        named = [f"{shorten(name, 40)} ({size:,})" for name, size in list(self.left_out.items())[:_MOST_NAMED]]
        more = len(self.left_out) - len(named)
        listed = ", ".join(named) + (f" and {more:,} more" if more else "")
        return f"Left out, with fewer examples than data.partition.min_examples: {listed}"


class PrivacySummary(_Record):
    """What a private run promises, as it was planned; `privacy.json` in a run's folder."""

    unit: Literal["sample", "client"]
    relation: str
    """Which data sets are neighbours."""
    delta: float
    accountant: Literal["prv", "rdp", "pld"]
    """Who proved the planned epsilon."""
    sampling: Literal["Poisson", "none"]
    planned_epsilon: float
    """At the end, if every round takes place."""
    noise_multiplier: tuple[float, float]
    """Least and most over clients."""
    sample_rate: tuple[float, float]
    """Least and most over clients."""
    steps: tuple[int, int]
    """Steps of one participation, least and most over clients; 1 where clients are protected."""
    participations: int
    """Rounds that the budget is calibrated for: of one client, or of the run."""
    clipping: str
    """What is clipped to which norm, in words."""
    seeded: bool
    """Whether the noise follows from a seed: NOT PRIVATE."""
    ledgers: str
    """Folder of the ledgers, "ledgers" for the run's own; empty where noise is seeded and nothing is protected."""


class Manifest(_Record):
    """Where, on what and with what a run was made; `manifest.json` in a run's folder."""

    fedtrain: str
    experiment_hash: str
    """SHA-256 of the resolved experiment without its name, its [run] section and compression.max_bytes."""
    own_files: dict[str, str] = Field(default_factory=dict)
    """The user's code and data files that the experiment names -> SHA-256 of their contents; folders -> their path."""
    created_at: str
    """When the run was started, to the microsecond: ledgers tell runs of one name apart by it."""
    status: str
    """running, interrupted, failed or complete."""
    base_folder: str = ""
    """The experiment file's folder, where a task of the user's own is looked for."""
    seed: int
    threads: int
    device: str
    workers: int
    versions: dict[str, str]
    """Package -> version: python, torch, flwr, numpy, pydantic, safetensors."""
    hardware: dict[str, str]
    """platform, processor, cores, memory, and gpu where there is one."""
    data_fingerprint: str
    """SHA-256 over all rows and the partition."""
    parameters: int
    """Parameters of the model that are trained."""
    model_sha256: str = ""
    """Of model.safetensors, once the run is complete."""
    result_round: int | None = None
    """The round of the model in model.safetensors, or the last one in its average; None before the run is complete."""
    ended: str = ""
    """Why the run was complete before all its rounds; empty if it was not."""
    resumed: int = 0
    """How often the run was resumed."""
