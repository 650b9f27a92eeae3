"""Apply a finished run's model to new inputs: on any machine, without the data that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedtrain.data.base import DataSpec
from fedtrain.data.inputs import read_inputs
from fedtrain.data.prepare import Preparation
from fedtrain.errors import FedtrainError, InputError, RunFolderError, TaskError
from fedtrain.experiment.load import load
from fedtrain.experiment.sections import Experiment
from fedtrain.importing import raised
from fedtrain.rundir import RunFolder
from fedtrain.tasks.adapted import experiment_task
from fedtrain.training.loop import build_model

__all__ = ["Predictions", "predictions"]

_NEXT_TOKENS = 5


class Predictions(NamedTuple):
    """A table of texts.

    Attributes:
        header: the columns' names.
        rows: made one by one, of results that are there already.
        note: what its reader should know; "" for nothing.
    """

    header: tuple[str, ...]
    rows: Iterator[tuple[str, ...]]
    note: str = ""


def predictions(run: Path, inputs: Path) -> Predictions:
    """Apply a run's model to new inputs, which are prepared as training prepared its own.

    Args:
        run: the folder of a complete run.
        inputs: a table, an array, an image or a folder of images, or a text.

    Returns:
        One row per input: what it is called, the predicted class or number, and each class's probability. For
        tokens, one row for each of the likeliest next ones.

    Raises:
        InputError: the run is not complete or was changed, its task's code is missing, or the inputs do not fit.
    """
    folder = RunFolder.open(run)
    tensors = folder.read_model()
    experiment = load(folder.experiment)
    if private := experiment.personalization.private:
        raise InputError(
            "this run's model has parts that never left the clients",
            got=f"personalization.private = {', '.join(private)}",
            expected="a run without them",
            hint="The clients' own parts lie in the run's folder under clients/",
        )
    preparation = folder.read_preparation(Preparation)
    spec = preparation.spec
    names, raw = read_inputs(inputs, experiment.data, preparation)
    model = _model(experiment, spec, Path(folder.read_manifest().base_folder), tensors)
    outputs = _outputs(model, preparation, raw, experiment.evaluation.batch_size)
    names = list(map(_printable, names))
    labels = _labels(spec)
    note = ""
    if preparation.scaled_per_client:
        note = f"these {len(raw)} rows are scaled by their own mean and deviation, as each client's were in training"
        note += ": what is predicted for one depends on the others"
    if spec.target == "number":
        return Predictions(("row", "prediction"), zip(names, map(str, outputs.numpy())), note)
    if spec.target == "tokens":
        return Predictions(("row", "rank", "prediction", "p"), _likeliest(names, outputs, labels))
    header = ("row", "prediction", *(f"p({label})" for label in labels))
    return Predictions(header, _classes(names, outputs, labels), note)


def _model(experiment: Experiment, spec: DataSpec, base: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build the task's model and give it the run's tensors; the task's code may have moved to the current folder."""
    name = experiment.task.name
    file = name.rpartition(":")[0]
    if file.endswith(".py") and not (base / file).is_file():
        if not Path(file).is_file():
            raise TaskError(
                "the code of this run's own task is not here",
                got=name,
                expected=f"{file} in {base} or in the current folder",
                hint="Copy it there, or run from the folder that holds it",
            )
        base = Path.cwd()
    # The run's own tensors replace all initial values: no file that these came from is needed any more.
    bare = experiment.model_copy(update={"model": experiment.model.without_files()})
    task = experiment_task(bare, spec, base)
    if getattr(task, "output_names", None):
        raise InputError("this task's model does not predict the target", got=name)
    try:
        model = build_model(task, experiment.seed).eval()
    except Exception as exc:
        raise raised(f"building the model of {name}", exc, TaskError) from exc
    try:
        model.load_state_dict(tensors)
    except RuntimeError as exc:
        what = "the run's model does not fit its task: the task's code has changed"
        raise RunFolderError(what, got=name, hint="Bring the old code back") from exc
    return model


@torch.inference_mode()
def _outputs(model: nn.Module, preparation: Preparation, raw: Tensor, batch_size: int) -> Tensor:
    """`(N, classes)` logits or `(N,)` numbers; for tokens `(N, tokens)` logits of the one after the last.

    Raises:
        TaskError: the model fails, or gives neither.
        InputError: what it gives is not finite.
    """
    # Features are filled and scaled as one client's are, all at once. Pixels are prepared batch by batch: that takes
    # four times their memory.
    at_once = raw.dtype == torch.float32
    rows = preparation.apply(raw, fitted_on=raw) if at_once else raw
    parts = []
    try:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            outputs = model(batch if at_once else preparation.apply(batch, fitted_on=batch))
            parts.append(_reduced(outputs, len(batch), preparation.spec))
    except FedtrainError:
        raise
    except Exception as exc:
        raise raised("applying the model", exc, TaskError) from exc
    outputs = torch.cat(parts)
    wrong = ~outputs.reshape(len(outputs), -1).isfinite().all(dim=1)
    if wrong.any():
        raise InputError(
            f"the model gives no finite number for row {int(wrong.nonzero()[0]) + 1}",
            hint="If it does so for every row, the run has diverged: see its report",
        )
    return outputs


def _reduced(outputs: Tensor, size: int, spec: DataSpec) -> Tensor:
    """Bring a batch's outputs, also those of a user's own model, into the shape that `_outputs` promises."""
    outputs = outputs.float()
    shape = tuple(outputs.shape)
    one_each = shape in ((size,), (size, 1))
    if spec.target == "number":
        expected = f"({size},)"
        if one_each:
            return outputs.reshape(size)
    elif spec.target == "tokens":
        expected = f"({size}, positions, {spec.num_classes})"
        if len(shape) == 3 and shape[::2] == (size, spec.num_classes):
            return outputs[:, -1]
    else:
        expected = f"({size}, {spec.num_classes})"
        if shape == (size, spec.num_classes):
            return outputs
        if one_each and spec.num_classes == 2:
            # A logit z of class 1 against class 0 is the same as the logits 0 and z.
            return torch.stack([torch.zeros(size), outputs.reshape(size)], dim=1)
    raise TaskError("the model's outputs do not suit the target", got=f"shape {shape}", expected=expected)


def _classes(names: Sequence[str], logits: Tensor, labels: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for name, likeliest, probabilities in zip(names, logits.argmax(1).tolist(), logits.softmax(1).numpy()):
        yield name, labels[likeliest], *map(str, probabilities)


def _likeliest(names: Sequence[str], logits: Tensor, labels: Sequence[str]) -> Iterator[tuple[str, ...]]:
    probabilities, tokens = logits.softmax(1).sort(dim=1, descending=True, stable=True)
    for name, likeliest, row in zip(names, tokens[:, :_NEXT_TOKENS].tolist(), probabilities.numpy()):
        for rank, (token, probability) in enumerate(zip(likeliest, row), start=1):
            yield name, str(rank), labels[token], str(probability)


def _labels(spec: DataSpec) -> list[str]:
    """Names of the classes or tokens, or their numbers where they have none."""
    return list(map(_printable, spec.class_names)) or list(map(str, range(spec.num_classes)))


def _printable(text: str) -> str:
    """Spell out what is no printable character: a name cannot steer the terminal, and a newline stays on its line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
