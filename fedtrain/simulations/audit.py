"""Audits: the real client step and the real server aggregate, run on canaries that break privacy if anything can.

A canary is an example, or a client, whose gradient is huge and in a direction of its own. The model is one of the
audit's: what its steps release is clipped sums and noise and nothing else, so each number has a known distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedtrain import params as P
from fedtrain.data.base import Examples
from fedtrain.data.federated import build
from fedtrain.errors import InputError
from fedtrain.experiment.optimizers import SgdSection
from fedtrain.experiment.privacy import ClientPrivacy, SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.training import TrainingSection
from fedtrain.params import Params
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.evidence import (
    Check,
    Numbers,
    OneRun,
    check_correlation,
    check_deviation,
    check_mean,
    one_run,
)
from fedtrain.privacy.plan import ClientPlan
from fedtrain.privacy.rng import NoiseSource
from fedtrain.server.privacy import privacy_plan
from fedtrain.server.selection import eligible
from fedtrain.strategies.adapter import AlgorithmRunner
from fedtrain.strategies.central_dp import central_dp, noise_split
from fedtrain.strategies.fedavg import fedavg
from fedtrain.tasks.base import Metric
from fedtrain.training.loop import Assignment, Recipe, Trainer
from fedtrain.wire import Update

__all__ = ["MOST_NOISE", "Subject", "audit_conformance", "audit_one_run", "audit_subject"]

MOST_NOISE = 2.0
"""Noise multiplier of the conformance audit where the plan has more: more would hide its canaries."""

_HUGE = 1e4  # a canary's norm before clipping, in clipping norms
_WIDTH = 1000  # of each of the two layers of the conformance audit's model
_PLACES, _CANARIES = 32, 24  # its examples or clients, and how many of them are canaries
_RATE = 0.5  # its sample rate: a canary is seen often, and left out often
_STEPS, _LOCAL_STEPS = 300, 3  # its steps, and those of a client's round: noise used twice in one does not average
_COINS = 2000  # canaries of the one-run audit


@dataclass(frozen=True)
class Subject:
    """What is audited.

    Attributes:
        section: the experiment's.
        charge: one round, of the client that canaries are found in most easily or of the server.
        rounds: all that the plan allows.
        claimed: upper bound of epsilon over them.
    """

    section: SamplePrivacy | ClientPrivacy
    charge: Spend
    rounds: int
    claimed: float


def audit_subject(experiment: Experiment, base: Path, data_root: Path | None) -> Subject:
    """Find what an experiment's plan promises.

    Args:
        experiment: with its [privacy] section.
        base: the experiment file's folder, against which its relative paths are resolved.
        data_root: folder of the built-in data sources; None if not set.

    Raises:
        InputError: it has no such section, or its data do not fit.
    """
    if experiment.privacy is None:
        raise InputError(
            "the experiment protects nobody: there is nothing to audit",
            expected="a section [privacy]",
            hint="Add one, such as: privacy = { epsilon = 8.0, delta = 1e-5 }",
        )
    data = build(experiment.data, data_root, base, experiment.seed)
    sizes = np.where(eligible(experiment.clients, base, data.client_ids()), data.sizes(), 0)
    plan = privacy_plan(experiment, sizes)
    assert plan is not None, "there is a section [privacy]"
    if isinstance(plan, ClientPlan):
        return Subject(plan.section, plan.charge, plan.rounds, plan.epsilon(plan.rounds))
    size = max(np.unique(sizes[sizes > 0]).tolist(), key=lambda size: _visibility(plan.charge(size)))
    claimed = plan.epsilon({size: plan.participations})
    return Subject(plan.section, plan.charge(size), plan.participations, claimed)


def audit_conformance(subject: Subject, coins: np.random.Generator) -> list[Check]:
    """Check noise and clipping against what is claimed, in a run with canaries and in one without.

    Args:
        subject: what is audited; of its charge, only the noise multiplier is used.
        coins: draw the clients of a round.
    """
    section = subject.section
    steps = _LOCAL_STEPS if isinstance(section, SamplePrivacy) else 1
    charge = Spend(min(subject.charge.noise_multiplier, MOST_NOISE), _RATE, steps)
    canaries = np.arange(_PLACES) < _CANARIES
    runs = [_Run(section, canaries & there, _WIDTH, charge, _STEPS // steps) for there in (True, False)]
    shifted, noise = (np.stack([*run.releases(coins)]) / math.sqrt(steps) for run in runs)
    multiplier = _multiplier_on_sum(runs[0])
    often = _RATE * math.sqrt(steps)
    shifts = shifted[:, :, :_CANARIES].sum(axis=1) / math.sqrt(2) / often
    deviation = math.hypot(multiplier, math.sqrt(_RATE * (1 - _RATE))) / often
    checks = [
        check_deviation("noise on the sum", noise, multiplier),
        check_mean("canary in the sum", shifts, 1.0, deviation),
        check_correlation("noise, round to round", noise[:-1], noise[1:]),
    ]
    if section.noise_seed is None:
        checks.append(check_correlation("noise, run to run", noise[:, :, _PLACES:], shifted[:, :, _PLACES:]))
    return checks


def audit_one_run(subject: Subject, coins: np.random.Generator) -> OneRun:
    """Bound epsilon from below by one run over all planned rounds, with canaries that a coin puts in or leaves out.

    Args:
        subject: what is audited.
        coins: put canaries in, and draw the clients of a round.
    """
    included = coins.random(_COINS) < 0.5
    run = _Run(subject.section, included, _COINS, subject.charge, subject.rounds)
    scores = np.zeros(_COINS)
    for release in run.releases(coins):
        scores += release.sum(axis=0)
    return one_run(scores, included, subject.claimed, subject.section.delta)


class _Canaries(nn.Module):
    """Two linear layers side by side: one example's gradient is its input, in both of them.

    Two, so that clipping them one by one is not the same as clipping them together.
    """

    def __init__(self, places: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(places, 1, bias=False) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.first(inputs) + self.second(inputs)
        return outputs


@dataclass(frozen=True)
class _CanaryTask:
    width: int

    def model(self) -> nn.Module:
        return _Canaries(self.width)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0]

    def metrics(self) -> Mapping[str, Metric]:
        return {}


@dataclass(frozen=True)
class _Free:
    """A release that no ledger charges for: nobody's data are in it."""

    noise: NoiseSource

    def charge(self) -> None:
        pass


