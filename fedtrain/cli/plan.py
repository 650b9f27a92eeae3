"""`fedtrain plan`: what a run will cost in bytes, time and privacy, before its first step."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer

from fedtrain.cli import costs
from fedtrain.cli.terminal import say
from fedtrain.data.federated import build
from fedtrain.errors import shorten
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.strategies import FedBuffStrategy
from fedtrain.params import is_private
from fedtrain.privacy.accounting import Guarantee, delta_warning
from fedtrain.privacy.plan import ClientPlan, SamplePlan, Signal
from fedtrain.rundir import RunFolder
from fedtrain.server.measuring import CentralTest
from fedtrain.server.result import check_watched
from fedtrain.server.selection import Crowd, eligible
from fedtrain.simulations.central import central_examples
from fedtrain.simulations.outlook import Outlook, outlook
from fedtrain.simulations.private import protection
from fedtrain.tasks.adapted import experiment_task
from fedtrain.training.device import check_device, find_device
from fedtrain.training.loop import build_model
from fedtrain.training.optimizer import check_optimizer

__all__ = ["plan"]


def plan(experiment: Experiment, base: Path, data_root: Path | None, *, pld: bool, as_json: bool) -> None:
    """Plan an experiment and print it; one without privacy is told that it protects nothing.

    Args:
        experiment: what would be run.
        base: the experiment file's folder.
        data_root: folder of the built-in data sources; None if not set.
        pld: also ask the PLD accountant for the whole run's epsilon.
        as_json: print one JSON object.

    Raises:
        InputError: the data or the task does not fit, or an accountant is not installed.
    """
    run = _Run.of(experiment, base, data_root)
    priced = run.priced
    found = None if priced is None else _Priced.of(run, priced, pld=pld)
    if as_json:
        private = found.document() if found else {"unit": None}
        typer.echo(json.dumps(_facts(run) | costs.document(run.outlook) | private, indent=2))
        return
    say(_opening(run))
    if experiment.model.lora or experiment.model.freeze:
        say(_travelling(run))
    for line in costs.lines(run.outlook, experiment):
        say(line)
    say("")
    for line in found.lines() if found else _unprotected(run):
        say(line)


@dataclass(frozen=True)
class _Run:
    """What is to be run, as far as its price is concerned."""

    experiment: Experiment
    sizes: npt.NDArray[np.int64]  # `(clients,)` training examples; 0 for clients that are not to be asked
    clients_per_round: int  # as expected
    parameters: int  # numbers that are trained and leave the client
    in_all: int  # numbers of the model, whether they are trained or not
    priced: SamplePlan | ClientPlan | None
    outlook: Outlook

    @classmethod
    def of(cls, experiment: Experiment, base: Path, data_root: Path | None) -> _Run:
        data = build(experiment.data, data_root, base, experiment.seed)
        sizes = np.where(eligible(experiment.clients, base, data.client_ids()), data.sizes(), 0)
        task = experiment_task(experiment, data.spec, base)
        model = build_model(task, experiment.seed)
        check_optimizer(experiment.training, base, model)
        device, central = find_device(experiment.run.device), central_examples(experiment, data)
        check_device(experiment.training, experiment.run.gpus, device)
        check_watched(experiment, CentralTest(experiment, task, data, device, central).names, central)
        # What a run would refuse is refused here.
        protects = protection(experiment, (base, RunFolder(base / "no-run")), data, sizes, task)
        private = tuple(experiment.personalization.private)
        strategy, crowd = experiment.strategy, Crowd(experiment.clients, experiment.seed, sizes)
        return cls(
            experiment=experiment,
            sizes=sizes,
            clients_per_round=strategy.buffer_size if isinstance(strategy, FedBuffStrategy) else crowd.wanted(),
            parameters=sum(
                p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_private(name, private)
            ),
            in_all=sum(p.numel() for p in model.parameters()),
            priced=protects.plan if protects else None,
            outlook=outlook(experiment, base, data, sizes, task),
        )

    @property
    def present(self) -> npt.NDArray[np.int64]:
        """Sizes of the clients that may be asked, ascending."""
        return np.sort(self.sizes[self.sizes > 0])


@dataclass(frozen=True)
class _Charge:
    """What a round costs some clients, or one round of all."""

    examples: tuple[int, int]  # of the smallest and the largest
    clients: int
    noise_multiplier: float
    sample_rate: float  # the largest
    steps: int  # of a round, the most


@dataclass(frozen=True)
class _Priced:
    """A run's plan with all that is told of it."""

    guarantee: Guarantee
    participations: int
    charges: list[_Charge]
    epsilon_by_round: list[tuple[int, float]]
    pld: float | None
    signal: Signal
    warnings: list[str]

    @classmethod
    def of(cls, run: _Run, priced: SamplePlan | ClientPlan, *, pld: bool) -> _Priced:
        rounds = run.experiment.rounds
        second_opinion = priced.whole_run("pld").value if pld else None
        if isinstance(priced, SamplePlan):
            participations, charges, units = priced.participations, _by_size(run, priced), int(run.present[-1])
            typical = int(run.present[len(run.present) // 2])
            full = min(rounds, participations * len(run.present) // run.clients_per_round)
            signal = priced.signal(typical, run.clients_per_round, full, run.parameters)
        else:
            signal = priced.signal(run.parameters)
            participations, units = rounds, priced.num_clients
            charges = [_Charge((int(run.present[0]), int(run.present[-1])), units, **vars(priced.charge))]
        curve = [(done, _epsilon_after(priced, run, done)) for done in _shown(rounds, participations)]
        warnings = [delta_warning(priced.section.delta, units), signal.warning()]
        return cls(
            guarantee=priced.guarantee(curve[-1][1], rounds),
            participations=participations,
            charges=charges,
            epsilon_by_round=curve,
            pld=second_opinion,
            signal=signal,
            warnings=[warning for warning in warnings if warning],
        )

    def document(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        guarantee = self.guarantee
        return asdict(guarantee) | {
            "relation": guarantee.relation,
            "trust": guarantee.trust,
            "participations": self.participations,
            "charges": [asdict(charge) for charge in self.charges],
            "epsilon_by_round": [{"round": done, "epsilon": spent} for done, spent in self.epsilon_by_round],
            "epsilon_pld": self.pld,
            "signal_to_noise": {"per_round": self.signal.per_round, "whole_run": self.signal.whole_run},
            "statement": list(guarantee.sentences()),
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        """All of it for a person."""
        signal = self.signal
        return [
            *self._terms(),
            "",
            *_charge_table(self.charges, self.participations),
            "",
            *self._curve(),
            "",
            *self.guarantee.sentences(),
            "",
            f"Signal to noise, at best: {signal.per_round:.2g} in a round, {signal.whole_run:.2g} over the run.",
            f"A rule of thumb: {signal.rule_of_thumb()}.",
            *(f"warning: {warning}." for warning in self.warnings),
        ]

    def _terms(self) -> list[str]:
        guarantee = self.guarantee
        if guarantee.unit == "sample":
            unit, public = "each example", "how many examples each client has"
            times = f"{_count(self.participations, 'round')} of a client at most"
        else:
            unit, public = "each client, with all its examples", "how many clients there are"
            times = f"{_count(self.participations, 'round')}, whoever is asked"
        return [
            f"Unit        {unit} ({guarantee.relation})",
            f"Covers      {times}",
            f"Delta       {guarantee.delta:g}",
            f"Accountant  {guarantee.accountant.upper()}",
            f"Sampling    {guarantee.sampling}",
            f"Public      {public}",
            f"Trust       {guarantee.trust}",
        ]

    def _curve(self) -> list[str]:
        lines = ["after round  epsilon"]
        lines += [f"{done:11,}  {spent:7.3f}" for done, spent in self.epsilon_by_round]
        if self.guarantee.unit == "sample":
            lines.append("Of a client that is asked in every round, until its participations end.")
        if self.pld is not None:
            lines.append(f"At the end, by PLD: {self.pld:.3f}")
        return lines


def _facts(run: _Run) -> dict[str, Any]:
    return {
        "experiment": run.experiment.name,
        "rounds": run.experiment.rounds,
        "clients": len(run.present),
        "clients_per_round": run.clients_per_round,
        "parameters": run.parameters,
        "parameters_in_all": run.in_all,
        "steps_per_round": _steps(run),
    }


def _opening(run: _Run) -> str:
    experiment = run.experiment
    return (
        f"{shorten(experiment.name)}: {_count(experiment.rounds, 'round')}, {run.clients_per_round:,} of "
        f"{_count(len(run.present), 'client')} in each, {_count(run.parameters, 'trained parameter')}"
    )


def _travelling(run: _Run) -> str:
    lora = run.experiment.model.lora
    what = "not frozen" if lora is None else "adapters and model.lora.train" if lora.train else "adapters"
    return f"{what}: {run.parameters:,} of {run.in_all:,} parameters are trained and travel"


def _unprotected(run: _Run) -> list[str]:
    least, most = _steps(run)
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return [
        "NOT PRIVATE: the experiment has no [privacy], so nothing is protected. What clients send may tell the server "
        "everything about their examples.",
        f"Steps of a client's round: {each}",
        'To protect each example, add: [privacy] with unit = "sample", epsilon and delta.',
    ]


def _steps(run: _Run) -> tuple[int, int]:
    smallest, largest = int(run.present[0]), int(run.present[-1])
    return run.experiment.training.steps_for(smallest), run.experiment.training.steps_for(largest)


def _by_size(run: _Run, priced: SamplePlan) -> list[_Charge]:
    """What a round costs the clients of each group: the largest rate and the most steps of those that there are."""
    batch = priced.training.batch_size
    charges = []
    for group in priced.groups:
        alike = np.maximum(run.present, batch)
        members = run.present[(group.low <= alike) & (alike <= group.high)]
        smallest, largest = int(members[0]), int(members[-1])
        charges.append(_Charge((smallest, largest), len(members), **vars(group.charge)))
    return charges


def _epsilon_after(priced: SamplePlan | ClientPlan, run: _Run, rounds: int) -> float:
    if isinstance(priced, ClientPlan):
        return priced.epsilon(rounds)
    return priced.epsilon(dict.fromkeys(run.present.tolist(), min(rounds, priced.participations)))


def _shown(rounds: int, participations: int) -> list[int]:
    """The first round, the last, and about ten between while epsilon can grow."""
    step = math.ceil(participations / 10)
    return sorted({1, *range(step, participations, step), participations, rounds})


def _charge_table(charges: list[_Charge], rounds: int) -> list[str]:
    lines = ["       examples  clients     noise  sample rate  steps a round  at most in all"]
    for charge in charges:
        least, most = charge.examples
        examples = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        lines.append(
            f"{examples:>15}  {charge.clients:7,}  {charge.noise_multiplier:8.4g}  {charge.sample_rate:11.4g}  "
            f"{charge.steps:13,}  {charge.steps * rounds:14,}"
        )
    return lines


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
