"""What `[model]` makes of a task's model."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.disk import sha256_of
from fedtrain.errors import InputError, TaskError, shorten
from fedtrain.experiment.model import ModelSection
from fedtrain.experiment.schema import inline
from fedtrain.tasks.checkpointing import checkpoint_modules
from fedtrain.tasks.initialization import initialize, scale_by_gains
from fedtrain.tasks.lora import adapter_names, add_adapters
from fedtrain.tasks.patterns import listed, matching

__all__ = ["adapt", "digests", "trains_in"]

_MOST_PATTERNS = 3  # parts of another model beyond which it has little in common with this one


def adapt(model: nn.Module, section: ModelSection, spec: DataSpec, base: Path) -> nn.Module:
    """Initialise, load, freeze and extend a model as the section says.

    It draws from torch's global generator, which the caller has seeded: the same on the server and on every client.

    Args:
        model: the task's; is changed.
        section: what to do.
        spec: of the data that the model takes.
        base: the experiment file's folder.

    Raises:
        InputError: a file cannot be read, or does not fit the model or the data.
        TaskError: a pattern fits nothing, or nothing would be trained.
    """
    initialize(model, section.init, spec)
    if section.gains is not None:
        scale_by_gains(model, _place(base, section.gains), spec)
    if section.lora is not None:
        model = add_adapters(model, section.lora, spec)
    if section.start is not None:
        _load_start(model, section, _place(base, section.start))
    if section.freeze:
        _freeze(model, section.freeze)
    if section.freeze or section.lora:
        _rest_frozen_statistics(model)
    if section.unfreeze:
        _check_unfreezing(model, section)
    if section.checkpoint:
        checkpoint_modules(model, section.checkpoint)
    return model


def trains_in(section: ModelSection, name: str, round_number: int) -> bool:
    """Whether a parameter that is trained at all is trained in a round."""
    return round_number >= next((n for pattern, n in section.unfreeze.items() if fnmatchcase(name, pattern)), 1)


def digests(section: ModelSection, base: Path) -> dict[str, str]:
    """SHA-256 of each file that initial values come from.

    Raises:
        InputError: there is no such file.
    """
    try:
        return {name: sha256_of(_place(base, name)) for name in section.files}
    except OSError as error:
        raise InputError(
            f"a file of [model] cannot be read ({error.strerror})",
            got=error.filename,
            hint="Paths are relative to the experiment file",
        ) from error


def _place(base: Path, name: str) -> Path:
    return base / Path(name).expanduser()


def _freeze(model: nn.Module, patterns: list[str]) -> None:
    parameters = dict(model.named_parameters())
    for name in matching(patterns, parameters, "model.freeze"):
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise TaskError("model.freeze leaves nothing to train", got=", ".join(patterns))


def _rest_frozen_statistics(model: nn.Module) -> None:
    """Have normalisation layers whose parameters are all frozen use their running statistics, and not change them.

    Else the clients' data would go on moving a layer that is meant to stay as it was pre-trained.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            own = list(module.parameters())
            if own and not any(p.requires_grad for p in own):
                module.register_forward_pre_hook(_rest)  # whoever trains the model sets all of it to training


def _rest(module: nn.Module, _: object) -> None:
    module.eval()


def _check_unfreezing(model: nn.Module, section: ModelSection) -> None:
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    matching(section.unfreeze, trained, "model.unfreeze")
    if not any(trains_in(section, name, 1) for name in trained):
        raise TaskError(
            "model.unfreeze leaves nothing to train in the first round",
            got=", ".join(section.unfreeze),
            expected=f"patterns that leave some of {listed(trained, 12)}",
        )


def _load_start(model: nn.Module, section: ModelSection, path: Path) -> None:
    """Write the tensors of a file into a model by name."""
    given = _renamed(_read(path), section.rename)
    live = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    dropped = matching(section.drop, live | given, "model.drop")
    given = {name: t for name, t in given.items() if name not in dropped}
    fitting = given.keys() & live.keys()
    reached = {id(live[name]) for name in fitting}  # tied tensors may stand in the file once
    fresh = adapter_names(model)
    optional = fresh if fresh.isdisjoint(given) else set()
    missing = [n for n in live if n not in dropped and n not in optional and id(live[n]) not in reached]
    unknown = [name for name in given if name not in live]
    odd = [name for name in live if name in fitting and not _alike(given[name], live[name])]
    if missing or unknown or odd:
        raise _misfit(missing, unknown, odd, given, live)
    if infinite := [n for n, t in given.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise InputError(f"the file of model.start holds numbers that are not finite in {listed(infinite)}", got=path)
    with torch.no_grad():
        for name, tensor in given.items():
            live[name].copy_(tensor)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()


def _misfit(
    missing: list[str], unknown: list[str], odd: list[str], given: Mapping[str, Tensor], live: Mapping[str, Tensor]
) -> InputError:
    shown = [f"{shorten(n)} {tuple(given[n].shape)} and not {tuple(live[n].shape)}" for n in odd]
    kinds = {"it lacks": missing, "it has unknown": unknown, "of another kind are": shown}
    what = "; ".join(f"{kind} {listed(names)}" for kind, names in kinds.items() if names)
    layers = (shorten(name.rpartition(".")[0] + ".*" if "." in name else name) for name in [*odd, *missing, *unknown])
    patterns = list(dict.fromkeys(layers))
    if len(patterns) <= _MOST_PATTERNS and not given.keys() & live.keys() <= set(odd):
        hint = f"Leave parts at their initial values with model.drop = {inline(patterns)}, or match names with "
        hint += "model.rename"
    else:
        hint = "It is of another model, whose own task and options fit; or match names with model.rename"
    if any(name.endswith("lora_a.weight") for name in unknown):
        hint = "Its adapters were trained with model.lora: set the same here, or merge them with fedtrain.tasks.lora"
    return InputError(f"the file of model.start does not fit the task's model: {what}", hint=hint)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        told = str(error).removesuffix(f": {path}")  # safetensors names the file itself
        why = (error.strerror if isinstance(error, OSError) else None) or shorten(told)
        raise InputError(
            f"the file of model.start cannot be read ({why})",
            got=path,
            expected="a whole safetensors file, such as a run's model.safetensors",
            hint="Paths are relative to the experiment file",
        ) from error


def _renamed(tensors: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    """Give tensors the model's names: the first beginning that fits is replaced."""
    for old in rename:
        if not any(name.startswith(old) for name in tensors):
            raise InputError(
                "no name in the file of model.start begins so",
                got=f"model.rename = {old}",
                expected=f"a beginning of {listed(tensors, 12)}",
            )
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = next((rename[old] + name.removeprefix(old) for old in rename if name.startswith(old)), name)
        if new in found:
            raise InputError("model.rename gives two tensors of the file one name", got=new)
        found[new] = tensor
    return found
