"""What a private simulation needs besides a plain one: a plan, a policy, ledgers, and somebody who keeps count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedtrain.client.budget import Budget
from fedtrain.data.federated import PartitionedData
from fedtrain.errors import InputError, TaskError
from fedtrain.experiment.load import identity
from fedtrain.experiment.privacy import ClientPrivacy, SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.params import exchanged
from fedtrain.privacy.accounting import Spend, bound_within
from fedtrain.privacy.book import Account
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.plan import ClientPlan, SamplePlan
from fedtrain.privacy.policy import Policy, Request, load_policy
from fedtrain.privacy.sample import PrivateGradients
from fedtrain.records import PrivacySummary
from fedtrain.rundir import RunFolder
from fedtrain.server.privacy import CentralSpending, LocalSpending, Spending, privacy_plan
from fedtrain.strategies.base import FederatedStrategy
from fedtrain.strategies.central_dp import central_dp
from fedtrain.tasks.base import Task
from fedtrain.training.loop import build_model

__all__ = ["Accounts", "Protection", "protection", "requests"]

_UNLIMITED = 1e9  # of a policy that nobody wrote


def _as_it_is(strategy: FederatedStrategy) -> FederatedStrategy:
    return strategy


class Accounts(NamedTuple):
    """Who keeps count in a run; without privacy nobody does."""

    spending: Spending | None = None
    budget: Budget | None = None
    guard: Callable[[FederatedStrategy], FederatedStrategy] = _as_it_is  # puts the server's noise before a strategy


@dataclass(frozen=True)
class Protection:
    """What protects the clients of a simulation, or their examples.

    Attributes:
        plan: what the run costs.
        policy: what the clients' owner allows; where the server adds the noise, what the server may spend.
        ledgers: folder of the ledgers; None where noise is seeded and nothing is protected.
        mode: how clipped gradients are computed; "" where clients train plainly.
        sizes: `(clients,)` training examples; 0 for clients that are not to be asked.
    """

    plan: SamplePlan | ClientPlan
    policy: Policy
    ledgers: Path | None
    mode: str
    sizes: npt.NDArray[np.int64]

    def summary(self, folder: RunFolder) -> PrivacySummary:
        """Say what a run in this folder promises."""
        plan, section = self.plan, self.plan.section
        planned = plan.whole_run()
        guarantee = plan.guarantee(planned.value, self._rounds)
        charges = self._charges()
        noise, rates, steps = (
            [getattr(charge, name) for charge in charges] for name in ("noise_multiplier", "sample_rate", "steps")
        )
        return PrivacySummary(
            unit=section.unit,
            relation=guarantee.relation,
            delta=section.delta,
            accountant=planned.accountant,
            sampling=guarantee.sampling,
            planned_epsilon=planned.value,
            noise_multiplier=(min(noise), max(noise)),
            sample_rate=(min(rates), max(rates)),
            steps=(min(steps), max(steps)),
            participations=self._rounds,
            clipping=_clipping(section, self.mode),
            seeded=section.noise_seed is not None,
            ledgers=folder.ledgers.name if self.ledgers == folder.ledgers else str(self.ledgers or ""),
        )

    @contextlib.contextmanager
    def accounts(self, request: Callable[..., Request], data: PartitionedData, journal: Path) -> Iterator[Accounts]:
        """Open the accounts of a run.

        Args:
            request: as `requests` makes it.
            data: of all clients.
            journal: where the server notes whom it asks.

        Raises:
            LedgerError: a ledger cannot be used.
        """
        plan, strict = self.plan, self.policy
        if isinstance(plan, SamplePlan):
            budget = Budget(plan, request, self.ledgers, strict, data)
            yield Accounts(LocalSpending(plan, self.sizes, journal), budget)
            return
        ledger = None
        if self.ledgers is not None:
            account = Account("all clients", data.fingerprint(), "client")
            ledger = Ledger(self.ledgers, account, bound_within(strict.max_epsilon))
        with ledger or contextlib.nullcontext():
            spending = CentralSpending(plan, request, ledger, strict)
            charge = plan.charge
            expected = charge.sample_rate * plan.num_clients
            yield Accounts(
                spending,
                guard=lambda strategy: central_dp(strategy, plan.section, charge.noise_multiplier, expected, spending),
            )

    def check_policy(self, request: Callable[..., Request]) -> None:
        """Let what the policy holds against every round show before anything is written.

        Raises:
            InputError: it objects to the run as it is planned.
        """
        for charge in self._charges():
            if objections := self.policy.objections(request(round_number=1, **vars(charge))):
                raise InputError(
                    f"the policy does not allow this run: {'; '.join(objections)}", hint="The policy's owner decides"
                )

    @property
    def _rounds(self) -> int:
        return self.plan.rounds if isinstance(self.plan, ClientPlan) else self.plan.participations

    def _charges(self) -> list[Spend]:
        plan = self.plan
        if isinstance(plan, ClientPlan):
            return [plan.charge]
        return [plan.charge(size) for size in np.unique(self.sizes[self.sizes > 0]).tolist()]


def _shapes(data: PartitionedData) -> tuple[Tensor, Tensor]:
    """An example without content, inputs and target, as the model gets them."""
    spec = data.spec
    inputs = torch.empty((1, *spec.input_shape), dtype=torch.int64 if data.preparation.dtype == "int64" else None)
    if spec.target == "tokens":
        return inputs, torch.empty_like(inputs)
    return inputs, torch.empty(1, dtype=torch.float32 if spec.target == "number" else torch.int64)


def protection(
    experiment: Experiment,
    places: tuple[Path, RunFolder],
    data: PartitionedData,
    sizes: npt.NDArray[np.int64],
    task: Task,
) -> Protection | None:
    """Plan the protection that an experiment asks for; None if it asks for none.

    Args:
        experiment: with its [privacy] section.
        places: the experiment file's folder, and the run's.
        data: of all clients.
        sizes: `(clients,)` training examples; 0 for clients that are not to be asked.
        task: whose model must be fit for it.

    Raises:
        InputError: the data, the model or the policy file are not.
    """
    section, (base, folder) = experiment.privacy, places
    if experiment.run.policy is not None and (section is None or section.noise_seed is not None):
        raise InputError(
            "the policy of run.policy allows private runs alone",
            got="no [privacy]" if section is None else "noise that follows from privacy.noise_seed",
            hint="Leave out run.policy, or protect the run",
        )
    if section is None:
        return None
    _refuse_fitted_preparation(experiment, data)
    model = build_model(task, experiment.seed)
    mode = ""
    if isinstance(section, SamplePrivacy):
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = PrivateGradients(model, task.loss, trained, section)
        gradients.try_once(*_shapes(data))  # what DP-SGD cannot take is refused before anything is spent on it
        mode = gradients.mode
    elif unclipped := exchanged(model).keys() & dict(model.named_buffers()).keys():
        raise TaskError(
            "the model has buffers that training changes, and no clipping is meant for them",
            got=", ".join(sorted(unclipped)),
            hint="Use GroupNorm or LayerNorm in place of BatchNorm",
        )
    plan = privacy_plan(experiment, sizes)
    assert plan is not None
    policy = Policy(max_epsilon=section.epsilon or _UNLIMITED, delta=section.delta, unit=section.unit)
    if experiment.run.policy is not None:
        policy = load_policy(base / experiment.run.policy)
    ledgers = folder.ledgers if experiment.run.ledgers is None else base / experiment.run.ledgers
    if ledgers.exists() and not ledgers.is_dir():
        raise InputError("run.ledgers is no folder", got=ledgers, expected="a folder, or a path where one can be made")
    protects = Protection(plan, policy, None if section.noise_seed is not None else ledgers, mode, sizes)
    protects.check_policy(requests(experiment, "planned", model))
    return protects


def requests(experiment: Experiment, run: str, model: nn.Module) -> Callable[..., Request]:
    """Make what a run's requests to a ledger have in common.

    Args:
        experiment: what is asked for.
        run: one name per run, the same after a restart.
        model: that is trained.

    Returns:
        (round_number=, noise_multiplier=, sample_rate=, steps=) -> a request.
    """
    assert experiment.privacy is not None
    travelling = exchanged(model).values()
    return partial(
        Request,
        run=run,
        experiment=experiment.name,
        experiment_hash=identity(experiment),
        task=experiment.task.name,
        parameters=sum(t.numel() for t in travelling),
        model_bytes=sum(t.numel() * t.element_size() for t in travelling),
        unit=experiment.privacy.unit,
    )


def _refuse_fitted_preparation(experiment: Experiment, data: PartitionedData) -> None:
    """Features must not be filled or scaled by what the examples tell: one more example would change all others."""
    if (
        experiment.data.path is not None
        and data.dataset.inputs.dtype == torch.uint8
        and experiment.data.scaling == "none"
    ):
        raise InputError(
            "your own images are scaled by the mean and deviation of all their pixels, and that has no noise",
            hint="Give numbers that are known anyway: data.scaling = { mean = [0.5], std = [0.25] }",
        )
    inputs, fitted = data.dataset.inputs, experiment.data.missing in ("mean", "median")
    if isinstance(experiment.privacy, SamplePrivacy) and fitted and inputs.is_floating_point() and inputs.isnan().any():
        raise InputError(
            f'data.missing = "{experiment.data.missing}" fills features with what the examples of a client tell, '
            "and privacy protects each of them",
            hint='Set data.missing = "zero" or "drop"',
        )


def _clipping(section: SamplePrivacy | ClientPrivacy, mode: str) -> str:
    if isinstance(section, SamplePrivacy):
        norms = "" if section.clipping == "flat" else ", each layer to its share of it"
        return f"each example's gradient to L2 norm {section.max_grad_norm:g}{norms} ({mode})"
    adapts = ""
    if section.adaptive_clipping:
        adapts = f" at first, then to the norm that leaves {section.adaptive_clipping.target_quantile:.0%} unclipped"
    return f"each client's update to L2 norm {section.max_delta_norm:g}{adapts}"
