"""Two loaders of your own for more than one answer: their classes are named after what they are made of.

A table needs no loader for that: a column of texts such as "rain+wind" or "7/odd" will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fedtrain.data.base import Dataset
from fedtrain.data.sources import load_dataset
from fedtrain.experiment.sections import DataSection

LABELS: dict[str, Callable[[int], bool]] = {
    "even": lambda digit: digit % 2 == 0,
    "prime": lambda digit: digit in (2, 3, 5, 7),
    "large": lambda digit: digit >= 5,
    "loop": lambda digit: digit in (0, 6, 8, 9),
}


def labels() -> Dataset:
    """Handwritten digits; what is true of a digit are its labels: "even+prime" for 2, "none" for 1."""
    return _named(lambda digit: "+".join(name for name, holds in LABELS.items() if holds(digit)) or "none")


def digit_and_parity() -> Dataset:
    """Handwritten digits; two classes for each: "7/odd"."""
    return _named(lambda digit: f"{digit}/{'odd' if digit % 2 else 'even'}")


def _named(name: Callable[[int], str]) -> Dataset:
    digits = load_dataset(DataSection(name="digits", clients=1), None, Path(), 0)
    names = [name(digit) for digit in range(10)]
    classes = sorted(set(names))
    numbers = torch.tensor([classes.index(name) for name in names])
    spec = replace(digits.spec, num_classes=len(classes), class_names=tuple(classes))
    return replace(digits, name="digits", spec=spec, targets=numbers[digits.targets])
