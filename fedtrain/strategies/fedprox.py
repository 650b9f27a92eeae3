"""FedProx: FedAvg whose local training is pulled towards the server's model.

References:
    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
    algorithm 2: client k minimises h_k(w; w_t) = F_k(w) + mu/2 |w - w_t|^2 (equation 2), not always to the end. The
    server weighs by examples, as in the paper's experiments.
"""

from __future__ import annotations

import torch

from fedtrain.experiment.strategies import FedProxStrategy
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.fedavg import fedavg
from fedtrain.training.rules import LocalRule, LocalStart, Tensors

__all__ = ["fedprox", "proximal_rule", "pulled"]


def fedprox(section: FedProxStrategy) -> FederatedStrategy:
    """Build FedProx: FedAvg's server, and clients with a proximal term."""
    return FederatedStrategy(fedavg().algorithm, local_rule=proximal_rule(section.mu))


def proximal_rule(mu: float) -> LocalRule:
    """Add the gradient of mu/2 |w - w_t|^2, where w_t are the server's values."""

    def begin(start: LocalStart) -> Tensors:
        return torch._foreach_mul(start.values, mu)

    def correct_gradient(offset: Tensors, trained: Tensors, gradients: Tensors) -> Tensors:
        return pulled(gradients, trained, mu, offset)

    return LocalRule(begin, correct_gradient)


@torch.no_grad()
def pulled(gradients: Tensors, trained: Tensors, strength: float, offset: Tensors) -> Tensors:
    """Compute `gradients + strength * trained - offset`: a pull towards `offset / strength`.

    The product with the fixed end of the pull is made once a round, so that a step takes two passes and one allocation.
    """
    corrected = torch._foreach_sub(gradients, offset)  # new tensors: two gradients may share memory
    torch._foreach_add_(corrected, trained, alpha=strength)
    return corrected
