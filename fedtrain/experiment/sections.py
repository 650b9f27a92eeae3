"""The sections of an experiment file, one pydantic model each; every field says its meaning and unit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedtrain.experiment.base import Section, tag_defaults_to
from fedtrain.experiment.clients import ClientsSection
from fedtrain.experiment.gate import GateSection
from fedtrain.experiment.partitions import IidPartition, PartitionSection
from fedtrain.experiment.privacy import ClientPrivacy, PrivacySection, SamplePrivacy
from fedtrain.experiment.strategies import FedAvgStrategy, FedBuffStrategy, StrategySection

__all__ = [
    "AdamSection",
    "DataSection",
    "EvaluationSection",
    "Experiment",
    "GivenScaling",
    "PersonalizationSection",
    "RunSection",
    "ScheduleSection",
    "SgdSection",
    "TaskSection",
    "TrainingSection",
]

# Repeated here, for editors, because the registries import torch; a test compares them.
_TASKS = ["logistic", "mlp", "cnn", "simple-cnn", "resnet18-gn", "char-lstm", "transformer", "regressor"]
_SOURCES = ["digits", "breast-cancer", "mnist", "fashion-mnist"]
_SOURCES += ["heart-disease", "wisdm", "parkinsons", "adult", "shakespeare", "fcube"]


class TaskSection(Section):
    """What is learned: the model, its loss and its metrics."""

    name: str = Field(default="mlp", examples=_TASKS)
    """A built-in task, or your own as "package.module:Class" or "file.py:Class"."""

    options: dict[str, Any] = {}
    """Keyword arguments of the task, such as { hidden = 64 }."""


class GivenScaling(Section):
    """Feature scaling by given numbers: (x - mean) / std, the same on every client and in deployment."""

    mean: list[float] = Field(min_length=1)
    """One per feature, or a single one for all."""
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """One per feature, or a single one for all."""


class DataSection(Section):
    """Which data, how it is prepared and how it is spread over clients."""

    name: str | None = Field(default=None, examples=_SOURCES)
    """A built-in source, or your own loader as "package.module:function" or "file.py:function". Or give `path`."""

    path: str | None = Field(default=None, examples=["table.csv"])
    """Your own data: a .csv, .parquet or .npz file, or a folder with one sub-folder of images per class.
    Relative to the experiment file."""

    target: str | None = Field(default=None, examples=["label"])
    """Column (CSV, Parquet) or array (NPZ) to predict; for a built-in source, a target other than its own."""

    target_type: Literal["auto", "class", "number"] = "auto"
    """Predict a class or a number; auto: numbers with a fraction are numbers, all else are classes."""

    classes: list[str] = Field(default=[], examples=[["no", "yes"]])
    """All classes, in order; needed in a deployment where a client may not have examples of each."""

    client_column: str | None = Field(default=None, examples=["hospital"])
    """Column (CSV, Parquet) or array (NPZ) that names each row's client, for the partition "natural"."""

    drop: list[str] = []
    """Columns to leave out."""

    options: dict[str, Any] = {}
    """Keyword arguments of the source or loader, such as { window = 80 }."""

    clients: int | None = Field(default=None, ge=1, le=10_000_000, examples=[10])
    """Number of clients to spread the examples over; leave out for the partition "natural"."""

    partition: PartitionSection = IidPartition()
    """How examples are spread over clients."""

    missing: Literal["mean", "median", "zero", "drop"] = "mean"
    """Missing features: filled with the client's own training mean or median, or zero; or drop such rows."""

    scaling: Literal["none", "client", "pooled"] | GivenScaling = "none"
    """Feature scaling to mean 0, deviation 1: fitted on each client's training rows, on all of them, or given."""

    validation: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of each client's examples held out for validation, stratified by class."""

    test: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of each client's examples held out for its own test, stratified by class."""

    central_test: float = Field(default=0.0, ge=0, lt=1)
    """Fraction set apart before partitioning as the central test set, where the source has none of its own.
    If 0, the clients' test examples together serve."""

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        if (self.name is None) == (self.path is None):
            raise ValueError("give either name (a built-in source or a loader) or path (your own file)")
        if self.path is not None and self.target is None and "." in self.path.rsplit("/", 1)[-1]:
            raise ValueError("a file needs target, the column or array to predict")
        natural = self.partition.kind == "natural"
        if natural and self.clients is not None:
            raise ValueError('the partition "natural" brings its own clients: leave out clients')
        if not natural and self.clients is None:
            raise ValueError('say over how many clients to spread the examples, or use the partition "natural"')
        if self.partition.kind == "fcube" and self.clients != 4:
            raise ValueError('the partition "fcube" is made for clients = 4')
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must stay below 1: nothing would be left to train on")
        return self


class SgdSection(Section):
    """Stochastic gradient descent, as torch.optim.SGD."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    """Learning rate."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum; the buffer starts at zero in each round."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty added to the gradient."""

    @model_validator(mode="after")
    def _consistent(self) -> SgdSection:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum greater than 0")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether a step is the learning rate times the gradient, and nothing else."""
        return self.momentum == 0 and self.weight_decay == 0


_Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamSection(Section):
    """Adam or AdamW, as in torch.optim; the moments start at zero in each round."""

    name: Literal["adam", "adamw"]
    lr: float = Field(default=0.001, gt=0)
    """Learning rate."""
    betas: tuple[_Beta, _Beta] = Field(default=(0.9, 0.999), strict=False)  # a TOML list is not strictly a tuple
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty (adam) or decoupled decay (adamw)."""


class ScheduleSection(Section):
    """Learning rate over rounds, as a factor of the optimiser's lr."""

    name: Literal["constant", "cosine"] = "constant"
    """constant, or cosine: falls towards final_factor, which it would reach one round after the last."""
    warmup_rounds: int = Field(default=0, ge=0)
    """Rounds over which the rate first rises linearly to its full value."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """Factor at which a cosine schedule ends; the last round is still above it."""


class TrainingSection(Section):
    """What a client does in a round."""

    local_epochs: int | None = Field(default=None, ge=1, examples=[1])
    """Passes over the client's training examples per round; 1 unless local_steps is given."""
    local_steps: int | None = Field(default=None, ge=1, examples=[100])
    """Optimiser steps per round, in place of local_epochs; passes are repeated as needed."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per step; the last batch of a pass may be smaller."""
    optimizer: Annotated[SgdSection | AdamSection, Field(discriminator="name"), tag_defaults_to("name", "sgd")] = (
        SgdSection()
    )
    """Local optimiser."""
    schedule: ScheduleSection = ScheduleSection()
    """Learning rate over rounds."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: the model computes its loss in mixed precision (torch.autocast); parameters, updates and measurements
    stay in float32."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSection:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("local_epochs and local_steps contradict each other: give one")
        return self

    def steps_for(self, size: int, work: float = 1.0) -> int:
        """Count the optimiser steps of a client's round.

        Args:
            size: examples in the client's training set, at least 1.
            work: share of the steps that there is time for; at least one is taken.
        """
        per_pass = -(-size // min(self.batch_size, size))
        whole = self.local_steps or per_pass * (self.local_epochs or 1)
        return max(1, int(whole * work + 1e-9))


class PersonalizationSection(Section):
    """What each client has for itself."""

    private: list[str] = Field(default=[], examples=[["fc2.*"], ["*norm*"]])
    """Parameters that stay on the client, by name or pattern: a head of its own (FedPer, Arivazhagan et al. 2019),
    normalisation layers of its own (FedBN, Li et al. 2021)."""

    fine_tune_epochs: int = Field(default=0, ge=0)
    """After the last round each client that evaluates trains the final model on its own examples for so many passes."""


class EvaluationSection(Section):
    """When the model is measured, and on whose examples."""

    central_every: int = Field(default=1, ge=0)
    """Rounds between evaluations on the central test set; 0: only after the last round."""
    clients_every: int = Field(default=0, ge=0)
    """Rounds between evaluations on the clients' held-out examples; 0: only after the last round."""
    max_clients: int = Field(default=100, ge=0)
    """Most clients asked to evaluate (a fixed random sample of them); 0: none."""
    batch_size: int = Field(default=1000, ge=1)
    """Examples per forward pass."""
    target_metric: str | None = Field(default=None, examples=["accuracy"])
    """Central metric with a goal, such as "accuracy"; the summary then names the first round that reached it."""
    target_value: float | None = Field(default=None, examples=[0.9])
    """The goal: reached from below for accuracy and r2, from above for losses and errors."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationSection:
        if (self.target_metric is None) != (self.target_value is None):
            raise ValueError("target_metric and target_value go together: give both or none")
        return self


class RunSection(Section):
    """How the run is carried out. Not part of the run's identity: a run may be resumed with other values."""

    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Worker processes of a simulation; 0: train in the main process; auto: one per core if there are two or more."""
    threads: int = Field(default=1, ge=1)
    """Intra-op threads of torch in each process. Results are equal by the byte for equal threads."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", examples=["auto", "cpu", "cuda:1"])
    """auto (CUDA where there is one), cpu, cuda or cuda:1. Results are equal by the byte on cpu."""
    checkpoint_seconds: float = Field(default=10.0, ge=0)
    """Least time between checkpoints in seconds; 0: after every round. There is always one at the end and at Ctrl-C."""
    policy: str | None = Field(default=None, examples=["policy.toml"])
    """Policy file that the simulated clients obey (under client privacy: the server), relative to this file."""
    ledgers: str | None = Field(default=None, examples=["../ledgers"])
    """Folder of the privacy ledgers, relative to this file; the run's own unless given. Runs that share one add up."""
    data_root: str | None = Field(default=None, examples=["../data"])
    """Folder of the built-in data sets, relative to this file; --data-root and FEDTRAIN_DATA come first."""