@dataclass(frozen=True)
class _Run:
    """Rounds with canaries, the i-th of which has the i-th coordinate of either layer to itself.

    Attributes:
        section: how they are private.
        included: `(places,)`, which of the examples or clients are there.
        width: of each layer, at least `places`.
        charge: of a round.
        rounds: how many.
    """

    section: SamplePrivacy | ClientPrivacy
    included: npt.NDArray[np.bool_]
    width: int
    charge: Spend
    rounds: int

    @property
    def expected(self) -> float:
        """Canaries of a step, were all there: the constant by which sums are divided."""
        return self.charge.sample_rate * len(self.included)

    def releases(self, coins: np.random.Generator) -> Iterator[Numbers]:
        """Yield what each round releases: `(2, width)`, the noised sum in clipping norms."""
        if isinstance(self.section, SamplePrivacy):
            return self._of_client(self.section)
        return self._of_server(self.section, coins)

    def _of_client(self, section: SamplePrivacy) -> Iterator[Numbers]:
        """Train a client on canaries; one that is left out is blanked, and the number of examples stays the same."""
        recipe = Recipe(TrainingSection(optimizer=SgdSection(lr=1.0)), privacy=section)
        trainer = Trainer(_CanaryTask(self.width), recipe, seed=0, device=torch.device("cpu"))
        start = P.zeros_like(P.exchanged(trainer.model))
        places = len(self.included)
        inputs = torch.zeros(places, self.width)
        inputs.fill_diagonal_(_HUGE * section.max_grad_norm).mul_(torch.from_numpy(self.included)[:, None])
        for round_number in range(1, self.rounds + 1):
            assignment = Assignment(round_number, "canaries", start, charge=self.charge)
            result = trainer.train(assignment, Examples(inputs, torch.zeros(places)))
            yield -_numbers(result.delta) * (self.expected / section.max_grad_norm)

    def _of_server(self, section: ClientPrivacy, coins: np.random.Generator) -> Iterator[Numbers]:
        """Aggregate updates of canaries.

        A clipping norm that adapts is set anew for each round, to one of three: it could outgrow the canaries.
        """
        zeros = P.zeros_like(P.exchanged(_Canaries(self.width)))
        release = _Free(NoiseSource(section.noise_seed))
        strategy = central_dp(fedavg(), section, self.charge.noise_multiplier, self.expected, release)
        runner = AlgorithmRunner(strategy.algorithm, zeros)
        fresh = runner.state
        for round_number in range(1, self.rounds + 1):
            bound = section.max_delta_norm * (2.0 ** (round_number % 3) if section.adaptive_clipping else 1.0)
            runner.state = {**fresh, "bound": bound}
            present = self.included & (coins.random(len(self.included)) < self.charge.sample_rate)
            updates = (_update(zeros, place, _HUGE * bound) for place in np.flatnonzero(present).tolist())
            yield _numbers(runner.aggregate(round_number, zeros, updates)) * (self.expected / bound)


def _update(zeros: Params, place: int, value: float) -> Update:
    """A client's update: nothing but its own coordinates."""
    delta = {name: t.clone() for name, t in zeros.items()}
    for t in delta.values():
        t[0, place] = value
    return Update(f"canary-{place}", 1, delta, num_examples=1)


def _numbers(params: Params) -> Numbers:
    return np.stack([t[0].double().numpy() for t in params.values()])


def _multiplier_on_sum(run: _Run) -> float:
    """The standard deviation of the noise on the sum, in clipping norms."""
    if isinstance(run.section, SamplePrivacy):
        return run.charge.noise_multiplier
    return noise_split(run.section, run.charge.noise_multiplier, run.expected).delta_multiplier


def _visibility(charge: Spend) -> float:
    """How far a canary lies above the noise after one round, in standard deviations."""
    return charge.sample_rate * math.sqrt(charge.steps) / charge.noise_multiplier
