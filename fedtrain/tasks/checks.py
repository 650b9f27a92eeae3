"""What a task demands of its data and its options, refused in one line each."""

from __future__ import annotations

from collections.abc import Sequence

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.experiment.schema import inline

__all__ = ["needs_classes", "needs_images", "needs_numbers", "needs_tokens", "positive_int", "widths"]


def needs_classes(task: str, spec: DataSpec) -> None:
    """Refuse data whose target is not one of two or more classes.

    Raises:
        TaskError: it is not; names the tasks that suit the data.
    """
    if spec.target != "class":
        raise _refusal(task, "needs classes to predict", f"the target {spec.target!r}", spec)
    if spec.num_classes < 2:
        raise TaskError(f"task {task!r} needs at least two classes", got=spec.num_classes)


def needs_images(task: str, spec: DataSpec, least: int = 1) -> None:
    """Refuse data that are not images `(C, H, W)` of at least `least` pixels a side, with classes.

    Raises:
        TaskError: they are not; names the tasks that suit the data.
    """
    needs_classes(task, spec)
    if len(spec.input_shape) != 3:
        raise _refusal(task, "needs images (C, H, W)", f"inputs of shape {spec.input_shape}", spec)
    if min(spec.input_shape[1:]) < least:
        raise TaskError(
            f"task {task!r} needs images of at least {least} x {least} pixels",
            got=f"inputs of shape {spec.input_shape}",
            hint="mlp and resnet18-gn take images of any size",
        )


def needs_numbers(task: str, spec: DataSpec) -> None:
    """Refuse data whose target is not a number.

    Raises:
        TaskError: it is not; names the tasks that suit the data.
    """
    if spec.target != "number":
        needs = 'needs a number to predict (of your own data: data.target_type = "number")'
        raise _refusal(task, needs, f"the target {spec.target!r}", spec)


def needs_tokens(task: str, spec: DataSpec) -> None:
    """Refuse data that are not token sequences `(T,)` with one target per position.

    Raises:
        TaskError: they are not; names the tasks that suit the data.
    """
    if spec.target != "tokens" or len(spec.input_shape) != 1:
        got = f"inputs of shape {spec.input_shape} with the target {spec.target!r}"
        raise _refusal(task, "needs text: tokens (T,) with one target each", got, spec)


def positive_int(name: str, value: object) -> int:
    """Take an option that is a whole number above 0.

    Raises:
        TaskError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TaskError(f"the task option {name!r} is wrong", got=inline(value), expected="an integer greater than 0")
    return value


def widths(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """Take an option that gives the widths of hidden layers: one number or a list of them.

    Raises:
        TaskError: it is not.
    """
    several: Sequence[int] = value if isinstance(value, list | tuple) else (value,)
    try:
        return tuple(positive_int(name, width) for width in several)
    except TaskError as exc:
        raise TaskError(
            f"the task option {name!r} is wrong",
            got=inline(value),
            expected="an integer greater than 0, or a list of them such as [200, 200]",
        ) from exc


def _refusal(task: str, needs: str, got: str, spec: DataSpec) -> TaskError:
    if spec.target == "class":
        images = ", cnn, simple-cnn, resnet18-gn" if len(spec.input_shape) == 3 else ""
        suitable = f"logistic, mlp{images}"
    else:
        suitable = {"number": "regressor", "tokens": "char-lstm, transformer"}[spec.target]
    return TaskError(f"task {task!r} {needs}", got=got, hint=f"Tasks for this data: {suitable}")
