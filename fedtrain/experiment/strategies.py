"""How the server turns updates into the next model: the kinds of `[strategy]`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from fedtrain.experiment.base import Section, tag_defaults_to

__all__ = [
    "BulyanStrategy",
    "CenteredClippingStrategy",
    "DittoStrategy",
    "FedAdagradStrategy",
    "FedAdamStrategy",
    "FedAvgMStrategy",
    "FedAvgStrategy",
    "FedBuffStrategy",
    "FedDynStrategy",
    "FedNovaStrategy",
    "FedOptStrategy",
    "FedProxStrategy",
    "FedYogiStrategy",
    "GeometricMedianStrategy",
    "KrumStrategy",
    "MedianStrategy",
    "MultiKrumStrategy",
    "NormBoundingStrategy",
    "OwnStrategy",
    "QFedAvgStrategy",
    "ScaffoldStrategy",
    "StrategySection",
    "TrimmedMeanStrategy",
]

_Positive = Annotated[float, Field(gt=0)]
_Decay = Annotated[float, Field(ge=0, lt=1)]


class _Strategy(Section):
    needs_plain_sgd: ClassVar[bool] = False  # its mathematics holds for SGD without momentum and weight decay
    needs_sgd: ClassVar[bool] = False
    steps_along_a_mean: ClassVar[bool] = False  # one mean of all updates is all that its server half needs
    needs_measurements: ClassVar[bool] = False  # its clients tell how many examples or which loss they have

    @property
    def least_updates(self) -> int:
        """Fewest updates of a round that the mathematics can do with."""
        return 1


class FedAvgStrategy(_Strategy):
    """Mean of the updates, weighted by examples (McMahan et al. 2017)."""

    steps_along_a_mean: ClassVar[bool] = True

    name: Literal["fedavg"] = "fedavg"


class FedAvgMStrategy(_Strategy):
    """FedAvg with momentum on the server (Hsu et al. 2019)."""

    steps_along_a_mean: ClassVar[bool] = True

    name: Literal["fedavgm"]
    server_lr: _Positive = 1.0
    """Learning rate of the server."""
    momentum: _Decay = 0.9
    """Momentum of the server."""


class FedAdagradStrategy(_Strategy):
    """Adagrad on the server (Reddi et al. 2021)."""

    steps_along_a_mean: ClassVar[bool] = True

    name: Literal["fedadagrad"]
    server_lr: _Positive = 0.1
    """Learning rate of the server."""
    tau: _Positive = 1e-3
    """Degree of adaptivity: added to the denominator; its square is where the second moment starts."""


class _Adaptive(_Strategy):
    steps_along_a_mean: ClassVar[bool] = True
    name: str  # declared here so that it is the first key
    server_lr: _Positive = 0.1
    """Learning rate of the server."""
    betas: tuple[_Decay, _Decay] = Field(default=(0.9, 0.99), strict=False)  # a TOML list is not strictly a tuple
    """Decay of the first and second moment."""
    tau: _Positive = 1e-3
    """Degree of adaptivity: added to the denominator; its square is where the second moment starts."""


class FedAdamStrategy(_Adaptive):
    """Adam on the server (Reddi et al. 2021)."""

    name: Literal["fedadam"]


class FedYogiStrategy(_Adaptive):
    """Yogi on the server (Reddi et al. 2021)."""

    name: Literal["fedyogi"]


class FedOptStrategy(_Strategy):
    """Any optimiser of torch.optim on the server, stepping along the mean update (Reddi et al. 2021)."""

    steps_along_a_mean: ClassVar[bool] = True

    name: Literal["fedopt"]
    optimizer: str = Field(examples=["SGD", "AdamW", "RMSprop"])
    """A class of torch.optim, such as "AdamW"."""
    options: dict[str, Any] = {}
    """Keyword arguments of the optimiser, such as { lr = 0.1 }."""


class FedProxStrategy(_Strategy):
    """FedAvg with a pull of local training towards the server's model (Li et al. 2020)."""

    steps_along_a_mean: ClassVar[bool] = True

    name: Literal["fedprox"]
    mu: float = Field(default=0.01, ge=0)
    """Strength of the pull: mu / 2 times the squared distance is added to the loss."""


class ScaffoldStrategy(_Strategy):
    """Control variates against client drift (Karimireddy et al. 2020)."""

    name: Literal["scaffold"]
    needs_plain_sgd: ClassVar[bool] = True
    server_lr: _Positive = 1.0
    """Learning rate of the server."""


class FedNovaStrategy(_Strategy):
    """Updates normalised by the local steps behind them (Wang et al. 2020)."""

    needs_measurements: ClassVar[bool] = True

    name: Literal["fednova"]
    needs_sgd: ClassVar[bool] = True


class FedDynStrategy(_Strategy):
    """A dynamic regulariser on each client (Acar et al. 2021)."""

    name: Literal["feddyn"]
    alpha: _Positive = 0.01
    """Strength of the regulariser."""


class QFedAvgStrategy(_Strategy):
    """Clients with a higher loss weigh more: fairer accuracies (Li et al. 2020)."""

    needs_measurements: ClassVar[bool] = True

    name: Literal["qfedavg"]
    needs_sgd: ClassVar[bool] = True
    q: float = Field(default=0.1, ge=0)
    """Fairness: 0 is an unweighted FedAvg, larger is fairer."""


