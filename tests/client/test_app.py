from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedtrain import flower, wire
from fedtrain.client.app import CLIENT_ID, Site, make_client_app
from fedtrain.client.state import ClientState
from fedtrain.data.base import ClientData, DataSpec, Examples
from fedtrain.experiment.sections import Experiment
from fedtrain.tasks.base import Metric

ROUNDS = 4
EXPERIMENT = Experiment.model_validate(
    {
        "rounds": ROUNDS,
        "data": {"name": "digits", "clients": 2},
        "training": {"optimizer": {"lr": 0.1}, "schedule": {"warmup_rounds": 2}},
    }
)


class Slope(nn.Module):
    """`w * x`, plus the number of forward passes so far, which no client should see of another."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("passes", torch.tensor(0), persistent=False)
        self.passes: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        return self.w * inputs + self.passes - 1


class Squares:
    def model(self) -> nn.Module:
        return Slope()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) ** 2

    def metrics(self) -> Mapping[str, Metric]:
        return {"error": lambda outputs, targets: (outputs - targets).abs()}


def examples(*inputs: float) -> Examples:
    """Whose target is 0."""
    return Examples(torch.tensor(inputs), torch.zeros(len(inputs)))


class TwoClinics:
    """One with a test example, and one without."""

    spec = DataSpec((), "number")
    clinics: Mapping[str, ClientData] = {
        "a": ClientData(examples(1.0), examples(), examples(2.0, 4.0)),
        "b": ClientData(examples(3.0, 3.0), examples(), examples()),
    }

    def client_ids(self) -> Sequence[str]:
        return list(self.clinics)

    def client(self, client_id: str) -> ClientData:
        return self.clinics[client_id]

    def sizes(self) -> npt.NDArray[np.int64]:
        return np.array([1, 2])

    def central_test(self) -> Examples:
        return examples()

    def fingerprint(self) -> str:
        return ""


def site(folder: Path) -> Site:
    return Site(folder, ClientState(folder / "clients"), torch.device("cpu"))


@pytest.fixture
def app(tmp_path: Path) -> ClientApp:
    return make_client_app(EXPERIMENT, Squares(), TwoClinics(), site(tmp_path))


def ask(app: ClientApp, kind: str, client_id: str, round_number: int = 2) -> RecordDict:
    """Ask a client for something about w = 1."""
    flower.enter_run(1)
    arrays = flower.array_record({"w": torch.tensor(1.0)})
    message = Message(wire.instruction_content(arrays, round_number), 1, kind)
    return app(message, Context(1, 1, {CLIENT_ID: client_id}, RecordDict(), {})).content


def test_an_update_is_of_the_clients_own_examples(app: ClientApp) -> None:
    update = wire.update(ask(app, "train", "b"))
    assert (update.client_id, update.round_number, update.num_examples) == ("b", 2, 2)
    assert update.metrics == {"loss": 9.0}
    assert update.delta["w"].item() == pytest.approx(-0.1 * 2 * 3 * 3)


def test_the_schedule_is_that_of_the_instructions_round(app: ClientApp) -> None:
    deltas = [wire.update(ask(app, "train", "a", number)).delta["w"].item() for number in (1, 2)]
    assert deltas == pytest.approx([-0.1, -0.2])  # half the rate, then all of it


def test_a_measurement_is_of_the_test_examples_and_of_the_model_that_came(app: ClientApp) -> None:
    for _ in range(2):
        measurement = wire.measurement(ask(app, "evaluate", "a"))
        assert measurement == wire.Measurement("a", 2, {"loss": 10.0, "error": 3.0})  # (4 + 16) / 2, (2 + 4) / 2
        ask(app, "train", "b")  # changes the model that both clients are served in


def test_a_client_without_test_examples_says_so(app: ClientApp) -> None:
    assert wire.measurement(ask(app, "evaluate", "b")) == wire.Measurement("b", 0, {})
