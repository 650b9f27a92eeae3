"""Dropout as an option of the built-in tasks."""

from __future__ import annotations

from torch import nn

from fedtrain.errors import TaskError

__all__ = ["chance", "dropout_layer"]


def chance(value: object) -> float:
    """Take the option `dropout`: a number from 0 to 1, without 1.

    Raises:
        TaskError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise TaskError("the task option 'dropout' is wrong", got=value, expected="a number from 0, and less than 1")
    return float(value)


def dropout_layer(name: str, dropout: float) -> dict[str, nn.Module]:
    """A named layer of dropout; none for 0, so that the model is the one without this option."""
    return {name: nn.Dropout(dropout)} if dropout else {}
