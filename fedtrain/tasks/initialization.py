"""Initial weights: `init` and `gains` of `[model]`.

All that is random comes from torch's global generator, in the order of the model's parameters.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import InputError, TaskError, shorten
from fedtrain.experiment.model import InitSection, LsuvInit, OrthogonalInit, TaskInit
from fedtrain.importing import raised
from fedtrain.tasks.patterns import listed

__all__ = ["initialize", "scale_by_gains"]

_SCALED = (nn.Linear, nn.modules.conv._ConvNd)
_KINDS = (*_SCALED, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_INPUTS = 256  # random inputs that outputs are measured on
_LEAST_VARIANCE = 1e-12  # of outputs that are not always the same


@torch.no_grad()
def initialize(model: nn.Module, section: InitSection, spec: DataSpec) -> None:
    """Draw the weights of Linear, convolutional and recurrent layers anew, and set their biases to zero.

    Matrices that lie one below the other in one weight, such as those of an LSTM's gates, are drawn each by itself.
    torch's recurrent layers and attention are known; a module of one's own tells of its Linear layers by an attribute
    `stacked = {"inputs": 4}`: name -> number of matrices.

    Args:
        model: is changed; layers of other kinds, such as embeddings and normalisation, stay as they are.
        section: how to draw.
        spec: of the data that the model takes.

    Raises:
        TaskError: the model has no such layer; for lsuv, it fails on random inputs.
    """
    if isinstance(section, TaskInit):
        return
    rule = OrthogonalInit(name="orthogonal") if isinstance(section, LsuvInit) else section
    weights = list(_weights(model))
    if not weights:
        raise TaskError(
            f'model.init.name = "{section.name}" finds nothing to draw',
            got=f"{type(model).__name__} without Linear, convolutional or recurrent layers",
            expected='model.init.name = "task"',
        )
    for module, weight, count in weights:
        for matrix in weight.chunk(count):
            if isinstance(rule, OrthogonalInit):
                nn.init.orthogonal_(matrix, rule.gain)
                continue
            inputs, outputs = _fans(module, matrix)
            variance = {"xavier": 2 / (inputs + outputs), "he": 2 / inputs, "lecun": 1 / inputs}[rule.name]
            deviation = rule.gain * math.sqrt(variance)
            if rule.distribution == "normal":
                matrix.normal_(0, deviation)
            else:
                matrix.uniform_(-math.sqrt(3) * deviation, math.sqrt(3) * deviation)
    if isinstance(section, LsuvInit):
        _scale_outputs(model, spec)


@torch.no_grad()
def scale_by_gains(model: nn.Module, path: Path, spec: DataSpec) -> None:
    """Scale the weights of a model's first layer by the information gains of the features that they belong to.

    Gains are divided by the root of their mean square, which leaves the variance of outputs as it was where features
    are alike.

    Args:
        model: its first Linear layer takes the features; is changed.
        path: a CSV file with the columns feature and gain.
        spec: names the features.

    Raises:
        InputError: the file cannot be read, or does not name each feature once with a number of at least 0.
        TaskError: the first layer does not take features with names.
    """
    names = spec.feature_names
    first = next((module for module in model.modules() if isinstance(module, nn.Linear)), None)
    if first is None or not names or first.in_features != len(names):
        raise TaskError(
            "model.gains needs features with names, and a first Linear layer that takes them",
            got=f"{len(names)} named features, "
            + (f"and a first layer of {first.in_features} inputs" if first else "and no Linear layer"),
        )
    gains = torch.tensor(_read_gains(path, names), dtype=torch.float64)
    first.weight.mul_((gains / gains.square().mean().sqrt()).to(first.weight))


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor, int]]:
    """Yield each weight with its module and the number of matrices in it; set biases to zero on the way."""
    for path, parameter in model.named_parameters():
        owner, _, name = path.rpartition(".")
        module: Any = model.get_submodule(owner)
        if not isinstance(module, _KINDS):
            continue
        if parameter.dim() < 2 or "bias" in name:
            parameter.zero_()
            continue
        if isinstance(module, _SCALED):
            parent, _, child = owner.rpartition(".")
            yield module, parameter, getattr(model.get_submodule(parent), "stacked", {}).get(child, 1)
        else:
            rows = module.embed_dim if isinstance(module, nn.MultiheadAttention) else module.hidden_size
            yield module, parameter, max(1, len(parameter) // rows)


def _fans(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Inputs of one output and outputs of one input, as torch counts them."""
    outputs, inputs = weight.shape[:2]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        outputs, inputs = inputs, outputs
    field = weight[0, 0].numel()
    return inputs * field, outputs * field


def _scale_outputs(model: nn.Module, spec: DataSpec) -> None:
    """Give the outputs of each layer variance 1, in the order in which they are called.

    Without biases outputs are proportional to weights: one pass does it, where the paper repeats it until it fits.

    References:
        Mishkin and Matas, "All You Need Is a Good Init", ICLR 2016, algorithm 1.
    """
    done: set[nn.Module] = set()

    def scale(module: nn.Module, _: object, output: Tensor) -> Tensor | None:
        variance = float(output.var())
        if module in done or not _LEAST_VARIANCE < variance < math.inf:
            return None
        done.add(module)
        parameter: Any = module.weight
        parameter.div_(math.sqrt(variance))
        return output / math.sqrt(variance)

    shape = (_INPUTS, *spec.input_shape)
    inputs = torch.randint(spec.num_classes, shape) if spec.target == "tokens" else torch.randn(shape)
    handles = [module.register_forward_hook(scale) for module in model.modules() if isinstance(module, _SCALED)]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()(inputs)
    except Exception as exc:
        raise raised('trying the model on random inputs for model.init.name = "lsuv"', exc, TaskError) from exc
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _read_gains(path: Path, names: Sequence[str]) -> list[float]:
    """Read the gain of each feature, in the order of `names`."""
    field = "the file of model.gains"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"feature", "gain"} <= set(reader.fieldnames or ()):
                raise InputError(f"{field} lacks a column", got=path, expected="the columns feature and gain")
            rows = [(row["feature"], row["gain"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        hint = "Name a CSV file in UTF-8; its path counts from the experiment file's folder"
        raise InputError(f"{field} cannot be read ({why})", got=path, hint=hint) from error
    gains: dict[str, float] = {}
    for name, text in rows:
        if name in gains:
            raise InputError(f"{field} names a feature twice", got=name)
        gains[name] = _gain(name, text)
    faults = {"lacks": [n for n in names if n not in gains], "has unknown": [n for n in gains if n not in names]}
    if odd := "; ".join(f"{word} {listed(found)}" for word, found in faults.items() if found):
        raise InputError(f"{field} does not name each feature of the data: it {odd}", got=path)
    if not any(gains.values()):
        raise InputError(f"{field} would set the first layer to zero", got=path, expected="a gain above 0")
    return [gains[name] for name in names]


def _gain(name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(
            f"the gain of {shorten(name)} is wrong", got=text or "nothing", expected="a number of at least 0"
        )
    return value
