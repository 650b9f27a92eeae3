import os
import subprocess
import sys

COMPILED = """
import torch
from torch import nn
from fedtrain.experiment.training import TrainingSection
from fedtrain.training.batches import Batch
from fedtrain.training.gradients import BatchGradients

class Squares:
    loss = staticmethod(lambda outputs, targets: (outputs.flatten() - targets) ** 2)

torch.set_num_threads(1)
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
names = list(model.state_dict())
trained = list(model.parameters())
sizes = [4, 7, 5]
batches = [Batch(torch.rand(size, 3), torch.rand(size)) for size in sizes]
make = lambda on: BatchGradients(model, Squares(), TrainingSection(compile=on), torch.device("cpu"))
plain, compiled = make(False), make(True)
results = []
for batch in batches:
    one, other = plain(batch, trained), compiled(batch, trained)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    results.append(other)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
assert list(model.state_dict()) == names
torch._dynamo.reset()
alone = make(True)(batches[-1], trained)
assert all(torch.equal(a, b) for a, b in zip([alone[0], *alone[1]], [results[-1][0], *results[-1][1]]))
"""


def test_compiled_gradients_are_those_of_the_model_whatever_came_before() -> None:
    # A process of its own: the compiler keeps state that is no other test's business.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
