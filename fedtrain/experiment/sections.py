"""The sections of an experiment file, one pydantic model each; every field says its meaning and unit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedtrain.experiment import augment, compute, evaluation, losses, model, optimizers, stopping
from fedtrain.experiment.base import Section
from fedtrain.experiment.clients import ClientsSection
from fedtrain.experiment.compression import CompressionSection
from fedtrain.experiment.evaluation import EvaluationSection
from fedtrain.experiment.gate import GateSection
from fedtrain.experiment.model import ModelSection
from fedtrain.experiment.optimizers import SgdSection
from fedtrain.experiment.partitions import IidPartition, PartitionSection
from fedtrain.experiment.privacy import ClientPrivacy, PrivacySection, SamplePrivacy
from fedtrain.experiment.strategies import FedAvgStrategy, FedBuffStrategy, StrategySection
from fedtrain.experiment.training import TrainingSection

__all__ = [
    "DataSection",
    "Experiment",
    "FoldSection",
    "GivenScaling",
    "PersonalizationSection",
    "RunSection",
    "TaskSection",
]

# Repeated here, for editors, because the registries import torch; a test compares them.
_TASKS = ["logistic", "mlp", "cnn", "simple-cnn", "resnet18-gn", "char-lstm", "transformer", "regressor"]
_TASKS += ["multi-label", "multi-task", "pseudo-label", "contrastive", "probe", "autoencoder", "vae", "kmeans"]
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


class FoldSection(Section):
    """One fold of a cross-validation: each client's rows fall into so many equal parts, stratified by class."""

    number: int = Field(ge=1)
    """The part that is each client's test set, from 1."""
    of: int = Field(ge=2, le=1000)
    """Number of parts."""

    @model_validator(mode="after")
    def _consistent(self) -> FoldSection:
        if self.number > self.of:
            raise ValueError(f"there is no fold {self.number} of {self.of}")
        return self


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
    """Predict a class or a number; auto: fractions are numbers, few whole numbers and texts are classes."""

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

    fold: FoldSection | None = Field(default=None, examples=[{"number": 1, "of": 5}])
    """Hold out one part of each client's rows in place of `test`: `fedtrain crossval` runs all of them."""

    held_out: list[str] = Field(default=[], examples=[["hospital-3"]])
    """Clients that never train: all their rows are test examples. `fedtrain crossval --leave-one-out` takes each."""

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
        if self.fold is not None and self.test:
            raise ValueError(
                "fold and test contradict each other, for each says which rows are held out: set data.test = 0.0"
            )
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must stay below 1: nothing would be left to train on")
        return self

    @property
    def tests_clients(self) -> bool:
        """Whether clients hold examples out to be tested on."""
        return self.test > 0 or self.fold is not None or bool(self.held_out)


class PersonalizationSection(Section):
    """What each client has for itself."""

    private: list[str] = Field(default=[], examples=[["fc2.*"], ["*norm*"]])
    """Parameters that stay on the client, by name or pattern: a head of its own (FedPer, Arivazhagan et al. 2019),
    normalisation layers of its own (FedBN, Li et al. 2021)."""

    fine_tune_epochs: int = Field(default=0, ge=0)
    """After the last round each client that evaluates trains the final model on its own examples for so many passes."""


class RunSection(Section):
    """How the run is carried out. Not part of the run's identity: a run may be resumed with other values."""

    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Worker processes of a simulation; 0: train in the main process; auto: one per core if there are two or more."""
    threads: int = Field(default=1, ge=1)
    """Intra-op threads of torch in each process. Results are equal by the byte for equal threads."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", examples=["auto", "cpu", "cuda:1"])
    """auto (CUDA where there is one), cpu, cuda or cuda:1. Results are equal by the byte on cpu."""
    gpus: int = Field(default=1, ge=1, le=64)
    """Devices that share each batch of a client, from `device` on: processes on one machine, over NCCL. On cpu they are
    processes over Gloo, to try it out."""
    deterministic: bool = False
    """Use torch's deterministic algorithms alone, for results that repeat on one GPU model; slower. A layer that has
    none is an error."""
    trackers: Literal["auto"] | list[Literal["tensorboard", "wandb", "mlflow"]] = "auto"
    """Trackers fed with the records: tensorboard, wandb, mlflow; auto: tensorboard where it is installed."""
    histograms_every: int = Field(default=0, ge=0)
    """Rounds between histograms of weights, their changes and activations, which TensorBoard and W&B show; 0: none."""
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
    model: ModelSection = ModelSection()
    """How the task's model starts, and which of its parameters are trained."""
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
    compression: CompressionSection = CompressionSection()
    """How parameters and updates are compressed on their way."""
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
        for part in (model, optimizers, losses, augment, compute, stopping, evaluation):
            for objection in part.objections(self):
                raise ValueError(objection)
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
            if self.data.tests_clients or self.data.validation:
                raise ValueError(
                    "data.test, data.fold, data.held_out and data.validation hold out examples by a draw that one more "
                    "example would change; privacy measures on data.central_test"
                )
            return
        if self.compression.max_bytes is not None:
            raise ValueError(
                f"compression.max_bytes ends a run by how many clients take part and what they send, {told}"
            )
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
            if self.compression.up_of == "full":
                raise ValueError(
                    'strategy.name = "fedbuff" uses updates of older models, and compression.up_of = "full" does not '
                    'say what has changed: take "delta"'
                )
            if self.clients.deadline is not None:
                raise ValueError('strategy.name = "fedbuff" waits for nobody: leave out clients.deadline')
        if strategy.name == "ditto" and self.personalization.fine_tune_epochs:
            raise ValueError(
                'strategy.name = "ditto" trains personal models already: leave out personalization.fine_tune_epochs'
            )
