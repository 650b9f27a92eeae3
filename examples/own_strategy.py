"""An own strategy: between one vote per client and one vote per example, with momentum on the server.

fedtrain calls `build(**options)` with the options of `[strategy]` in own-strategy.toml.
Run it with: fedtrain simulate examples/own-strategy.toml
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.nn.utils import get_total_norm

from fedtrain.params import Params, RunningMean, add, zeros_like
from fedtrain.strategies.base import Algorithm, FederatedStrategy, State
from fedtrain.training.rules import LocalRule, LocalStart, Tensors
from fedtrain.wire import Update


def build(power: float = 0.5, momentum: float = 0.0, max_grad_norm: float | None = None) -> FederatedStrategy:
    """Weigh each update by its number of examples to a power; clip gradients on the clients.

    Args:
        power: 1 is FedAvg, 0 counts every client alike.
        momentum: part of the last step that the server repeats.
        max_grad_norm: L2 norm to which a client's longer gradients are scaled down, if given.
    """

    def init(params: Params) -> State:
        """What the server remembers between rounds; a checkpoint keeps it."""
        return {"step": zeros_like(params)}

    def apply(state: State, params: Params, updates: Iterable[Update]) -> tuple[Params, State]:
        """Once per round: the next model, and what to remember. `delta` is the client's model minus the server's."""
        total = RunningMean(like=params)  # averages as updates come, so that no list of models is held
        for update in updates:
            total.add(update.delta, weight=update.num_examples**power)
        if total.weight == 0:  # no update came
            return params, state
        mean = total.mean()
        step = {name: momentum * last + mean[name] for name, last in state["step"].items()}
        return add(params, step), {"step": step}

    return FederatedStrategy(Algorithm(init, apply), clipping(max_grad_norm) if max_grad_norm else None)


def clipping(max_grad_norm: float) -> LocalRule:
    """The clients' half; leave it out where clients train as usual."""

    def begin(_start: LocalStart) -> None:
        """At the start of a client's round: nothing to prepare."""

    def correct_gradient(_begun: None, _parameters: Tensors, gradients: Tensors) -> Tensors:
        """Before each step of the optimiser."""
        factor = (max_grad_norm / (get_total_norm(gradients) + 1e-12)).clamp(max=1.0)
        return [gradient * factor for gradient in gradients]

    return LocalRule(begin, correct_gradient)
