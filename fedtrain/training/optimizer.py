"""Local optimisers: from a step's gradients to the parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtrain.errors import InputError, nearest
from fedtrain.experiment.optimizers import AdamSection, OptimizerSection, OwnOptimizer, SgdSection, rooted
from fedtrain.experiment.training import TrainingSection
from fedtrain.importing import load_object, raised
from fedtrain.params import Params, is_private, snapshot
from fedtrain.statefile import UnsavableStateError, copy_state
from fedtrain.training.adabound import AdaBound
from fedtrain.training.rules import Tensors

__all__ = ["LocalOptimizer", "check_optimizer", "refuse_unknown_options", "torch_optimizers"]


class LocalOptimizer:
    """Changes parameters in place, step by step.

    Args:
        training: which optimiser, with its numbers, and the rates of layers; `rooted`, if the optimiser is an own one.
        params: name -> leaf tensor to change, in the order in which gradients will come.
        state: what `state()` gave in the client's last round; empty for a fresh start. Parameters may have come or
            gone since.
    """

    def __init__(self, training: TrainingSection, params: Params, state: Mapping[str, Any] | None = None) -> None:
        self._section, self._names, self._params = training.optimizer, list(params), list(params.values())
        self._layers = _layers(training.layer_lr, self._names)
        self._values = [p.detach() for p in self._params]  # the same memory, of which autograd keeps no record
        self._optimizer: torch.optim.Optimizer | None = None
        if not isinstance(self._section, SgdSection):
            self._optimizer = self._build(self._section)
            self._restore(self._optimizer, state or {})
        elif self._section.momentum:
            kept = {name: tensors["momentum"] for name, tensors in (state or {}).items()}
            self._buffers = [torch.zeros_like(p).copy_(kept.get(n, torch.tensor(0.0))) for n, p in params.items()]

    def step(self, gradients: Tensors, factor: float) -> None:
        """Take a step.

        Args:
            gradients: one per parameter.
            factor: of the learning rate at this step.
        """
        if self._optimizer is None:
            self._sgd(gradients, factor)
            return
        for group, layer in zip(self._optimizer.param_groups, self._layers, strict=True):
            group["lr"] = self._section.lr * factor * layer
        for param, gradient in zip(self._params, gradients, strict=True):
            param.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()  # the next client has an optimiser of its own

    def state(self) -> dict[str, Any]:
        """What a client would have to keep to go on with the same moments: name -> CPU tensors and numbers by name."""
        if self._optimizer is not None:
            states = {
                n: self._optimizer.state[p] for n, p in zip(self._names, self._params) if self._optimizer.state[p]
            }
            return {name: _on_cpu(state) for name, state in states.items()}
        if not (isinstance(self._section, SgdSection) and self._section.momentum):
            return {}
        return {name: snapshot({"momentum": buffer}) for name, buffer in zip(self._names, self._buffers)}

    def _build(self, section: OptimizerSection) -> torch.optim.Optimizer:
        groups = [
            {"params": [self._params[i] for i in places], "lr": section.lr * layer}
            for layer, places in self._layers.items()
        ]
        return _kind(section)(groups, lr=section.lr, **_options(section))

    def _restore(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        if not state:
            return
        numbered = enumerate(name for places in self._layers.values() for name in (self._names[i] for i in places))
        found = {number: dict(state[name]) for number, name in numbered if name in state}
        for values in found.values():
            if isinstance(values.get("step"), Tensor):
                values["step"] = values["step"].cpu()  # torch wants it there, and moves it itself if it is told to
        optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})

    def _sgd(self, gradients: Tensors, factor: float) -> None:
        """The same arithmetic as torch.optim.SGD, without its bookkeeping: a quarter of a small model's step."""
        section = self._section
        assert isinstance(section, SgdSection)
        if section.weight_decay:
            gradients = torch._foreach_add(gradients, self._values, alpha=section.weight_decay)
        if section.momentum:
            torch._foreach_mul_(self._buffers, section.momentum)
            torch._foreach_add_(self._buffers, gradients)
            nesterov = section.nesterov
            gradients = (
                torch._foreach_add(gradients, self._buffers, alpha=section.momentum) if nesterov else self._buffers
            )
        if len(self._layers) == 1:
            torch._foreach_add_(self._values, gradients, alpha=-section.lr * factor * next(iter(self._layers)))
            return
        for layer, places in self._layers.items():
            group = [self._values[i] for i in places]
            torch._foreach_add_(group, [gradients[i] for i in places], alpha=-section.lr * factor * layer)


