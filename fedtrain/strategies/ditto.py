"""Ditto: FedAvg, and beside it a personal model on each client that is pulled towards the global one.

References:
    Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, algorithm 1:
    client k also takes steps on v_k along the gradient of h_k(v_k; w_t) = F_k(v_k) + lambda/2 |v_k - w_t|^2. The
    personal models change nothing in the global one.
"""

from __future__ import annotations

from fedtrain.experiment.strategies import DittoStrategy
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.fedavg import fedavg
from fedtrain.strategies.fedprox import proximal_rule

__all__ = ["ditto"]


def ditto(section: DittoStrategy) -> FederatedStrategy:
    """Build Ditto: FedAvg for the global model, and FedProx's pull for the personal ones."""
    return FederatedStrategy(fedavg().algorithm, personal_rule=proximal_rule(section.mu))
