"""Named tensors: what a client and the server exchange, and the few sums that strategies are made of."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "Params",
    "RunningMean",
    "add",
    "difference",
    "exchanged",
    "is_private",
    "l2_norm",
    "load",
    "scaled",
    "snapshot",
    "zeros_like",
]

Params = Mapping[str, Tensor]

_CHUNK = 1 << 16  # entries: 512 KB in float64, which stays in a processor's cache


def exchanged(model: nn.Module) -> dict[str, Tensor]:
    """Name the tensors of a model that federated training changes, as live views in the model's own order.

    These are the parameters that require a gradient and the floating-point buffers that are saved with the model.
    Frozen parameters are the same on every client from the start, and integer buffers (counters) have no average.

    Args:
        model: any module; tied parameters appear once.

    Returns:
        name -> tensor that shares memory with the model.
    """
    live = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    if buffers:
        saved = model.state_dict(keep_vars=True)
        live |= {name: b for name, b in buffers.items() if name in saved}
    return live


def is_private(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter stays on the client: its name matches a pattern such as "head.*"."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def snapshot(params: Params) -> dict[str, Tensor]:
    """Copy to contiguous CPU tensors that nothing else writes to."""
    return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in params.items()}


def load(model: nn.Module, params: Params) -> None:
    """Write `params` into a model.

    Args:
        model: the module to change.
        params: of the names of `exchanged(model)`, with equal shapes; the others stay as they are.
    """
    live = exchanged(model)
    assert live.keys() >= params.keys(), "the gate and the wire check names before this"
    if params:
        torch._foreach_copy_([live[name] for name in params], list(params.values()))


def add(params: Params, delta: Params) -> dict[str, Tensor]:
    """`params + delta`, by name, as new tensors of the dtypes of `params`."""
    return {name: t + delta[name].to(t.dtype) for name, t in params.items()}


def difference(params: Params, other: Params) -> dict[str, Tensor]:
    """`params - other`, by name, as new tensors."""
    return {name: t - other[name] for name, t in params.items()}


def scaled(params: Params, factor: float) -> dict[str, Tensor]:
    """`factor * params`, by name, as new tensors of the same dtypes."""
    return {name: (t * factor).to(t.dtype) for name, t in params.items()}


def zeros_like(params: Params) -> dict[str, Tensor]:
    """Zeros of the same names, shapes and dtypes."""
    return {name: torch.zeros_like(t) for name, t in params.items()}


def l2_norm(params: Params, origin: Params | None = None) -> float:
    """Euclidean norm over all tensors as one vector, in float64; NaN or inf if any entry is.

    Args:
        params: the vector.
        origin: from where it is measured, of the same names and shapes; zero unless given.
    """
    wide = torch.empty(_CHUNK, dtype=torch.float64)
    total = 0.0
    for name, t in params.items():
        starts = torch.split(origin[name].reshape(-1), _CHUNK) if origin else itertools.repeat(None)
        for chunk, start in zip(torch.split(t.reshape(-1), _CHUNK), starts):
            values = wide[: chunk.numel()].copy_(chunk)
            if start is not None:
                values -= start
            total += float(values.dot(values))
    return math.sqrt(total)


class RunningMean:
    """A weighted mean that holds one model however many are added, in one pass over each.

    Each addition moves the mean towards what is added by its share of the weight so far. Hence one model, or many equal
    ones, come back to the last bit, and there is no sum whose rounding grows with the weights. Half precisions are
    averaged in float32. The last bits depend on the order of `add`, so callers add in client order.

    Args:
        like: names, shapes and dtypes of the result.

    References:
        Welford, "Note on a Method for Calculating Corrected Sums of Squares and Products", Technometrics 1962.
    """

    def __init__(self, like: Params) -> None:
        self._like = like
        self._mean = {name: torch.zeros(t.shape, dtype=_wide(t.dtype)) for name, t in like.items()}
        self.weight = 0.0

    def add(self, params: Params, weight: float) -> None:
        """Take in `params` with a weight of at least 0."""
        if weight == 0:
            return
        self.weight += weight
        for name, mean in self._mean.items():
            mean.lerp_(params[name].to(mean.dtype), weight / self.weight)

    def mean(self) -> dict[str, Tensor]:
        """The mean of what was added; zeros if nothing was."""
        return {name: t.to(self._like[name].dtype) for name, t in self._mean.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