def check_optimizer(training: TrainingSection, base: Path, model: nn.Module) -> None:
    """Refuse a local optimiser that cannot train a model, before a run begins: a step of zeros is tried on a copy.

    Args:
        training: names the optimiser, its options and the rates of layers.
        base: the experiment file's folder, in which an own optimiser is looked for.
        model: is not changed.

    Raises:
        InputError: there is no such optimiser, option or parameter; or the optimiser raises; or it keeps what
            training.optimizer_state cannot keep.
    """
    training, section = rooted(training, base), training.optimizer
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    for pattern in training.layer_lr:
        if not any(is_private(name, [pattern]) for name in params):
            raise InputError(
                "no parameter that is trained has such a name",
                got=f"training.layer_lr = {pattern}",
                expected=f"a name or pattern among {', '.join(params)}",
            )
    if isinstance(section, SgdSection):
        return
    if not isinstance(section, AdamSection):
        refuse_unknown_options(_kind(training.optimizer), section.options, "training.optimizer", but=("params", "lr"))
    try:
        optimizer = LocalOptimizer(training, params)
        optimizer.step([torch.zeros_like(p) for p in params.values()], 1.0)
        state = optimizer.state()
        LocalOptimizer(training, params, state)
    except Exception as error:  # torch has no common class for what it finds wrong
        if isinstance(section, OwnOptimizer):
            raise raised(f"trying training.optimizer.path = {section.path}", error, InputError) from error
        raise InputError(
            f'training.optimizer.name = "{section.name}" cannot train this model with its options',
            got=_options(section),
            hint=f"torch says: {error}",
        ) from error
    _check_state(training, state)


def refuse_unknown_options(
    kind: Callable[..., object], options: Iterable[str], field: str, but: Iterable[str] = ("params",)
) -> None:
    """Refuse options that an optimiser's constructor does not take.

    Args:
        kind: the class, or a function that builds one.
        options: names of keyword arguments.
        field: in the experiment file, which has them under `options`.
        but: names of arguments that are given otherwise.

    Raises:
        InputError: it does not take one.
    """
    parameters = inspect.signature(kind).parameters.values()
    allowed = [p.name for p in parameters if p.name not in but and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    any_other = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option in but or (option not in allowed and not any_other):
            raise InputError(
                f"{field}.options: {getattr(kind, '__name__', 'it')} has no such option",
                got=option,
                expected=f"one of {', '.join(allowed)}" if allowed else "no options",
                hint=nearest(option, allowed, otherwise=""),
            )


def torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """The optimisers of torch.optim by their classes' names."""
    base = torch.optim.Optimizer
    kinds = vars(torch.optim).items()
    return {name: k for name, k in kinds if isinstance(k, type) and issubclass(k, base) and k is not base}


def _kind(section: OptimizerSection) -> Callable[..., torch.optim.Optimizer]:
    if isinstance(section, OwnOptimizer):
        own = load_object(section.path, Path(), InputError)
        if not callable(own):
            raise InputError("training.optimizer.path names no class or function", got=section.path)
        return own  # type: ignore[no-any-return]
    known = {name.lower(): kind for name, kind in torch_optimizers().items()}
    return {**known, "adabound": AdaBound}[section.name]


def _options(section: OptimizerSection) -> dict[str, Any]:
    if isinstance(section, AdamSection):
        return {"betas": section.betas, "eps": section.eps, "weight_decay": section.weight_decay}
    return {} if isinstance(section, SgdSection) else section.options


def _layers(factors: Mapping[str, float], names: list[str]) -> dict[float, list[int]]:
    """Factor of the learning rate -> positions of the parameters that have it."""
    layers: dict[float, list[int]] = {}
    for place, name in enumerate(names):
        fitting = (factor for pattern, factor in factors.items() if is_private(name, [pattern]))
        layers.setdefault(next(fitting, 1.0), []).append(place)
    return layers


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: snapshot({key: v})[key] if isinstance(v, Tensor) else v for key, v in state.items()}


def _check_state(training: TrainingSection, state: Mapping[str, Any]) -> None:
    """Refuse an own optimiser whose state cannot be kept, or not averaged."""
    what = f'training.optimizer_state = "{training.optimizer_state}" is not for an optimizer that keeps'
    if training.optimizer_state == "keep":
        try:
            copy_state(state)
        except UnsavableStateError as error:
            raise InputError(f"{what} such a {error}", hint='Take "reset"') from error
    if training.optimizer_state == "average":
        for values in state.values():
            for key, value in values.items():
                if not (isinstance(value, Tensor) and value.is_floating_point()):
                    raise InputError(
                        f"{what} other things than tensors of real numbers", got=f"{key} = {value}", hint='Take "keep"'
                    )
