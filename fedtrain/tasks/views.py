"""Random views of inputs, for tasks that compare an example with itself.

They draw from torch's global generator, which the training loop has seeded, unless they are given another one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["random_view"]

_SHIFT = 8  # an image moves by up to one part in so many of its side
_ERASED = 0.4  # side of the patch that is erased, as a share of the image's
_MASKED = 0.3  # share of the features of a table that are masked
_NOISE = 0.1


def random_view(inputs: Tensor, generator: Generator | None = None) -> Tensor:
    """Move each image, erase a patch of it and add noise; mask features and add noise to them.

    Args:
        inputs: `(B, C, H, W)` images, or `(B, ...)` features in standard units.
        generator: to draw from; torch's global one unless given.

    Returns:
        As `inputs`; each example is changed by itself.

    References:
        DeVries, Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017.
        Bahri et al., SCARF: Self-Supervised Contrastive Learning Using Random Feature Corruption, ICLR 2022.
    """
    if inputs.ndim == 4:
        return _noised(_erased(_shifted(inputs, generator), generator), generator)
    kept = torch.rand(inputs.shape, generator=generator, device=inputs.device) >= _MASKED
    return _noised(inputs, generator) * kept


def _noised(inputs: Tensor, generator: Generator | None) -> Tensor:
    noise = torch.randn(inputs.shape, generator=generator, device=inputs.device, dtype=inputs.dtype)
    return inputs + _NOISE * noise


def _shifted(images: Tensor, generator: Generator | None) -> Tensor:
    """Move each image by its own whole number of pixels; its edge fills the gap."""
    size, channels, height, width = images.shape
    most = (max(1, height // _SHIFT), max(1, width // _SHIFT))
    device = images.device
    padded = F.pad(images, (most[1], most[1], most[0], most[0]), mode="replicate")
    down, right = (torch.randint(2 * m + 1, (size, 1), generator=generator, device=device) for m in most)
    rows = (torch.arange(height, device=device) + down)[:, None, :, None]
    columns = (torch.arange(width, device=device) + right)[:, None, None, :]
    example = torch.arange(size, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[example, channel, rows, columns]


def _erased(images: Tensor, generator: Generator | None) -> Tensor:
    """Set a patch of each image to zero, which is the mean of pixels that are in standard units."""
    kept = []
    for side in images.shape[2:]:
        patch = max(1, round(_ERASED * side))
        first = torch.randint(side - patch + 1, (len(images), 1), generator=generator, device=images.device)
        place = torch.arange(side, device=images.device)
        kept.append((place >= first) & (place < first + patch))
    return images.masked_fill((kept[0][:, :, None] & kept[1][:, None, :])[:, None], 0)
