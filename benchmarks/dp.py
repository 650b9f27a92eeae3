"""What a step of DP-SGD costs over a plain one: fedtrain's modes beside Opacus used by hand.

Each contender takes the same steps: a batch out of 600 examples, forward, backward, SGD. Plain has its batch from a
shuffle; the private ones toss a coin per example, clip each gradient and add noise. By hand means as Opacus's users do
it without its PrivacyEngine: GradSampleModule with DPOptimizer, or GradSampleModuleFastGradientClipping with
DPLossFastGradientClipping and DPOptimizerFastGradientClipping, and noise from torch's generator. fedtrain's noise comes
from ChaCha20 in float64. What it costs is part of each figure of fedtrain's, and shown apart as well.

fedtrain trains the CNN in channels last, as plain does. Opacus by hand has the usual layout: its gradients of
convolutions are silently wrong in the other. Seconds are of processor time with one thread; contenders take turns, and
the least figures are compared: a busy machine only ever adds to them.

Run: python benchmarks/dp.py [--rounds 15] [--steps 20]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from plain import build_model
from torch import Tensor, nn
from torch.nn import functional as F

from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.rng import NoiseSource
from fedtrain.privacy.sample import PrivateGradients

Steps = Callable[[int], object]  # takes so many steps

EXAMPLES, LR, NOISE, NORM = 600, 0.05, 1.0, 1.0
MODES = ("fast", "hooks", "ghost", "functorch")
BY_HAND = {"hooks": "Opacus hooks", "ghost": "Opacus ghost"}
MOST = {"2nn": 1.5, "cnn": 2.0}  # of a plain step, in mode fast at the smaller batch


def example_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def plain(model: nn.Module, data: tuple[Tensor, Tensor], batch: int) -> Steps:
    params: list[Tensor] = list(model.parameters())

    def steps(count: int) -> None:
        for _ in range(count):
            rows = torch.randperm(EXAMPLES)[:batch]
            loss = example_losses(model(data[0][rows]), data[1][rows]).mean()
            gradients = torch.autograd.grad(loss, params)
            with torch.no_grad():
                torch._foreach_add_(params, gradients, alpha=-LR)

    return steps


def ours(model: nn.Module, data: tuple[Tensor, Tensor], batch: int, mode: str) -> Steps:
    params: list[Tensor] = list(model.parameters())
    section = SamplePrivacy.model_validate(
        {"noise_multiplier": NOISE, "delta": 1e-5, "max_grad_norm": NORM, "mode": mode}
    )
    private = PrivateGradients(model, example_losses, params, section)
    noise = NoiseSource()

    def steps(count: int) -> None:
        for gradients in private.steps(*data, Spend(NOISE, batch / EXAMPLES, count), noise):
            with torch.no_grad():
                torch._foreach_add_(params, gradients, alpha=-LR)

    return steps


def hooks_by_hand(model: nn.Module, data: tuple[Tensor, Tensor], batch: int) -> Steps:
    private = GradSampleModule(model)
    sgd = torch.optim.SGD(private.parameters(), lr=LR)
    optimizer = DPOptimizer(sgd, noise_multiplier=NOISE, max_grad_norm=NORM, expected_batch_size=batch)

    def steps(count: int) -> None:
        for _ in range(count):
            rows = torch.rand(EXAMPLES) < batch / EXAMPLES
            optimizer.zero_grad()
            F.cross_entropy(private(data[0][rows]), data[1][rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return steps


def ghost_by_hand(model: nn.Module, data: tuple[Tensor, Tensor], batch: int) -> Steps:
    private = GradSampleModuleFastGradientClipping(model, max_grad_norm=NORM, use_ghost_clipping=True)
    sgd = torch.optim.SGD(private.parameters(), lr=LR)
    optimizer = DPOptimizerFastGradientClipping(
        sgd, noise_multiplier=NOISE, max_grad_norm=NORM, expected_batch_size=batch
    )
    criterion = DPLossFastGradientClipping(private, optimizer, nn.CrossEntropyLoss())

    def steps(count: int) -> None:
        for _ in range(count):
            rows = torch.rand(EXAMPLES) < batch / EXAMPLES
            optimizer.zero_grad()
            criterion(private(data[0][rows]), data[1][rows]).backward()
            optimizer.step()

    return steps


def noise_alone(model: nn.Module) -> Steps:
    params, noise = list(model.parameters()), NoiseSource()
    return lambda count: [noise.add_noise(p, NOISE) for _ in range(count) for p in params]


def contenders(name: str, batch: int) -> dict[str, Steps]:
    """Give each contender a model of its own."""
    torch.manual_seed(1)
    usual = torch.randn(EXAMPLES, 1, 28, 28), torch.randint(10, (EXAMPLES,))
    layout = torch.channels_last if name == "cnn" else torch.contiguous_format
    data = usual[0].contiguous(memory_format=layout), usual[1]

    def model() -> nn.Module:
        built: nn.Module = build_model(name).train().to(memory_format=layout)  # type: ignore[call-overload]
        return built

    return {
        "plain": plain(model(), data, batch),
        **{mode: ours(model(), data, batch, mode) for mode in MODES},
        BY_HAND["hooks"]: hooks_by_hand(build_model(name), usual, batch),
        BY_HAND["ghost"]: ghost_by_hand(build_model(name), usual, batch),
        "noise alone": noise_alone(model()),
    }


def measured(runs: dict[str, Steps], rounds: int, steps: int) -> dict[str, float]:
    """Seconds per step of each contender, the least of its rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run(steps)
            seconds[name].append((time.process_time() - started) / steps)
    return {name: min(found) for name, found in seconds.items()}


def verdict(what: str, figure: float, most: float) -> None:
    print(f"    {what}: {figure:.2f} (at most {most:.2f}): {'ok' if figure <= most else 'MISSED'}")


def compare(name: str, batch: int, rounds: int, steps: int) -> None:
    seconds = measured(contenders(name, batch), rounds, steps)
    print(f"{f'{name}, batch of {batch}':<22}{'ms/step':>12}{'over plain':>13}")
    for contender, found in seconds.items():
        print(f"  {contender:<20}{1e3 * found:>12.2f}{found / seconds['plain']:>13.2f}")
    for mode, by_hand in BY_HAND.items():
        verdict(f"{mode} / {by_hand} by hand", seconds[mode] / seconds[by_hand], 1.0)
    if batch == 10:
        verdict("fast / plain", seconds["fast"] / seconds["plain"], MOST[name])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a private step costs.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="per round and contender; a quarter of it for the CNN")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    for name in MOST:
        for batch in (10, 64):
            compare(name, batch, args.rounds, args.steps if name == "2nn" else max(1, args.steps // 4))


if __name__ == "__main__":
    main()
