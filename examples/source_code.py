"""A loader of your own for sequences: the source of Python's standard library, a client for each module."""

from __future__ import annotations

import importlib
import inspect

import torch

from fedtrain.data.base import Dataset, DataSpec

MODULES = ("argparse", "csv", "dataclasses", "heapq", "json.decoder", "random", "statistics", "textwrap")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


def load(window: int = 32, rows: int = 400, test_rows: int = 40) -> Dataset:
    """Windows of text; the target at each position is the next character.

    Args:
        window: characters of one example.
        rows: training examples of each module, from its beginning.
        test_rows: examples of each module for the common test set, from what follows.
    """
    train, test = [], []
    for name in MODULES:
        text = inspect.getsource(importlib.import_module(name))
        tokens = torch.tensor([CHARACTERS.index(c) for c in text if c in CHARACTERS])
        windows = tokens.unfold(0, window + 1, window)
        split = min(rows, len(windows) - test_rows)
        train.append(windows[:split])
        test.append(windows[split : split + test_rows])
    owner = torch.cat([torch.full((len(windows),), number) for number, windows in enumerate(train)])
    learned, tested = torch.cat(train), torch.cat(test)
    spec = DataSpec((window,), "tokens", len(CHARACTERS), class_names=tuple(CHARACTERS))
    return Dataset(
        "source-code",
        spec,
        learned[:, :-1].contiguous(),
        learned[:, 1:].contiguous(),
        tested[:, :-1].contiguous(),
        tested[:, 1:].contiguous(),
        client_names=MODULES,
        client_index=owner,
    )
