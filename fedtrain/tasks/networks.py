"""What tasks beyond plain classifiers are made of: the built-in networks, and checks of options and inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError, nearest
from fedtrain.experiment.schema import inline
from fedtrain.tasks.base import Task
from fedtrain.tasks.dense import Logistic, Mlp
from fedtrain.tasks.images import Cnn, Resnet18Gn, SimpleCnn

__all__ = ["NETWORKS", "build_network", "finite_number", "needs_float_inputs"]

NETWORKS: dict[str, Callable[..., Task]] = {
    "logistic": Logistic,
    "mlp": Mlp,
    "cnn": Cnn,
    "simple-cnn": SimpleCnn,
    "resnet18-gn": Resnet18Gn,
}
"""Classifiers by name; what they tell classes apart by serves other tasks too."""


def build_network(name: object, spec: DataSpec, outputs: int, options: Mapping[str, Any] | None) -> Task:
    """Build the task whose model gives `(B, outputs)` for such inputs.

    Args:
        name: of the network: a key of `NETWORKS`.
        spec: of the inputs; what the targets are does not count.
        outputs: 3 or more; a classifier of two classes has one output.
        options: the network's own, such as { hidden = [64] }.

    Raises:
        TaskError: there is no such network or option, or the inputs do not suit it.
    """
    if not isinstance(name, str) or name not in NETWORKS:
        known = ", ".join(NETWORKS)
        raise TaskError("there is no such network", got=name, expected=f"one of {known}", hint=nearest(name, NETWORKS))
    options = options or {}
    takes = list(inspect.signature(NETWORKS[name]).parameters)[1:]
    if not isinstance(options, Mapping) or not options.keys() <= set(takes):
        raise TaskError(
            "the task option 'network_options' is wrong",
            got=options,
            expected=f"a table of {', '.join(takes)}" if takes else f"none: {name} has no options",
        )
    return NETWORKS[name](replace(spec, target="class", num_classes=outputs, class_names=()), **options)


def needs_float_inputs(task: str, spec: DataSpec) -> None:
    """Refuse tokens.

    Raises:
        TaskError: the inputs are tokens.
    """
    if spec.target == "tokens":
        raise TaskError(f"task {task!r} needs features or images, and these are tokens", got=spec.input_shape)


def finite_number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """Take an option that is a finite number from `least` to `most`.

    Raises:
        TaskError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        fits = False
    else:
        fits = least <= value <= most
    if not fits:
        bounds = [f"of at least {least:g}"] * (least > -math.inf) + [f"of at most {most:g}"] * (most < math.inf)
        raise TaskError(
            f"the task option {name!r} is wrong",
            got=inline(value),
            expected=" ".join(["a finite number", " and ".join(bounds)]),
        )
    assert isinstance(value, int | float)
    return float(value)
