"""Random changes of training inputs, drawn for each example by itself.

All draws come from one NumPy stream, so that a batch changes alike on every device and in every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedtrain.experiment.augment import (
    AugmentationSection,
    ColourAugmentation,
    CropAugmentation,
    CutmixAugmentation,
    EraseAugmentation,
    FlipAugmentation,
    MaskAugmentation,
    MixupAugmentation,
    NoiseAugmentation,
    ReplaceAugmentation,
    RotateAugmentation,
)
from fedtrain.training.batches import Batch
from fedtrain.training.layout import in_layout

__all__ = ["Augmenter"]

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601: how bright red, green and blue are
_LEAST_AREA, _LEAST_RATIO = 0.02, 0.3  # Zhong et al., section 4.2


class Augmenter:
    """Changes batches at random.

    Args:
        sections: the changes, in their order; they suit the inputs, and what mixes examples is the last.
        rng: the stream to draw from.
        layout: in which images are handed on.
    """

    def __init__(
        self,
        sections: Sequence[AugmentationSection],
        rng: np.random.Generator,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._sections, self._rng, self._layout = sections, rng, layout

    def batch(self, batch: Batch) -> Batch:
        """Change the inputs of a batch, and mix its examples where a change does so."""
        inputs = self.inputs(batch.inputs)
        last = self._sections[-1]
        if not last.mixes:
            return batch._replace(inputs=inputs)
        partners = _like(self._rng.permutation(len(inputs)), inputs)
        if isinstance(last, CutmixAugmentation):
            mixed, share = _cutmix(last, inputs, inputs[partners], self._rng)
        else:
            assert isinstance(last, MixupAugmentation), "no other change mixes examples"
            mixed, share = _mixup(last, inputs, inputs[partners], self._rng)
        return batch._replace(inputs=in_layout(mixed, self._layout), mixed=batch.targets[partners], share=share)

    def inputs(self, inputs: Tensor) -> Tensor:
        """Change each example by itself.

        Args:
            inputs: `(B, *input_shape)`, on any device; they stay as they are.
        """
        for section in self._sections:
            if not section.mixes:
                inputs = _CHANGES[type(section)](section, inputs, self._rng)
        return in_layout(inputs, self._layout)


def _flip(section: FlipAugmentation, x: Tensor, rng: np.random.Generator) -> Tensor:
    chosen = _per_example(rng.random(len(x)) < section.probability, x)
    return torch.where(chosen, x.flip(3 if section.axis == "horizontal" else 2), x)


def _crop(section: CropAugmentation, x: Tensor, rng: np.random.Generator) -> Tensor:
    for dim in (2, 3):
        size = x.shape[dim]
        shifts = rng.integers(-section.padding, section.padding, size=(len(x), 1), endpoint=True)
        places = size - 1 - np.abs(size - 1 - np.abs(np.arange(size) + shifts))  # mirrored at both ends
        index = _like(places, x).view(len(x), 1, *((size, 1) if dim == 2 else (1, size)))
        x = x.gather(dim, index.expand_as(x))
    return x


def _rotate(section: RotateAugmentation, x: Tensor, rng: np.random.Generator) -> Tensor:
    angle = np.deg2rad(rng.uniform(-section.degrees, section.degrees, len(x)))
    height, width = x.shape[2:]
    sine, cosine, none = np.sin(angle), np.cos(angle), np.zeros(len(x))
    # The grid's unit is half a side, and sides may differ.
    rows = [[cosine, -sine * height / width, none], [sine * width / height, cosine, none]]
    grid = F.affine_grid(_like(np.moveaxis(np.array(rows), 2, 0), x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _colour(section: ColourAugmentation, x: Tensor, rng: np.random.Generator) -> Tensor:
    def drawn(size: float) -> Tensor:
        return _per_example(rng.uniform(-size, size, len(x)), x)

    if section.brightness:
        x = x + drawn(section.brightness)
    if section.contrast:
        x = x + drawn(section.contrast) * (x - x.mean((1, 2, 3), keepdim=True))
    if section.saturation:
        grey = (x * x.new_tensor(_GREY).view(3, 1, 1)).sum(1, keepdim=True)
        x = x + drawn(section.saturation) * (x - grey)
    return x


def _noise(section: NoiseAugmentation, x: Tensor, rng: np.random.Generator) -> Tensor:
    return x + section.std * _like(rng.standard_normal(x.shape, dtype=np.float32), x)


def _erase(section: EraseAugmentation, x: Tensor, rng: np.random.Generator) -> Tensor:
    height, width = x.shape[2:]
    chosen = rng.random(len(x)) < section.probability
    area = rng.uniform(min(_LEAST_AREA, section.area), section.area, len(x)) * height * width
    ratio = np.exp(rng.uniform(math.log(_LEAST_RATIO), -math.log(_LEAST_RATIO), len(x)))
    tall = np.clip(np.rint(np.sqrt(area * ratio)), 1, height)
    wide = np.clip(np.rint(np.sqrt(area / ratio)), 1, width)
    top, left = (np.floor(rng.random(len(x)) * (room + 1)) for room in (height - tall, width - wide))
    inside = _rectangles((height, width), (top, top + tall), (left, left + wide)) & chosen[:, None, None]
    return x.masked_fill(_like(inside, x)[:, None], 0)


def _mask(section: MaskAugmentation, x: Tensor, rng: np.random.Generator) -> Tensor:
    return x.masked_fill(_like(rng.random(x.shape) < section.share, x), 0)


def _replace(section: ReplaceAugmentation, x: Tensor, rng: np.random.Generator) -> Tensor:
    # Drawn from the example's own tokens: it needs no vocabulary, and no other example, which DP-SGD would not allow.
    others = x.gather(1, _like(rng.integers(x.shape[1], size=x.shape), x))
    return torch.where(_like(rng.random(x.shape) < section.share, x), others, x)


def _mixup(section: MixupAugmentation, x: Tensor, other: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    share = rng.beta(section.alpha, section.alpha, len(x))
    return torch.lerp(other, x, _per_example(share, x)), _like(share, x)


def _cutmix(section: CutmixAugmentation, x: Tensor, other: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    side = np.sqrt(1 - rng.beta(section.alpha, section.alpha, len(x)))

    def cut(length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        # About a place anywhere in the image, so it may lie half outside.
        centre, half = rng.integers(length, size=len(x)), np.floor(side * length) // 2
        return np.maximum(centre - half, 0), np.minimum(centre + half, length)

    inside = _rectangles((x.shape[2], x.shape[3]), cut(x.shape[2]), cut(x.shape[3]))
    return torch.where(_like(inside, x)[:, None], other, x), _like(1 - inside.mean((1, 2)), x)


_Spans = tuple[NDArray[np.float64], NDArray[np.float64]]  # (B,) first pixel, and the one after the last


def _rectangles(size: tuple[int, int], rows: _Spans, columns: _Spans) -> NDArray[np.bool_]:
    """Mark rectangles: `(B, height, width)`."""
    within: list[NDArray[np.bool_]] = []
    for length, (first, end) in zip(size, (rows, columns)):
        places = np.arange(length)
        within.append((places >= first[:, None]) & (places < end[:, None]))
    marked: NDArray[np.bool_] = within[0][:, :, None] & within[1][:, None, :]
    return marked


def _per_example(values: NDArray[np.float64] | NDArray[np.bool_], x: Tensor) -> Tensor:
    """`(B,)` numbers in a shape that broadcasts over `x`."""
    return _like(values, x).view(-1, *[1] * (x.dim() - 1))


def _like(values: NDArray[np.generic], x: Tensor) -> Tensor:
    """Numbers on the device of `x`, fractions in its dtype."""
    found = torch.from_numpy(values)
    return found.to(x.device, x.dtype) if found.is_floating_point() else found.to(x.device)


_CHANGES: dict[type, Callable[[Any, Tensor, np.random.Generator], Tensor]] = {
    FlipAugmentation: _flip,
    CropAugmentation: _crop,
    RotateAugmentation: _rotate,
    ColourAugmentation: _colour,
    NoiseAugmentation: _noise,
    EraseAugmentation: _erase,
    MaskAugmentation: _mask,
    ReplaceAugmentation: _replace,
}
