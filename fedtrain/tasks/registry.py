"""The built-in tasks by name, and building the task that an experiment names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fedtrain.data.base import DataSpec, Examples
from fedtrain.errors import FedtrainError, TaskError, nearest
from fedtrain.experiment.sections import TaskSection
from fedtrain.importing import load_object, raised
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.autoencoder import Autoencoder, Vae
from fedtrain.tasks.base import Task
from fedtrain.tasks.clustering import KMeans
from fedtrain.tasks.contrastive import Contrastive, Probe
from fedtrain.tasks.dense import Logistic, Mlp, Regressor
from fedtrain.tasks.hook import batch_loss_of, relabelled
from fedtrain.tasks.images import Cnn, Resnet18Gn, SimpleCnn
from fedtrain.tasks.multi import MultiLabel, MultiTask
from fedtrain.tasks.semi import PseudoLabel
from fedtrain.tasks.text import CharLstm, Transformer

__all__ = ["FURTHER_TASKS", "TASKS", "BuiltIn", "check_task", "make_task"]

_GUIDE = "docs/tasks.md has a complete example"


class BuiltIn(NamedTuple):
    """A built-in task: its class, and what it is in one line."""

    build: Callable[..., Task]
    summary: str


TASKS = {
    "logistic": BuiltIn(Logistic, "logistic regression on features or flattened images"),
    "mlp": BuiltIn(Mlp, "multi-layer perceptron on features or flattened images; 784-200-200-10 on MNIST"),
    "cnn": BuiltIn(Cnn, "McMahan's CNN for small images; 1,663,370 parameters on MNIST"),
    "simple-cnn": BuiltIn(SimpleCnn, "NIID-Bench's simple CNN for images of 16 x 16 pixels or more"),
    "resnet18-gn": BuiltIn(Resnet18Gn, "ResNet-18 with group normalisation for images of about 32 x 32 pixels"),
    "char-lstm": BuiltIn(CharLstm, "next character of a text by a two-layer LSTM"),
    "transformer": BuiltIn(Transformer, "next character of a text by a small causal transformer"),
    "regressor": BuiltIn(Regressor, "multi-layer perceptron that predicts a number"),
}
"""Tasks that predict the target by one network."""

FURTHER_TASKS = {
    "multi-label": BuiltIn(MultiLabel, "several labels at once, for classes such as rain+wind"),
    "multi-task": BuiltIn(MultiTask, "several classes at once, for classes such as 7/odd"),
    "pseudo-label": BuiltIn(PseudoLabel, "classifier for clients that have labels for a few of their examples"),
    "contrastive": BuiltIn(Contrastive, "trains an encoder without labels, by two views of each example"),
    "probe": BuiltIn(Probe, "linear classifier on the encoder of a contrastive run"),
    "autoencoder": BuiltIn(Autoencoder, "finds anomalies by what it reconstructs badly"),
    "vae": BuiltIn(Vae, "variational autoencoder, which generates new inputs"),
    "kmeans": BuiltIn(KMeans, "k-means whose centroids are the model"),
}
"""Tasks with other ways to learn, or with more to predict."""


def make_task(section: TaskSection, spec: DataSpec, base: Path) -> Task:
    """Build the task that an experiment names.

    Args:
        section: name and options of the task.
        spec: what the data are like.
        base: the experiment file's folder, against which "file.py:Class" is resolved.

    Returns:
        A built-in task, or the user's own.

    Raises:
        TaskError: no such task, wrong options, or a task that does not suit the data.
    """
    name = section.name
    build = load_object(name, base, TaskError) if ":" in name else _built_in(name)
    if not callable(build):
        raise TaskError(f"{name} is not a task's class", got=type(build).__name__)
    _check_options(section, build)
    try:
        task = build(spec, **section.options)
    except FedtrainError:
        raise
    except Exception as exc:
        raise raised(f"building task {name!r}", exc, TaskError) from exc
    if isinstance(task, Task):
        return task
    missing = [method for method in ("model", "loss", "metrics") if not hasattr(task, method)]
    raise TaskError(f"task {name!r} is incomplete: it has no method {', '.join(missing)}", hint=_GUIDE)


def check_task(task: Task, examples: Examples) -> None:
    """Run a task once on a few examples, so that a fault of a user's own task shows before the first round.

    Args:
        task: the task.
        examples: two or more, as the model is going to get them.

    Raises:
        TaskError: the model, the loss, a training hook or a metric raises, or does not give one number per example.
    """
    with global_torch_seed(0, "check-task"):
        try:
            model = task.model()
            trained = [p for p in model.parameters() if p.requires_grad]
            targets = relabelled(task, model, examples).targets
            model.train()
            if hook := batch_loss_of(task):
                minimised = hook(model, examples.inputs, targets)
            else:
                minimised = task.loss(model(examples.inputs), targets)
            if trained:
                torch.autograd.grad(minimised.sum(), trained, materialize_grads=True)
            with torch.no_grad():
                outputs = model.eval()(examples.inputs)
                values = {"loss": task.loss(outputs, examples.targets)}
                values["batch_loss" if hook else "loss of a step"] = minimised
                if difficulty := getattr(task, "difficulty", None):
                    values["training.curriculum.score"] = difficulty(examples.inputs, examples.targets)
                for name, metric in task.metrics().items():
                    if not isinstance(name, str) or name == "loss":
                        raise TaskError(
                            "a metric of the task has a wrong name", got=repr(name), expected='a text other than "loss"'
                        )
                    values[f"metric {name!r}"] = metric(outputs, examples.targets)
        except FedtrainError:
            raise
        except Exception as exc:
            raise raised("trying the task on a few examples", exc, TaskError) from exc
    if not trained:
        raise TaskError("the task's model has no parameter to train", expected="one that requires a gradient")
    for name, value in values.items():
        shape = tuple(getattr(value, "shape", ()))
        if shape != (len(examples),):
            raise TaskError(
                f"the task's {name} must give one number per example",
                got=f"shape {shape} for {len(examples)} examples",
                expected=f"shape ({len(examples)},)",
                hint=f'Losses of torch do so with reduction="none". {_GUIDE}',
            )


def _built_in(name: str) -> Callable[..., Task]:
    known = {**TASKS, **FURTHER_TASKS}
    if name in known:
        return known[name].build
    raise TaskError(
        "there is no such built-in task",
        got=name,
        expected=f'one of {", ".join(known)}, or your own as "package.module:Class" or "file.py:Class"',
        hint=nearest(name, known, otherwise=""),
    )


def _check_options(section: TaskSection, build: Callable[..., object]) -> None:
    """Refuse options that the task's constructor does not take, and ask for those it needs."""
    takes = list(inspect.signature(build).parameters.values())
    if not takes or takes[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise TaskError(f"{section.name} does not take the data's spec", expected="Class(spec, **options)", hint=_GUIDE)
    parameters = takes[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    allowed = [p.name for p in named]
    for option in section.options:
        if option not in allowed and all(p.kind is not p.VAR_KEYWORD for p in parameters):
            raise TaskError(
                f"task {section.name!r} has no such option",
                got=option,
                expected=f"one of {', '.join(allowed)}" if allowed else "no options",
                hint=nearest(option, allowed, otherwise=""),
            )
    missing = [p.name for p in named if p.default is p.empty and p.name not in section.options]
    if missing:
        raise TaskError(f"task {section.name!r} needs the option {', '.join(missing)}", hint="Set it in [task] options")
