"""What the robust strategies share: their quorum, and the updates of a round side by side, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedtrain.errors import RunError
from fedtrain.params import Params

__all__ = ["ascending", "blocks", "by_coordinate", "check_quorum"]

_BLOCK_ENTRIES = 1 << 18  # 2 MB: stays in a processor's cache, whatever the number of updates


def check_quorum(strategy: str, got: int, needed: int, rule: str, key: str) -> None:
    """Refuse to go on with fewer updates than a strategy's proof assumes.

    Args:
        strategy: its name in the experiment file.
        got: updates of the round.
        needed: the fewest that will do.
        rule: how that follows from the section, such as "2 byzantine + 3".
        key: of the section, to lower.

    Raises:
        RunError: there are fewer.
    """
    if got < needed:
        raise RunError(
            f"{strategy} has too few updates",
            got=got,
            expected=f"at least {rule} = {needed}",
            hint=f"Lower strategy.{key} or ask more clients",
        )


def blocks(deltas: Sequence[Params], name: str) -> Iterator[Tensor]:
    """Yield one tensor of all updates side by side, a few coordinates at a time.

    Args:
        deltas: n updates, at least one.
        name: the tensor.

    Returns:
        float64 copies of shape [n, some coordinates], in the order of the flattened tensor; none for an empty one.
    """
    flat = [delta[name].reshape(-1) for delta in deltas]
    width = max(1, _BLOCK_ENTRIES // len(deltas))
    for start in range(0, flat[0].numel(), width):
        yield torch.stack([tensor[start : start + width] for tensor in flat]).double()


def by_coordinate(deltas: Sequence[Params], like: Params, rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Combine the updates by a rule that treats each coordinate for itself.

    It holds the result and one block beside the updates.

    Args:
        deltas: n updates, at least one.
        like: names, shapes and dtypes of the result.
        rule: [n, some coordinates] -> [as many]; it may write to what it is given.
    """
    combined = {}
    for name, tensor in like.items():
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
        start = 0
        for block in blocks(deltas, name):
            flat[start : start + block.shape[1]] = rule(block)
            start += block.shape[1]
        combined[name] = flat.view(tensor.shape)
    return combined


def ascending(block: Tensor) -> Tensor:
    """Sort each column in place; NumPy's sort is several times as fast here as torch's."""
    block.numpy().sort(axis=0)
    return block
