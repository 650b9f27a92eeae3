"""A task of your own with a training hook: a policy learns to balance poles, each client one with other physics.

An input says what an environment is like; there are no targets. The model plays in it: what it gives for an environment
is how long it keeps the pole up. A step of training plays too, and makes the moves that went well more likely.

References:
    Barto, Sutton, Anderson, Neuronlike Adaptive Elements That Can Solve Difficult Learning Control Problems, 1983.
    Williams, Simple Statistical Gradient-Following Algorithms (REINFORCE), Machine Learning 1992.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedtrain.data.base import Dataset, DataSpec
from fedtrain.seeds import generator
from fedtrain.tasks import Metric

GRAVITY, CART, FORCE, SECONDS = 9.8, 1.0, 10.0, 0.02  # m/s^2, kg, N, s of one move
WIDEST, FURTHEST = 0.2095, 2.4  # rad and m, where an episode ends


def environments(clients: int = 8, episodes: int = 32, test: int = 100, seed: int = 0) -> Dataset:
    """Rows (half the pole's length in m, its mass in kg, and the start: place, speed, angle, turning).

    Args:
        clients: each has a pole of its own, of 0.25 to 1 m and 0.05 to 0.2 kg.
        episodes: starts of each client.
        test: starts of the test set, each with a pole that no client has.
        seed: of all that is drawn.
    """
    rng = generator(seed, "poles")
    low, high = [0.25, 0.05], [1.0, 0.2]
    own = rng.uniform(low, high, (clients, 2)).repeat(episodes, axis=0)
    starts = rng.uniform(-0.05, 0.05, (clients * episodes + test, 4))
    poles = np.concatenate([own, rng.uniform(low, high, (test, 2))])
    rows = torch.from_numpy(np.concatenate([poles, starts], 1)).float()
    names = ("half_length", "mass", "place", "speed", "angle", "turning")
    train = clients * episodes
    return Dataset(
        "poles",
        DataSpec((6,), "number", feature_names=names),
        rows[:train],
        torch.zeros(train),
        rows[train:],
        torch.zeros(test),
        client_names=tuple(f"pole-{number}" for number in range(clients)),
        client_index=torch.arange(train) // episodes,
    )


class Balance:
    """REINFORCE with the mean over the batch as its baseline.

    Args:
        spec: of `environments`.
        moves: most moves of an episode.
        hidden: width of the policy's hidden layer.
        discount: of a move's later rewards.
    """

    output_names = ("moves",)

    def __init__(self, spec: DataSpec, moves: int = 200, hidden: int = 32, discount: float = 0.98) -> None:
        self.moves, self.hidden, self.discount = moves, hidden, discount

    def model(self) -> nn.Module:
        return Player(self.hidden, self.moves)

    def batch_loss(self, model: Player, inputs: Tensor, targets: Tensor) -> Tensor:
        """What a training step minimises, (B,): here it needs the model at every move, not its output."""
        with torch.no_grad():
            states, pushes, alive = model.play(inputs, lambda logits: torch.bernoulli(logits.sigmoid()))
            later = torch.zeros(len(inputs))
            returns = torch.empty_like(alive)
            for move in reversed(range(len(alive))):
                returns[move] = later = alive[move] + self.discount * later
            playing = alive.sum(1, keepdim=True).clamp(min=1)
            baseline = (returns * alive).sum(1, keepdim=True) / playing
            advantage = (returns - baseline) * alive
            advantage = advantage / (advantage.square().sum() / alive.sum()).sqrt().clamp(min=1e-6)
        unlikely = nn.functional.binary_cross_entropy_with_logits(
            model.policy(states)[..., 0], pushes, reduction="none"
        )
        loss: Tensor = (unlikely * advantage).mean(0)
        return loss

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is measured, (B,): the share of the moves that were not reached."""
        return 1 - outputs / self.moves

    def metrics(self) -> Mapping[str, Metric]:
        return {"moves": lambda outputs, _: outputs}


class Player(nn.Module):
    """Plays an episode in each environment; measured, it makes the likelier move."""

    def __init__(self, hidden: int, moves: int) -> None:
        super().__init__()
        self.moves = moves
        self.policy = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, environments: Tensor) -> Tensor:
        """Moves until the pole falls, (B,)."""
        with torch.no_grad():
            return self.play(environments, lambda logits: (logits > 0).float())[2].sum(0)

    def play(self, environments: Tensor, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """States (T, B, 4), pushes (T, B) to the right (1) or left (0), and whether the pole was up before each."""
        (length, mass), state = environments[:, :2].T, environments[:, 2:]
        up = torch.ones(len(environments))
        states, pushes, alive = [], [], []
        for _ in range(self.moves):
            push = choose(self.policy(state)[:, 0])
            states.append(state)
            pushes.append(push)
            alive.append(up)
            state = _moved(state, (2 * push - 1) * FORCE, length, mass)
            up = up * ((state[:, 0].abs() < FURTHEST) & (state[:, 2].abs() < WIDEST))
            if not up.any():
                break
        return torch.stack(states), torch.stack(pushes), torch.stack(alive)


def _moved(state: Tensor, force: Tensor, length: Tensor, mass: Tensor) -> Tensor:
    """The state after a move, by Euler's method."""
    _, speed, angle, turning = state.T
    total = CART + mass
    pull = (force + mass * length * turning.square() * angle.sin()) / total
    spin = (GRAVITY * angle.sin() - angle.cos() * pull) / (length * (4 / 3 - mass * angle.cos().square() / total))
    slide = pull - mass * length * spin * angle.cos() / total
    change = torch.stack([speed, slide, turning, spin], 1)
    return state + SECONDS * change
