import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrain import params as P
from fedtrain.data.base import Examples
from fedtrain.errors import RunError
from fedtrain.experiment.training import TrainingSection
from fedtrain.tasks.base import Metric
from fedtrain.training.batches import Batch
from fedtrain.training.gradients import BatchGradients
from fedtrain.training.loop import Assignment, LocalResult, Recipe, Trainer
from fedtrain.training.parallel import ParallelGradients, Replicas

CPU = torch.device("cpu")


class Model(nn.Module):
    """Convolution, a frozen layer, and buffers; fails on an input of 13."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fixed = nn.Linear(4, 4)
        self.fixed.requires_grad_(False)
        self.out = nn.Linear(4, 1)
        self.register_buffer("offset", torch.zeros(1))
        self.offset: Tensor
        self.register_buffer("count", torch.tensor(3))

    def forward(self, images: Tensor) -> Tensor:
        if (images == 13).any():
            raise ValueError("an unlucky image")
        hidden = torch.tanh(self.conv(images)).mean((2, 3))
        return torch.as_tensor(self.out(torch.tanh(self.fixed(hidden))) + self.offset)


class Squares:
    channels_last = True

    def model(self) -> nn.Module:
        return Model()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs.flatten(), targets, reduction="none")

    def metrics(self) -> dict[str, Metric]:
        return {}


def draw(count: int) -> Examples:
    rng = torch.Generator().manual_seed(1)
    return Examples(torch.randn(count, 1, 6, 6, generator=rng), torch.randn(count, generator=rng))


def trainer(gpus: int, **fields: object) -> Trainer:
    training = TrainingSection.model_validate({"batch_size": 5, "local_epochs": 2, **fields})
    replicas = Replicas(gpus, Squares) if gpus > 1 else None
    return Trainer(Squares(), Recipe(training, replicas=replicas), 1, CPU)


def train(with_: Trainer, count: int, who: str = "a") -> LocalResult:
    return with_.train(Assignment(1, who, P.snapshot(P.exchanged(with_.model))), draw(count))


@pytest.mark.parametrize(("gpus", "fields"), [(2, {"clip_norm": 0.5}), (3, {"micro_batch_size": 2})])
def test_several_devices_train_as_one_does(gpus: int, fields: dict[str, object]) -> None:
    # 11 examples in batches of 5: the last batch has one, and some devices none.
    one, many = train(trainer(1, **fields), 11), train(trainer(gpus, **fields), 11)
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    for name, t in one.delta.items():
        torch.testing.assert_close(many.delta[name], t, rtol=1e-5, atol=1e-6)
    assert max(float(t.abs().max()) for t in one.delta.values()) > 1e-3


def test_the_helpers_follow_what_is_loaded_and_earlier_clients_leave_no_trace() -> None:
    fresh, used = trainer(2), trainer(2)
    start = P.snapshot(P.exchanged(fresh.model))
    moved = {name: t + 1 for name, t in start.items()}
    used.train(Assignment(1, "b", moved), draw(7))
    one, other = (each.train(Assignment(2, "a", start), draw(9)) for each in (fresh, used))
    assert all(torch.equal(one.delta[name], other.delta[name]) for name in start)


def gradients(count: int = 4) -> tuple[ParallelGradients, Batch, list[nn.Parameter]]:
    torch.manual_seed(1)
    model = Model()
    own = BatchGradients(model, Squares(), TrainingSection(), CPU)
    trained = [p for p in model.parameters() if p.requires_grad]
    return ParallelGradients(own, Replicas(2, Squares)), Batch(*vars(draw(count)).values()), trained


def test_weights_and_mixed_targets_are_shared_too() -> None:
    several, batch, trained = gradients(5)
    batch = Batch(*batch[:2], torch.rand(5), torch.rand(5), torch.rand(5))
    loss, found = several(batch, trained, 2.0)
    expected_loss, expected = several._own(batch, trained, 2.0)
    torch.testing.assert_close(loss, expected_loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_fails_or_dies_in_a_helper_is_one_error_and_the_next_call_starts_anew() -> None:
    several, batch, trained = gradients()
    unlucky = batch.inputs.clone()
    unlucky[-1] = 13  # in the share of the other process
    with pytest.raises(RunError, match="an unlucky image"):
        several(batch._replace(inputs=unlucky), trained)
    loss, _ = several(batch, trained)
    (process,) = several._processes
    process.kill()
    with pytest.raises(RunError, match=r"a helper process of run\.gpus died: got exit code -9"):
        several(batch, trained)
    assert several._processes == []
    assert float(several(batch, trained)[0]) == float(loss)
    (process,) = several._processes
    del several
    process.join(60)
    assert process.exitcode is not None


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_parallel
if __name__ == "__main__":
    several, batch, trained = test_parallel.gradients()
    several(batch, trained)
    print(several._processes[0].pid, flush=True)
    time.sleep(60)
"""


def test_helpers_end_with_a_client_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "client.py"
    program.write_text(KILLED)
    command = [sys.executable, str(program), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        helper = int(client.stdout.readline())
        assert alive(helper)
        client.send_signal(signal.SIGKILL)
    until = time.monotonic() + 60
    while alive(helper) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(helper)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
