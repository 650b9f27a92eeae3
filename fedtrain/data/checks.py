"""What data must hold before anything is trained on it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fedtrain.data.base import Dataset
from fedtrain.errors import DataError, nearest

__all__ = ["check_dataset", "check_options"]


def check_options(load: Callable[..., Dataset], options: Mapping[str, Any], source: str) -> None:
    """Check the options of a built-in source against its keyword-only parameters.

    Args:
        load: the source's loader, annotated with the types and ranges of its options.
        options: the section's `options`.
        source: the source's name, for the message.

    Raises:
        DataError: an option is unknown, of a wrong type or out of range.
    """
    types = get_type_hints(load, include_extras=True)
    parameters = inspect.signature(load).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in known:
            raise DataError(f"{source} has no such option", got=name, hint=nearest(name, known))
        try:
            TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as exc:
            raise DataError(f"data.options.{name}: {exc.errors()[0]['msg']}", got=value) from exc


def check_dataset(dataset: Dataset) -> None:
    """Check lengths, dtypes, shapes and ranges of a data set, whoever made it.

    Raises:
        DataError: something does not fit, named with the data set.
    """
    name, spec = dataset.name, dataset.spec
    _check_kinds(dataset)
    if not len(dataset.targets):
        raise DataError(f"{name} has no examples")
    _check_inputs(name, spec.input_shape, dataset.inputs)
    _check_targets(dataset, dataset.inputs, dataset.targets)
    if (dataset.test_inputs is None) != (dataset.test_targets is None):
        raise DataError(f"{name} has only one of test_inputs and test_targets")
    if dataset.test_inputs is not None and dataset.test_targets is not None:
        _check_inputs(name, spec.input_shape, dataset.test_inputs)
        _check_targets(dataset, dataset.test_inputs, dataset.test_targets)
    index = dataset.client_index
    if index is not None and (
        index.dtype != torch.int64
        or index.shape != (len(dataset.targets),)
        or not 0 <= int(index.min()) <= int(index.max()) < len(dataset.client_names)
    ):
        raise DataError(f"client_index of {name} does not fit", expected="(N,) int64 into client_names")
    if len(set(dataset.client_names)) < len(dataset.client_names):
        raise DataError(f"client_names of {name} are not all different")


def _check_kinds(dataset: Dataset) -> None:
    """What an own loader may get wrong where nobody checks types."""
    name, spec = dataset.name, dataset.spec
    for field in ("inputs", "targets", "test_inputs", "test_targets", "client_index"):
        value = getattr(dataset, field)
        if value is None and field not in ("inputs", "targets"):
            continue
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.requires_grad:
            raise DataError(
                f"{field} of {name} is of another kind",
                got=type(value).__name__ if not isinstance(value, Tensor) else f"a tensor on {value.device}",
                expected="a dense torch.Tensor on the CPU that requires no gradient",
            )
    if spec.target not in ("class", "number", "tokens"):
        raise DataError(f"the spec's target of {name} is unknown", got=spec.target, expected="class, number or tokens")
    lists: dict[str, Any] = {
        "client_names": dataset.client_names,
        "class_names": spec.class_names,
        "feature_names": spec.feature_names,
    }
    for field, names in lists.items():
        if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise DataError(f"{field} of {name} is of another kind", got=names, expected="a tuple of texts")
    for field, count in (("class_names", spec.num_classes), ("feature_names", math.prod(spec.input_shape))):
        if lists[field] and len(lists[field]) != count:
            raise DataError(
                f"{field} of {name} does not fit its spec", got=f"{len(lists[field])} names", expected=str(count)
            )


def _check_inputs(name: str, shape: tuple[int, ...], inputs: Tensor) -> None:
    if inputs.shape[1:] != shape or inputs.dtype not in (torch.uint8, torch.float32, torch.int64):
        raise DataError(
            f"the inputs of {name} do not fit its spec",
            got=f"{inputs.dtype} of shape {tuple(inputs.shape)}",
            expected=f"uint8, float32 or int64 of shape {('N', *shape)}",
        )
    if inputs.dtype == torch.int64 and inputs.numel() and int(inputs.min()) < 0:
        raise DataError(f"a token of {name} is below 0", got=int(inputs.min()))
    if inputs.dtype == torch.float32 and torch.isinf(inputs).any():
        column = int(torch.isinf(inputs).flatten(1).any(dim=0).nonzero()[0, 0])
        raise DataError(
            f"{name} has an infinite value in feature {column}", expected="finite numbers, or none (missing)"
        )


def _check_targets(dataset: Dataset, inputs: Tensor, targets: Tensor) -> None:
    spec = dataset.spec
    shape = tuple(inputs.shape) if spec.target == "tokens" else (len(inputs),)
    dtype = torch.float32 if spec.target == "number" else torch.int64
    if targets.shape != shape or targets.dtype != dtype:
        raise DataError(
            f"the targets of {dataset.name} do not fit its spec",
            got=f"{targets.dtype} of shape {tuple(targets.shape)}",
            expected=f"{dtype} of shape {shape}",
        )
    if spec.target == "number":
        if not torch.isfinite(targets).all():
            raise DataError(f"a target of {dataset.name} is missing or not finite")
    elif len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < spec.num_classes:
        raise DataError(
            f"a target of {dataset.name} is out of range",
            got=f"{int(targets.min())} to {int(targets.max())}",
            expected=f"0 to {spec.num_classes - 1}",
        )
