"""What the ways of computing a step cost: compiled, checkpointed, and shared by two processes.

Each contender computes the gradient of the same batch; contenders take turns in one process, and the least figures are
compared, for a busy machine only ever adds to them. Processor time with one thread, except for two processes, which are
held against one by the clock. Compilation is shown apart. Bytes kept are those of the tensors, parameters aside, that a
forward pass leaves for the backward pass. There is no GPU in these figures.

Run: python benchmarks/compute.py [compile|checkpoint|parallel ...] [--repeat 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.experiment.sections import TaskSection
from fedtrain.experiment.training import TrainingSection
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.base import Task
from fedtrain.tasks.checkpointing import checkpoint_modules
from fedtrain.tasks.registry import make_task
from fedtrain.training.batches import Batch
from fedtrain.training.gradients import BatchGradients
from fedtrain.training.layout import in_layout, memory_format
from fedtrain.training.parallel import ParallelGradients, Replicas

CPU = torch.device("cpu")
MNIST, TEXT = DataSpec((1, 28, 28), "class", 10), DataSpec((80,), "tokens", 90)
MODELS = {"mlp": MNIST, "cnn": MNIST, "transformer": TEXT}
BATCH, STEPS = 32, {"mlp": 100, "cnn": 10, "transformer": 5}


def build(name: str, spec: DataSpec) -> tuple[Task, nn.Module]:
    """A task, and its model as it is trained."""
    task = make_task(TaskSection(name=name), spec, Path())
    with global_torch_seed(0, "model"):
        model = task.model().train()
    model.to(memory_format=memory_format(task))  # type: ignore[call-overload]
    return task, model


def draw(task: Task, spec: DataSpec, count: int) -> Batch:
    """Random examples."""
    if spec.target == "tokens":
        tokens = torch.randint(spec.num_classes, (count, *spec.input_shape))
        return Batch(tokens, tokens.roll(-1, 1))
    images = in_layout(torch.rand(count, *spec.input_shape), memory_format(task))
    return Batch(images, torch.randint(spec.num_classes, (count,)))


def least(
    contenders: Mapping[str, Callable[[], object]], steps: int, repeat: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Least seconds per step of each contender, all in turns; the first step is not counted."""
    seconds: dict[str, float] = {}
    for name, step in contenders.items():
        started = time.perf_counter()
        step()
        print(f"  first step, {name}: {time.perf_counter() - started:.1f} s")
    for _ in range(repeat):
        for name, step in contenders.items():
            started = clock()
            for _ in range(steps):
                step()
            seconds[name] = min(seconds.get(name, float("inf")), (clock() - started) / steps)
    return seconds


def compiled(repeat: int) -> None:
    """Print how long a compiled step takes beside a plain one."""
    for name, spec in MODELS.items():
        task, model = build(name, spec)
        batch, trained = draw(task, spec, BATCH), list(model.parameters())
        print(f"compile, {name}")
        contenders = {
            kind: partial(BatchGradients(model, task, TrainingSection(compile=on), CPU), batch, trained)
            for kind, on in (("plain", False), ("compiled", True))
        }
        seconds = least(contenders, STEPS[name], repeat, time.process_time)
        show(seconds, "plain")


def checkpointed(repeat: int) -> None:
    """Print what checkpointing saves of a ResNet's memory, and what it costs."""
    spec, contenders = DataSpec((3, 32, 32), "class", 10), {}
    print("checkpoint, resnet18-gn, 16 images of 3 x 32 x 32")
    for kind, patterns in (("plain", []), ("block*", ["block*"])):
        task, model = build("resnet18-gn", spec)
        checkpoint_modules(model, patterns)
        batch = draw(task, spec, 16)
        print(f"  kept, {kind}: {kept(task, model, batch) / 1e6:.1f} MB")
        contenders[kind] = partial(BatchGradients(model, task, TrainingSection(), CPU), batch, list(model.parameters()))
    seconds = least(contenders, 1, repeat, time.process_time)
    show(seconds, "plain")


def kept(task: Task, model: nn.Module, batch: Batch) -> int:
    """Bytes that a forward pass keeps for the backward pass beside the parameters."""
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, int]()
    held = []  # so that no two tensors have one address

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        held.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        task.loss(model(batch.inputs), batch.targets).mean()
    return sum(found.values())


def parallel(repeat: int) -> None:
    """Print how long a step takes two processes with a thread each, beside one."""
    print("parallel, cnn, two processes over Gloo")
    for size in (32, 256):
        task, model = build("cnn", MNIST)
        batch, trained = draw(task, MNIST, size), list(model.parameters())
        own = BatchGradients(model, task, TrainingSection(), CPU)
        several = ParallelGradients(own, Replicas(2, partial(make_task, TaskSection(name="cnn"), MNIST, Path())))
        contenders = {"one": partial(own, batch, trained), "two": partial(several, batch, trained)}
        print(f"  batch of {size}")
        show(least(contenders, 5, repeat, time.perf_counter), "one")
        several.close()


def show(seconds: Mapping[str, float], against: str) -> None:
    """Print seconds per step, and the ratio to one of them."""
    for name, value in seconds.items():
        print(f"  {name}: {1000 * value:.2f} ms, {value / seconds[against]:.2f} times {against}")


def main() -> None:
    """Run the parts that are asked for."""
    parts = {"compile": compiled, "checkpoint": checkpointed, "parallel": parallel}
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=list(parts))
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts:
        parts[part](arguments.repeat)


if __name__ == "__main__":
    main()
