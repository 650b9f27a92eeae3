"""What can be found wrong with a model and its training before the first round: `fedtrain check`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fedtrain import params as P
from fedtrain.data.base import DataSpec, Examples
from fedtrain.errors import FedtrainError
from fedtrain.experiment.sections import Experiment
from fedtrain.importing import blame
from fedtrain.privacy.suitability import check_layers
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.base import Task
from fedtrain.tasks.hook import batch_loss_of, relabel_of
from fedtrain.training.loop import Assignment, Recipe, Trainer, build_model

__all__ = ["Finding", "Layer", "check_up", "layers"]

_BATCH = 32  # examples that are to be learned by heart
_STEPS = 300
_LEARNED = 0.1  # of the first loss, or of its way down to 0
_LOOKED_AT = 512  # examples that units are looked at with
_DIRECTIONS = 5
_STEP = 1e-5  # of the finite difference, over the parameters' norm, in float64
_AGREES = 1e-4
_DEAD = 0.5  # share of a layer's units
_FADES, _EXPLODES = 1e-3, 1e3  # largest over smallest gradient, each over its weights
_FAR, _SMALL_OUTPUT = 30, 0.1  # of targets from an untrained model's outputs
_KINDS = {"class": "classes", "tokens": "tokens"}
_LARGE_STEP, _SMALL_STEP = 0.1, 1e-6  # of a step over its weights


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        name: of the check.
        verdict: ok; odd where a person should look; wrong where training cannot work.
        text: what was measured, and what to do about it.
    """

    name: str
    verdict: Literal["ok", "odd", "wrong"]
    text: str


_Verdict = tuple[Literal["ok", "odd", "wrong"], str]


@dataclass(frozen=True)
class Layer:
    """One layer without layers of its own, as a batch passes through it."""

    name: str
    kind: str
    shape: tuple[int, ...] = field(default=())  # of its output, without the batch
    parameters: int = 0
    trained: int = 0
    deviation: float = math.nan  # standard deviation of its outputs
    dead: float | None = None  # share of a ReLU's units that are 0 for every example


def layers(model: nn.Module, inputs: Tensor) -> list[Layer]:
    """Follow a batch through a model.

    Args:
        model: in any mode; it is left in that.
        inputs: `(B, ...)`.

    Returns:
        The layers in the order in which they are passed; one that is passed twice is told once, as the last time.
    """
    found: dict[str, Layer] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        own = list(module.parameters(recurse=False))

        def note(_module: nn.Module, _inputs: object, output: object) -> None:
            output = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(output, Tensor):
                return
            values = output.detach().double()
            relu = isinstance(module, nn.ReLU | nn.ReLU6)
            found[name] = Layer(
                name=name or "the model",
                kind=type(module).__name__,
                shape=tuple(output.shape[1:]),
                parameters=sum(p.numel() for p in own),
                trained=sum(p.numel() for p in own if p.requires_grad),
                deviation=float(values.std()) if values.is_floating_point() and values.numel() > 1 else math.nan,
                dead=float((values <= 0).all(dim=0).double().mean()) if relu else None,
            )

        return module.register_forward_hook(note)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [watch(name, module) for name, module in leaves]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return list(found.values())


def check_up(experiment: Experiment, task: Task, spec: DataSpec, examples: Examples) -> Iterator[Finding]:
    """Try a model and its training on a client's examples; the experiment's random streams are not touched.

    Args:
        experiment: how clients train.
        task: model and loss, which `check_task` has accepted.
        spec: what the data are like.
        examples: of one client, one or more.

    Yields:
        One finding for each check, as soon as it is made.
    """
    patient = _Patient(experiment, task, spec, examples)
    for name, check in _CHECKS.items():
        try:
            with global_torch_seed(experiment.seed, "check", name):
                verdict, text = check(patient)
        except FedtrainError as error:
            verdict, text = "wrong", str(error)
        except Exception as error:  # the user's code; the other checks may still tell something
            verdict, text = "wrong", blame(error)
        yield Finding(name, verdict, text)


