"""Penalties on the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtrain.experiment.losses import PenaltySection
from fedtrain.training.rules import Tensors

__all__ = ["penalized"]


def penalized(section: PenaltySection, params: Mapping[str, Tensor], gradients: Tensors) -> Tensors:
    """Add the gradient of the penalties l1 |w| + l2/2 w^2 on weights, which are parameters of two or more dimensions.

    It depends on no example, so it may come after DP-SGD's noise. Where a weight is 0, that of |w| is taken as 0.

    Args:
        section: the factors.
        params: name -> what is trained now.
        gradients: one per parameter; left as they are.
    """
    if not (section.l1 or section.l2):
        return gradients
    places = [place for place, p in enumerate(params.values()) if p.dim() >= 2]
    if not places:
        return gradients
    weights = [p.detach() for p in params.values() if p.dim() >= 2]
    changed = [gradients[place] for place in places]
    if section.l1:
        changed = list(torch._foreach_add(changed, torch._foreach_sign(weights), alpha=section.l1))
    if section.l2:
        changed = list(torch._foreach_add(changed, weights, alpha=section.l2))
    found = dict(zip(places, changed, strict=True))
    return [found.get(place, gradient) for place, gradient in enumerate(gradients)]