class Experiment(Section):
    """A federated experiment, whole."""

    name: str = Field(default="experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run's folder; the file's own name unless given. Letters, digits, dot, dash and underscore."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of every random stream: same file, same seed, same bytes."""
    rounds: int = Field(default=10, ge=1, le=1_000_000)
    """Rounds to train."""
    task: TaskSection = TaskSection()
    """What is learned."""
    data: DataSection
    """Which data, on whose side."""
    clients: ClientsSection = ClientsSection()
    """Who takes part in a round."""
    training: TrainingSection = TrainingSection()
    """What a client does in a round."""
    strategy: StrategySection = FedAvgStrategy()
    """How the server turns updates into the next model; your own as name = "file.py:function"."""
    personalization: PersonalizationSection = PersonalizationSection()
    """What each client has for itself."""
    privacy: PrivacySection | None = None
    """Whose privacy is protected, and how; leave out for none."""
    gate: GateSection = GateSection()
    """Which updates may touch the model."""
    evaluation: EvaluationSection = EvaluationSection()
    """When the model is measured."""
    run: RunSection = RunSection()
    """How the run is carried out."""

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        asked, there = self.clients.per_round, self.data.clients
        if asked is not None and there is not None and asked > there:
            raise ValueError(f"clients.per_round = {asked} asks for more than the data.clients = {there} there are")
        if self.personalization.private and self.evaluation.target_metric:
            raise ValueError(
                "evaluation.target_metric is of the central test set, for which personalization.private leaves the "
                "server no whole model"
            )
        self._check_strategy()
        if self.privacy is not None:
            self._check_privacy(self.privacy)
        return self

    def _check_privacy(self, privacy: SamplePrivacy | ClientPrivacy) -> None:
        strategy, sampling, scaling = self.strategy, self.clients.sampling, self.data.scaling
        told = "which privacy does not let out"
        if self.evaluation.clients_every:
            raise ValueError(f"evaluation.clients_every asks for measurements on the clients' examples, {told}")
        if self.personalization.fine_tune_epochs:
            raise ValueError(f"personalization.fine_tune_epochs serves measurements on the clients' examples, {told}")
        if strategy.needs_measurements:
            raise ValueError(f'strategy.name = "{strategy.name}" needs to know of the clients\' examples, {told}')
        if sampling in ("by-size", "power-of-choice"):
            raise ValueError(f'clients.sampling = "{sampling}" goes by sizes or losses, {told}')
        if scaling == "pooled" or (scaling == "client" and privacy.unit == "sample"):
            raise ValueError(
                f'data.scaling = "{scaling}" is fitted on the examples and would tell of them without noise; '
                "give numbers that are known anyway: scaling = { mean = [...], std = [...] }"
            )
        if privacy.unit == "sample":
            if self.training.precision != "float32":
                raise ValueError(
                    f'training.precision = "{self.training.precision}" rounds the gradients whose norms are bounded; '
                    'privacy.unit = "sample" needs "float32"'
                )
            if self.data.test or self.data.validation:
                raise ValueError(
                    "data.test and data.validation hold out examples by a draw that one more example would change; "
                    "privacy measures on data.central_test"
                )
            return
        if not strategy.steps_along_a_mean:
            raise ValueError(
                f'strategy.name = "{strategy.name}" needs every single update, and privacy.unit = "client" leaves '
                "it their noised mean; take fedavg, fedavgm, fedprox or one of the fedopt family"
            )
        if sampling != "poisson" and self.clients.per_round is not None:
            raise ValueError('privacy.unit = "client" counts on a coin for each client: clients.sampling = "poisson"')

    def _check_strategy(self) -> None:
        strategy, optimizer = self.strategy, self.training.optimizer
        if strategy.needs_sgd and not isinstance(optimizer, SgdSection):
            raise ValueError(f'strategy.name = "{strategy.name}" needs training.optimizer.name = "sgd"')
        if strategy.needs_plain_sgd and not (isinstance(optimizer, SgdSection) and optimizer.is_plain):
            raise ValueError(
                f'strategy.name = "{strategy.name}" needs training.optimizer = sgd, without momentum and weight_decay'
            )
        wanted = self.clients.per_round or self.data.clients
        if wanted is not None and wanted < strategy.least_updates:
            raise ValueError(
                f'strategy.name = "{strategy.name}" needs {strategy.least_updates} updates a round, more than '
                f"{'clients.per_round' if self.clients.per_round else 'data.clients'} = {wanted}; "
                "lower strategy.byzantine, or ask more clients"
            )
        if isinstance(strategy, FedBuffStrategy):
            if self.clients.per_round is not None:
                raise ValueError(
                    'strategy.name = "fedbuff" draws clients by its max_in_flight: leave out clients.per_round'
                )
            if self.clients.sampling not in ("uniform", "by-size"):
                raise ValueError('strategy.name = "fedbuff" needs clients.sampling = "uniform" or "by-size"')
            if self.data.clients is not None and strategy.buffer_size > self.data.clients:
                raise ValueError(
                    f"strategy.buffer_size = {strategy.buffer_size} can never fill with data.clients = "
                    f"{self.data.clients}: a client trains on one model at most once"
                )
            if self.clients.deadline is not None:
                raise ValueError('strategy.name = "fedbuff" waits for nobody: leave out clients.deadline')
        if strategy.name == "ditto" and self.personalization.fine_tune_epochs:
            raise ValueError(
                'strategy.name = "ditto" trains personal models already: leave out personalization.fine_tune_epochs'
            )
