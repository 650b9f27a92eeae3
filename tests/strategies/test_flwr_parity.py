"""Three rounds beside flwr's own strategies, with their differences from the papers accounted for."""

from collections.abc import Callable

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flwr

from fedtrain.experiment.strategies import (
    FedAdagradStrategy,
    FedAdamStrategy,
    FedAvgMStrategy,
    FedYogiStrategy,
    QFedAvgStrategy,
)
from fedtrain.params import Params, add
from fedtrain.simulations.grid import InProcess, SimulationGrid
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.fedavgm import fedavgm
from fedtrain.strategies.fedopt import fedadagrad, fedadam, fedyogi
from fedtrain.strategies.qfedavg import qfedavg
from fedtrain.wire import Update

START = {"matrix": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "scalar": torch.tensor(0.25), "empty": torch.zeros(0)}
EXAMPLES, LOSSES = (1, 5, 3), (0.5, 2.0, 1.25)
LR, MOMENTUM, BETAS, TAU, Q = 0.3, 0.8, (0.7, 0.9), 0.01, 0.4


def updates(round_number: int) -> list[Update]:
    rng = torch.Generator().manual_seed(round_number)
    return [
        Update(
            client_id=str(examples),
            round_number=round_number,
            delta={name: torch.randn(t.shape, generator=rng) for name, t in START.items()},
            num_examples=examples,
            extra={"loss": torch.tensor(loss, dtype=torch.float64)},
        )
        for examples, loss in zip(EXAMPLES, LOSSES)
    ]


def ours(strategy: FederatedStrategy) -> list[Params]:
    algorithm = strategy.algorithm
    params, state, trajectory = START, algorithm.init(START), []
    for round_number in (1, 2, 3):
        params, state = algorithm.apply(state, params, iter(updates(round_number)))
        trajectory.append(params)
    return trajectory


def theirs(strategy: flwr.FedAvg, before_round: Callable[[int], None] = lambda _: None) -> list[Params]:
    """Let flwr aggregate the same clients, which return weights instead of deltas."""
    grid = SimulationGrid(InProcess(ClientApp(), []), num_clients=len(EXAMPLES))
    arrays, trajectory = ArrayRecord(dict(START)), []
    for round_number in (1, 2, 3):
        before_round(round_number)
        current = arrays.to_torch_state_dict()
        asked = strategy.configure_train(round_number, arrays, ConfigRecord(), grid)
        replies = []
        for update, message in zip(updates(round_number), asked, strict=True):
            metrics = MetricRecord({"num-examples": update.num_examples, "train_loss": update.extra["loss"].item()})
            content = RecordDict({"arrays": ArrayRecord(add(current, update.delta)), "metrics": metrics})
            replies.append(Message(content, reply_to=message))
        aggregated, _ = strategy.aggregate_train(round_number, replies)
        assert aggregated is not None
        arrays = aggregated
        trajectory.append(arrays.to_torch_state_dict())
    return trajectory


def agree(one: list[Params], other: list[Params]) -> bool:
    return all(
        torch.allclose(a[name].double(), b[name].double(), rtol=0, atol=1e-6)
        for a, b in zip(one, other, strict=True)
        for name in START
    )


def start_v_at_tau_squared(strategy: flwr.FedAdagrad | flwr.FedAdam | flwr.FedYogi) -> None:
    """As in the paper; flwr starts it at 0."""
    strategy.v_t = {name: np.full(t.shape, TAU**2, np.float32) for name, t in START.items()}


def test_fedavg() -> None:
    assert agree(ours(fedavg()), theirs(flwr.FedAvg()))


def test_fedavgm() -> None:
    own = fedavgm(FedAvgMStrategy(name="fedavgm", server_lr=LR, momentum=MOMENTUM))
    assert agree(ours(own), theirs(flwr.FedAvgM(server_learning_rate=LR, server_momentum=MOMENTUM)))


def test_fedadagrad_but_for_the_start_of_v() -> None:
    own = fedadagrad(FedAdagradStrategy(name="fedadagrad", server_lr=LR, tau=TAU))
    other, adjusted = (flwr.FedAdagrad(eta=LR, tau=TAU) for _ in range(2))
    start_v_at_tau_squared(adjusted)
    assert agree(ours(own), theirs(adjusted))
    assert not agree(ours(own), theirs(other))


def test_fedyogi_but_for_the_start_of_v() -> None:
    own = fedyogi(FedYogiStrategy(name="fedyogi", server_lr=LR, betas=BETAS, tau=TAU))
    other, adjusted = (flwr.FedYogi(eta=LR, beta_1=BETAS[0], beta_2=BETAS[1], tau=TAU) for _ in range(2))
    start_v_at_tau_squared(adjusted)
    assert agree(ours(own), theirs(adjusted))
    assert not agree(ours(own), theirs(other))


def test_fedadam_but_for_the_start_of_v_and_the_corrected_learning_rate() -> None:
    own = fedadam(FedAdamStrategy(name="fedadam", server_lr=LR, betas=BETAS, tau=TAU))
    other, adjusted = (flwr.FedAdam(eta=LR, beta_1=BETAS[0], beta_2=BETAS[1], tau=TAU) for _ in range(2))
    start_v_at_tau_squared(adjusted)

    def take_back_the_correction(round_number: int) -> None:
        power = round_number + 1  # flwr counts one too many
        adjusted.eta = LR * (1 - BETAS[0] ** power) / np.sqrt(1 - BETAS[1] ** power)

    assert agree(ours(own), theirs(adjusted, take_back_the_correction))
    assert not agree(ours(own), theirs(other))


def test_qfedavg() -> None:
    own = qfedavg(QFedAvgStrategy(name="qfedavg", q=Q), LR)
    assert agree(ours(own), theirs(flwr.QFedAvg(client_learning_rate=LR, q=Q)))