@dataclass(frozen=True)
class _Patient:
    experiment: Experiment
    task: Task
    spec: DataSpec
    examples: Examples

    def model(self) -> nn.Module:
        return build_model(self.task, self.experiment.seed).train()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        return self.examples.inputs[:size], self.examples.targets[:size]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.task.loss(model(batch[0]), batch[1]).mean()

    def gradients(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(self.loss(model, batch), list(trained.values()), materialize_grads=True)
        return dict(zip(trained, gradients))


def _inputs(patient: _Patient) -> _Verdict:
    inputs = patient.batch(_LOOKED_AT)[0]
    if not inputs.is_floating_point():
        return "ok", f"tokens from {int(inputs.min())} to {int(inputs.max())}"
    if not inputs.isfinite().all():
        return "wrong", "some are NaN or infinite; see data.missing"
    mean, deviation, largest = float(inputs.mean()), float(inputs.std()), float(inputs.abs().max())
    text = f"mean {mean:.3g}, deviation {deviation:.3g}, largest {largest:.3g}"
    if deviation and max(abs(mean), deviation, largest / 100) <= 10:
        return "ok", text
    return "odd", f'{text}; most models want deviations of about 1: data.scaling = "client"'


def _targets(patient: _Patient) -> _Verdict:
    """Numbers far from what an untrained model puts out take it long to reach, or make it diverge."""
    inputs, targets = patient.batch(_LOOKED_AT)
    if patient.spec.target != "number":
        return "ok", f"{len(torch.unique(targets))} of {patient.spec.num_classes} {_KINDS[patient.spec.target]}"
    mean, deviation = float(targets.mean()), float(targets.std(correction=0))
    text = f"mean {mean:.4g}, deviation {deviation:.4g}"
    with torch.no_grad():
        outputs = patient.model().eval()(inputs)
    if not isinstance(outputs, Tensor) or outputs.shape != targets.shape or not outputs.isfinite().all():
        return "ok", text  # of infinite outputs the first loss tells
    middle, scale = float(outputs.mean()), float(outputs.std(correction=0))
    if max(abs(mean - middle), deviation) <= _FAR * max(scale, _SMALL_OUTPUT):
        return "ok", text
    told = f"{text}, and the untrained model puts out about {middle:.2g}"
    return "odd", f"{told}: set task.options.target_mean and target_std of the regressor, or scale the targets"


def _first_loss(patient: _Patient) -> _Verdict:
    model = patient.model().eval()
    with torch.no_grad():
        loss = float(patient.loss(model, patient.batch(_LOOKED_AT)).detach())
    if not math.isfinite(loss):
        return "wrong", f"it is {loss} before any training"
    own = batch_loss_of(patient.task) or relabel_of(patient.task) or getattr(patient.task, "output_names", None)
    if own or patient.spec.target == "number" or patient.experiment.training.loss is not None:
        return "ok", f"{loss:.4g}"
    chance = math.log(patient.spec.num_classes)
    text = f"{loss:.4g}; guessing all classes alike gives ln {patient.spec.num_classes} = {chance:.4g}"
    if loss <= 2 * chance + 0.5:
        return "ok", text
    return "odd", f"{text}: the initial outputs are far too large, or inputs are not scaled"


def _gradient(patient: _Patient) -> _Verdict:
    """Directional derivatives against central differences, in float64 and without dropout."""
    model = copy.deepcopy(patient.model()).double().eval()
    inputs, targets = patient.batch(8)
    batch = (
        inputs.double() if inputs.is_floating_point() else inputs,
        targets.double() if targets.is_floating_point() else targets,
    )
    gradients = patient.gradients(model, batch)
    if not any(gradient.any() for gradient in gradients.values()):
        return "ok", f"not compared: {len(inputs)} examples give none"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scale = _STEP * math.sqrt(sum(float(p.detach().square().sum()) for p in trained.values()) + 1)
    errors = []
    for _ in range(_DIRECTIONS):
        way = {name: torch.randn_like(p) for name, p in trained.items()}
        length = P.l2_norm(way)
        expected = sum(float((gradients[name] * way[name]).sum()) for name in way) / length
        ends = []
        for sign in (1.0, -1.0):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    if name in way:
                        p.add_(way[name], alpha=sign * scale / length)
                ends.append(float(patient.loss(moved, batch)))
        measured = (ends[0] - ends[1]) / (2 * scale)
        errors.append(abs(measured - expected) / max(abs(measured), abs(expected), 1e-8))
    error = sorted(errors)[_DIRECTIONS // 2]  # a kink of a ReLU on the way is no fault
    text = f"differs from finite differences by {error:.1e} (median of {_DIRECTIONS} directions)"
    if error <= _AGREES:
        return "ok", text
    return "odd", f"{text}: is a part of the model or the loss detached, or not differentiable?"


def _reach(patient: _Patient) -> _Verdict:
    model = patient.model()
    idle = [name for name, g in patient.gradients(model, patient.batch(_LOOKED_AT)).items() if not g.any()]
    if not idle:
        return "ok", "every trained parameter has a gradient"
    told = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
    # The up-projection of an adapter starts at zero, and so its down-projection learns from the second step on.
    if patient.experiment.model.lora is not None and all("lora" in name for name in idle):
        return "ok", f"no gradient in the first step, as adapters start: {told}"
    return "odd", f"no gradient reaches {told}: is it unused in forward()?"


def _units(patient: _Patient) -> _Verdict:
    followed = layers(patient.model(), patient.batch(_LOOKED_AT)[0])
    dead = [layer for layer in followed if layer.dead is not None and layer.dead > _DEAD]
    if dead:
        told = ", ".join(f"{layer.dead:.0%} of {layer.name}" for layer in dead[:3])
        return "odd", f"0 for every example: {told}; another [model] init may help"
    # Adapters start with an output of zero.
    adapted = patient.experiment.model.lora is not None
    looked_at = [layer for layer in followed if layer.parameters and not (adapted and "lora" in layer.name)]
    deviations = [layer.deviation for layer in looked_at if math.isfinite(layer.deviation)]
    if not deviations:
        return "ok", "no layer to look at"
    text = f"outputs of layers deviate by {min(deviations):.2g} to {max(deviations):.2g}"
    if min(deviations) * 1e3 < max(deviations):
        return "odd", f"{text}: the signal fades or explodes; another [model] init, or normalisation"
    return "ok", text


def _norms(patient: _Patient) -> _Verdict:
    model = patient.model()
    gradients = patient.gradients(model, patient.batch(_LOOKED_AT))
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    ratios = {
        name: float(gradients[name].norm() / w.detach().norm())
        for name, w in weights.items()
        if gradients[name].any() and w.detach().any()
    }
    if not all(map(math.isfinite, ratios.values())):
        return "wrong", "some are NaN or infinite"
    if len(ratios) < 2:
        return "ok", "one layer of weights" if ratios else "no layer of weights"
    least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    text = f"over weights from {ratios[least]:.1e} ({least}) to {ratios[most]:.1e} ({most})"
    if ratios[least] < _FADES * ratios[most]:
        return "odd", f"{text}: they vanish; normalisation or another [model] init may help"
    if ratios[most] > _EXPLODES:
        return "odd", f"{text}: they explode; training.clip_norm may help"
    return "ok", text


def _by_heart(patient: _Patient) -> _Verdict:
    """A model that cannot learn one batch by heart will learn nothing."""
    model, batch = patient.model(), patient.batch(_BATCH)
    trained = [p for p in model.parameters() if p.requires_grad]
    if batch_loss_of(patient.task):
        return "ok", "not tried: the task trains by a loss of its own (batch_loss)"
    if relabel_of(patient.task):
        return "ok", "not tried: the task trains on targets of its own (relabel)"
    with torch.no_grad():
        first = float(patient.loss(model.eval(), batch))
    model.train()
    least, steps = first, 0
    for rate in (1e-3, 1e-2):
        optimizer = torch.optim.Adam(trained, lr=rate)
        for _ in range(_STEPS):
            steps += 1
            loss = patient.loss(model, batch)
            least = min(least, float(loss.detach()))
            if least <= _LEARNED * first:
                text = f"{len(batch[0])} examples learned by heart: loss {first:.3g} to {least:.3g} in {steps} steps"
                return "ok", text
            for p, g in zip(trained, torch.autograd.grad(loss, trained, materialize_grads=True)):
                p.grad = g
            optimizer.step()
    text = f"loss {first:.3g} to {least:.3g} in {steps} steps of Adam on {len(batch[0])} examples"
    if least < 0.7 * first or least < 0.1:
        return "odd", f"{text}: the model may be too small, or the targets are noise"
    return "wrong", f"{text}: the model does not learn; are inputs, outputs and targets in order?"


def _rate(patient: _Patient) -> _Verdict:
    """One local round of the experiment's own recipe, without privacy."""
    experiment, examples = patient.experiment, patient.examples
    training = getattr(patient.task, "training", experiment.training).model_copy(
        update={"local_epochs": None, "local_steps": 20, "precision": "float32"}
    )
    trainer = Trainer(patient.task, Recipe(training, model=experiment.model), experiment.seed, torch.device("cpu"))
    before = P.snapshot(P.exchanged(trainer.model))
    result = trainer.train(Assignment(1, "check", before), examples)
    moved, size = P.l2_norm(result.delta) / 20, P.l2_norm(before)
    step = moved / max(size, 1e-12)
    text = f"20 steps at {training.optimizer.lr:g}: mean loss {result.loss:.3g}, a step moves weights by {step:.1e}"
    if not (math.isfinite(result.loss) and math.isfinite(moved)):
        return "wrong", f"{text}: training diverges; lower it, or see fedtrain lr-find"
    if step > _LARGE_STEP:
        return "odd", f"{text}: very large; lower it, or see fedtrain lr-find"
    if step < _SMALL_STEP:
        return "odd", f"{text}: hardly at all; raise it, or see fedtrain lr-find"
    return "ok", text


def _privacy(patient: _Patient) -> _Verdict:
    model = patient.model()
    if batch_loss_of(patient.task):
        return "odd", "it cannot take the task's batch_loss, which may mix the examples of a batch"
    if relabel_of(patient.task):
        return "odd", "it cannot take the task's relabel, which may mix examples"
    try:
        check_layers(model, [p for p in model.parameters() if p.requires_grad])
    except FedtrainError as error:
        asked = patient.experiment.privacy is not None and patient.experiment.privacy.unit == "sample"
        return "wrong" if asked else "odd", str(error)
    return "ok", "it can take every layer"


_CHECKS: dict[str, Callable[[_Patient], _Verdict]] = {
    "inputs": _inputs,
    "targets": _targets,
    "first loss": _first_loss,
    "gradient": _gradient,
    "reach": _reach,
    "units": _units,
    "gradient norms": _norms,
    "learning rate": _rate,
    "DP-SGD": _privacy,
    "one batch": _by_heart,  # the slowest, and so the last
}
