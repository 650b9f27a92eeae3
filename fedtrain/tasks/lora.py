"""Low-rank adapters beside frozen Linear layers.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.experiment.model import LoraSection
from fedtrain.importing import raised
from fedtrain.tasks.patterns import listed, matching

__all__ = ["LoraLinear", "adapter_names", "add_adapters", "merged"]

_A, _B = "lora_a.weight", "lora_b.weight"


class LoraLinear(nn.Linear):
    """A Linear layer and its adapter: y = W x + b + alpha / rank * B A x.

    W and b keep their names. A and B are Linear layers without a bias, so that whoever takes the gradients of single
    examples sees layers that it knows. A starts as He et al. have it and B at zero: at first the adapter adds nothing.

    Args:
        layer: whose weight and bias it takes over.
        section: the adapter's rank, scale and dropout.
    """

    def __init__(self, layer: nn.Linear, section: LoraSection) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_dropout = nn.Dropout(section.dropout)
        self.lora_a = nn.Linear(layer.in_features, section.rank, bias=False).to(layer.weight)
        self.lora_b = nn.Linear(section.rank, layer.out_features, bias=False).to(layer.weight)
        self.scale = section.alpha / section.rank
        nn.init.kaiming_uniform_(self.lora_a.weight)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """`(..., in)` to `(..., out)`."""
        added: Tensor = self.lora_b(self.lora_a(self.lora_dropout(input)))
        return super().forward(input) + self.scale * added


def add_adapters(model: nn.Module, section: LoraSection, spec: DataSpec) -> nn.Module:
    """Give Linear layers their adapters, and freeze all but these and `section.train`.

    Args:
        model: is changed.
        section: which layers, and how wide.
        spec: of the data that the model takes.

    Returns:
        The model; another one only where it is a single Linear layer.

    Raises:
        TaskError: a pattern fits nothing, or a layer's weight is read without a call of the layer.
    """
    layers = {path: m for path, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    if not layers:
        raise TaskError("model.lora needs a model with Linear layers", got=type(model).__name__)
    chosen = matching(section.layers, layers, "model.lora.layers")
    trained = matching(section.train, dict(model.named_parameters()), "model.lora.train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    made: dict[nn.Module, LoraLinear] = {}
    for path, layer in layers.items():
        if path in chosen:
            if layer not in made:  # the same layer may stand in several places
                made[layer] = LoraLinear(layer, section)
            model = _replace(model, path, made[layer])
    _refuse_unused(model, spec)
    return model


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the adapters' parameters."""
    found = [path for path, module in model.named_modules() if isinstance(module, LoraLinear)]
    return {f"{path}.{name}".lstrip(".") for path in found for name in (_A, _B)}


def merged(tensors: Mapping[str, Tensor], section: LoraSection) -> dict[str, Tensor]:
    """Add each adapter to the weight that it stands beside: the tensors of the same model without adapters.

    Args:
        tensors: of a run's model.safetensors.
        section: `model.lora` of the run's experiment.
    """
    plain = {name: t for name, t in tensors.items() if not name.endswith((_A, _B))}
    for name, a in tensors.items():
        if name.endswith(_A):
            stem = name.removesuffix(_A)
            plain[f"{stem}weight"] = plain[f"{stem}weight"] + section.alpha / section.rank * (tensors[stem + _B] @ a)
    return plain


def _replace(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


@torch.no_grad()
def _refuse_unused(model: nn.Module, spec: DataSpec) -> None:
    """Find adapters that the model goes past, for it reads the weights beside them without calling their layer.

    No module may have a hook of its own: it would make fedtrain's LSTM and torch's transformer call layers that they
    go past otherwise. The model is in evaluation, where torch's transformer does so.
    """
    adapters = {path: m for path, m in model.named_modules() if isinstance(m, LoraLinear)}
    used: set[nn.Module] = set()
    handle = register_module_forward_hook(lambda module, *_: used.add(module))
    training = [module for module in model.modules() if module.training]
    kind = torch.int64 if spec.target == "tokens" else torch.float32
    try:
        model.eval()(torch.zeros((2, *spec.input_shape), dtype=kind))
    except Exception as exc:
        raise raised("trying the model with model.lora", exc, TaskError) from exc
    finally:
        handle.remove()
        for module in training:
            module.training = True
    if unused := [path for path, module in adapters.items() if module.lora_b not in used]:
        called = [path for path in adapters if path not in unused]
        raise TaskError(
            "model.lora cannot adapt layers whose weights the model reads without calling them: "
            + listed(unused, most=12),
            hint=f"Choose others: model.lora.layers, such as {called[-1]}" if called else None,
        )