class MedianStrategy(_Strategy):
    """Median of the updates, coordinate by coordinate (Yin et al. 2018)."""

    name: Literal["median"]


class TrimmedMeanStrategy(_Strategy):
    """Mean of the updates, coordinate by coordinate, without the extremes (Yin et al. 2018)."""

    name: Literal["trimmed-mean"]
    trim: float = Field(default=0.2, ge=0, lt=0.5)
    """Fraction of the updates cut off at either end."""


class _Krum(_Strategy):
    name: str  # declared here so that it is the first key
    byzantine: int = Field(default=1, ge=0)
    """f, the most clients of a round that may be malicious."""

    @property
    def least_updates(self) -> int:
        return 2 * self.byzantine + 3


class KrumStrategy(_Krum):
    """The one update that is nearest to its neighbours (Blanchard et al. 2017); needs 2f + 3 updates."""

    name: Literal["krum"]


class MultiKrumStrategy(_Krum):
    """Mean of the updates that are nearest to their neighbours (Blanchard et al. 2017); needs 2f + 3 updates."""

    name: Literal["multi-krum"]
    keep: int | None = Field(default=None, ge=1, examples=[5])
    """m, the number of updates to average; n - f unless given."""

    @property
    def least_updates(self) -> int:
        return max(super().least_updates, self.keep or 1)


class BulyanStrategy(_Krum):
    """Krum's selection, then a trimmed mean around the median (El Mhamdi et al. 2018); needs 4f + 3 updates."""

    name: Literal["bulyan"]

    @property
    def least_updates(self) -> int:
        return 4 * self.byzantine + 3


class GeometricMedianStrategy(_Strategy):
    """The point with the least sum of distances to the updates: RFA (Pillutla et al. 2022)."""

    name: Literal["geometric-median"]
    iterations: int = Field(default=10, ge=1)
    """Most steps of the smoothed Weiszfeld algorithm."""
    smoothing: _Positive = 1e-6
    """Least distance that counts, nu: keeps the weights finite."""


class CenteredClippingStrategy(_Strategy):
    """Mean of the updates, each clipped around the last result (Karimireddy et al. 2021)."""

    name: Literal["centered-clipping"]
    radius: _Positive = 10.0
    """tau, the largest distance from the centre at which an update still counts whole."""


class NormBoundingStrategy(_Strategy):
    """Mean of the updates, each clipped to a norm (Sun et al. 2019)."""

    name: Literal["norm-bounding"]
    max_norm: _Positive = 1.0
    """L2 norm to which longer updates are scaled down."""


class DittoStrategy(_Strategy):
    """FedAvg, and beside it a personal model on each client, pulled towards the global one (Li et al. 2021)."""

    needs_measurements: ClassVar[bool] = True

    name: Literal["ditto"]
    mu: float = Field(default=0.1, ge=0)
    """lambda, the strength of the pull: mu / 2 times the squared distance is added to the personal loss."""


class FedBuffStrategy(_Strategy):
    """Asynchronous: a step of the server for each full buffer of updates (Nguyen et al. 2022)."""

    name: Literal["fedbuff"]
    buffer_size: int = Field(default=10, ge=1)
    """K, the updates that make a step of the server: a round."""
    max_in_flight: int = Field(default=20, ge=1)
    """M_c, the clients that train at any time."""
    staleness_exponent: float = Field(default=0.5, ge=0)
    """a: an update based on a model that is t steps old weighs (1 + t)^-a."""
    server_lr: _Positive = 1.0
    """Learning rate of the server."""


class OwnStrategy(_Strategy):
    """Your own strategy, or any flwr Strategy, by import path or file."""

    steps_along_a_mean: ClassVar[bool] = True  # it may not, but then it is useless rather than unsafe

    name: Literal["own"]
    path: str = Field(pattern=":", examples=["flwr.serverapp.strategy:FedTrimmedAvg", "own_strategy.py:build"])
    """"package.module:Name" or "file.py:Name"; as a shorthand it may stand in `name` itself."""
    options: dict[str, Any] = {}
    """Keyword arguments of the strategy, such as { beta = 0.3 }."""


def _own_by_path(value: Any) -> Any:
    """Read `name = "file.py:build"` as the longer `name = "own", path = "file.py:build"`; no built-in has a dot."""
    is_path = isinstance(value, dict) and isinstance(value.get("name"), str) and set(":.") & set(value["name"])
    if is_path and "path" not in value:
        return {**value, "name": "own", "path": value["name"]}
    return value


StrategySection = Annotated[
    FedAvgStrategy
    | FedAvgMStrategy
    | FedAdagradStrategy
    | FedAdamStrategy
    | FedYogiStrategy
    | FedOptStrategy
    | FedProxStrategy
    | ScaffoldStrategy
    | FedNovaStrategy
    | FedDynStrategy
    | QFedAvgStrategy
    | MedianStrategy
    | TrimmedMeanStrategy
    | KrumStrategy
    | MultiKrumStrategy
    | BulyanStrategy
    | GeometricMedianStrategy
    | CenteredClippingStrategy
    | NormBoundingStrategy
    | DittoStrategy
    | FedBuffStrategy
    | OwnStrategy,
    Field(discriminator="name"),
    tag_defaults_to("name", "fedavg"),
    BeforeValidator(_own_by_path),
]
