"""`fedtrain audit`: what the statistics say, line by line or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import typer

from fedtrain.cli.terminal import say
from fedtrain.errors import PrivacyError
from fedtrain.experiment.sections import Experiment
from fedtrain.privacy.evidence import FALSE_ALARM, Check, OneRun
from fedtrain.simulations.audit import MOST_NOISE, Subject, audit_conformance, audit_one_run, audit_subject

__all__ = ["audit"]

_AUDITED = {
    "sample": (
        "the client's real training step, with this experiment's clipping,\n"
        "noise, sampling and number of steps, on a model and examples of the audit's own."
    ),
    "client": (
        "the server's real aggregate, with this experiment's clipping, noise\n"
        "and number of rounds, on a model, updates and draws of clients of the audit's\n"
        "own."
    ),
}


def audit(experiment: Experiment, base: Path, data_root: Path | None, *, quick: bool, as_json: bool) -> None:
    """Audit an experiment's privacy and print what was found.

    Args:
        experiment: with its [privacy] section.
        base: the experiment file's folder.
        data_root: folder of the built-in data sources; None if not set.
        quick: leave out the one-run audit.
        as_json: print one JSON object.

    Raises:
        InputError: there is nothing to audit.
        PrivacyError: something that the experiment promises was refuted.
    """
    subject = audit_subject(experiment, base, data_root)
    coins = np.random.default_rng()
    if not as_json:
        _say_subject(subject)
    checks = audit_conformance(subject, coins)
    if not as_json:
        _say_checks(subject, checks)
    one_run = None if quick else audit_one_run(subject, coins)
    if as_json:
        typer.echo(json.dumps(_document(subject, checks, one_run)))
    elif one_run is not None:
        _say_one_run(subject, one_run)
    refuted = [check.name for check in checks if not check.holds]
    if one_run is not None and not one_run.holds:
        refuted.append("epsilon")
    if refuted:
        raise PrivacyError(
            "the audit refutes what the experiment promises",
            got=", ".join(refuted),
            hint="Train with nobody's data until the cause is found",
        )


def _say_subject(subject: Subject) -> None:
    if subject.section.noise_seed is not None:
        say("NOT PRIVATE: the noise follows from privacy.noise_seed.\n")
    say(f"Audited: {_AUDITED[subject.section.unit]}\n")


def _say_checks(subject: Subject, checks: list[Check]) -> None:
    say("Conformance, with canaries and without, in clipping norms or as correlation:")
    for check in checks:
        verdict = "ok" if check.holds else "FAILED"
        interval = f"{check.measured:.4g} ({check.low:.4g} to {check.high:.4g})"
        say(f"  {check.name:21}  {verdict:6}  {interval}, claimed {check.claimed:.4g}")
    planned = subject.charge.noise_multiplier
    if planned > MOST_NOISE:
        say(f"  Noise multiplier {MOST_NOISE:g}: the plan's {planned:.4g} would hide the canaries.")
    say(f"  Each fails by chance in {FALSE_ALARM * 1e6:g} of a million audits.")


def _say_one_run(subject: Subject, found: OneRun) -> None:
    say(f"\nOne run of all {_count(subject.rounds, 'round')}, {found.canaries} canaries, each put in by a fair coin:")
    say(f"  {found.right} of {found.guesses} guesses about who was in were right.")
    verdict = "not refuted" if found.holds else "REFUTED"
    say(
        f"  {verdict}: the lower bound is {found.lower_bound:.3g} (confidence {found.confidence:.0%}), "
        f"the claimed\n  upper bound {found.claimed:.3g}, both at delta {found.delta:g}."
    )
    say(f"  So many canaries could show at most {found.ceiling:.3g}.")


def _document(subject: Subject, checks: list[Check], one_run: OneRun | None) -> dict[str, object]:
    unit = subject.section.unit
    return {
        "audited": _AUDITED[unit].replace("\n", " "),
        "unit": unit,
        "seeded": subject.section.noise_seed is not None,
        "rounds": subject.rounds,
        "per_round": asdict(subject.charge),
        "checks": [{**asdict(check), "holds": check.holds} for check in checks],
        "one_run": None if one_run is None else {**asdict(one_run), "holds": one_run.holds},
    }


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
