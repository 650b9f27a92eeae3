from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.experiment.sections import TaskSection
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.base import Task
from fedtrain.tasks.checkpointing import checkpoint_modules
from fedtrain.tasks.registry import make_task

IMAGES, TEXT = DataSpec((3, 8, 8), "class", 10), DataSpec((12,), "tokens", 20)


def built(name: str, spec: DataSpec) -> tuple[Task, nn.Module]:
    task = make_task(TaskSection(name=name), spec, Path())
    torch.manual_seed(1)
    return task, task.model()


def gradients(task: Task, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], int]:
    """The gradients, and the bytes that the forward pass keeps for them beside the parameters."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with global_torch_seed(1, "dropout"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = task.loss(model.train()(inputs), targets).mean()
        held = sum(kept.values())
        return list(torch.autograd.grad(loss, list(model.parameters()))), held


@pytest.mark.parametrize(("name", "spec", "pattern"), [("resnet18-gn", IMAGES, "block*"), ("transformer", TEXT, "bl*")])
def test_gradients_are_equal_to_the_bit_and_less_is_kept(name: str, spec: DataSpec, pattern: str) -> None:
    (task, plain), (_, model) = built(name, spec), built(name, spec)
    names = list(model.state_dict())
    checkpoint_modules(model, [pattern])
    assert list(model.state_dict()) == names
    inputs = torch.rand(4, *spec.input_shape) if name != "transformer" else torch.randint(20, (4, 12))
    targets = torch.arange(4) if name != "transformer" else inputs.roll(-1, 1)
    one, much = gradients(task, plain, inputs, targets)
    other, little = gradients(task, model, inputs, targets)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert little < much / 2


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Linear(3, 50), nn.Sequential(nn.Dropout(), nn.Linear(50, 1)))
        self.calls = 0
        self.outer[0].register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.outer(inputs))


def test_dropout_is_drawn_once_and_of_nested_modules_the_outer_one_is_taken() -> None:
    found = []
    for patterns in ([], ["outer*"]):
        torch.manual_seed(1)
        model = Dropping()
        checkpoint_modules(model, patterns)
        assert [name for name, m in model.named_modules() if "forward" in vars(m)] == (["outer"] if patterns else [])
        with global_torch_seed(1, "dropout"):
            loss = model(torch.ones(4, 3)).sum()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
        assert model.calls == (2 if patterns else 1)
        with torch.no_grad():
            model(torch.ones(4, 3))
        assert model.calls == (3 if patterns else 2)  # nothing is kept, so nothing is computed again
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_pattern_without_a_module_and_running_statistics_are_refused() -> None:
    _, model = built("resnet18-gn", IMAGES)
    with pytest.raises(TaskError, match=r"model\.checkpoint = layer\*"):
        checkpoint_modules(model, ["layer*"])
    normed = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(TaskError, match=r"cannot take 0: the running statistics of 0\.1 would move twice a step"):
        checkpoint_modules(normed, ["0"])
    checkpoint_modules(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), ["0"])
