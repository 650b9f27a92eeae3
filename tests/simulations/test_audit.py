from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtrain.errors import InputError
from fedtrain.experiment import load
from fedtrain.experiment.privacy import AdaptiveClipping, ClientPrivacy, SamplePrivacy
from fedtrain.privacy.accounting import Spend, epsilon
from fedtrain.privacy.clipping import Clip
from fedtrain.privacy.rng import NoiseSource
from fedtrain.simulations import audit
from fedtrain.simulations.audit import Subject, audit_conformance, audit_one_run, audit_subject
from fedtrain.strategies import central_dp

Patch = Callable[..., None]

NOISE = {"noise_multiplier": 1.0, "delta": 1e-5}


CHARGE, ROUNDS = Spend(1.0, 0.1, 1), 50
CLAIMED = epsilon([replace(CHARGE, steps=ROUNDS)], NOISE["delta"]).value
SAMPLE = Subject(SamplePrivacy(**NOISE, max_grad_norm=0.5), CHARGE, ROUNDS, CLAIMED)
CLIENT = Subject(ClientPrivacy(unit="client", **NOISE, max_delta_norm=3.0), CHARGE, ROUNDS, CLAIMED)
UNITS = {"sample": SAMPLE, "client": CLIENT}


def failed(audited: Subject) -> list[str]:
    return [check.name for check in audit_conformance(audited, np.random.default_rng(1)) if not check.holds]


def scale_noise(factor: float) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = NoiseSource.add_noise
        monkeypatch.setattr(NoiseSource, "add_noise", lambda self, values, std: real(self, values, factor * std))

    return patch


def leave_out_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseSource, "add_noise", lambda self, values, std: values)


def repeat_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def noised(self: NoiseSource, values: torch.Tensor, std: float) -> torch.Tensor:
        return values + std * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(NoiseSource, "add_noise", noised)


def take_every_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseSource, "poisson_mask", lambda self, n, rate: torch.ones(n, dtype=torch.bool))


def scale_the_clipping_norm(factor: float) -> Patch:
    """On the client and on the server."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        factors, begin = Clip.factors, central_dp._ClippedSum.__init__
        monkeypatch.setattr(
            Clip,
            "factors",
            lambda self, squares: factors(replace(self, max_grad_norm=factor * self.max_grad_norm), squares),
        )
        monkeypatch.setattr(
            central_dp._ClippedSum, "__init__", lambda self, like, bound: begin(self, like, factor * bound)
        )

    return patch


@pytest.mark.parametrize(
    "audited",
    [
        SAMPLE,
        replace(SAMPLE, section=SAMPLE.section.model_copy(update={"clipping": "per-layer", "physical_batch_size": 12})),
        replace(CLIENT, charge=Spend(7.0, 0.1, 1)),
        replace(CLIENT, section=CLIENT.section.model_copy(update={"adaptive_clipping": AdaptiveClipping()})),
    ],
    ids=["sample", "per layer, in parts", "client, much noise", "client, adaptive"],
)
def test_what_is_as_claimed_passes(audited: Subject) -> None:
    checks = audit_conformance(audited, np.random.default_rng())
    assert [check for check in checks if not check.holds] == []
    assert len(checks) == 4


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("mutation", "wrong"),
    [
        (scale_noise(0.9), "noise on the sum"),
        (leave_out_the_noise, "noise on the sum"),
        (scale_the_clipping_norm(1e9), "canary in the sum"),
        (scale_the_clipping_norm(2.0), "canary in the sum"),
        (repeat_the_noise, "noise, round to round"),
    ],
    ids=["noise x 0.9", "no noise", "no clipping", "clip x 2", "the same noise again"],
)
def test_what_is_broken_fails(unit: str, mutation: Patch, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_STEPS", 120)  # will do for these, and is faster
    mutation(monkeypatch)
    assert wrong in failed(UNITS[unit])


def test_a_client_that_does_not_sample_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    take_every_example(monkeypatch)
    assert failed(SAMPLE) == ["canary in the sum"]


@pytest.mark.parametrize("unit", UNITS)
def test_noise_that_follows_from_a_seed_is_audited_but_for_its_repetition(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_STEPS", 120)
    section = UNITS[unit].section.model_copy(update={"noise_seed": 3})
    checks = audit_conformance(replace(UNITS[unit], section=section), np.random.default_rng(1))
    assert [check.name for check in checks] == ["noise on the sum", "canary in the sum", "noise, round to round"]
    assert all(check.holds for check in checks)


@pytest.mark.parametrize("unit", UNITS)
def test_one_run_finds_canaries_but_not_more_than_claimed(unit: str) -> None:
    found = audit_one_run(UNITS[unit], np.random.default_rng(1))
    assert 0.3 < found.lower_bound < found.claimed
    assert found.holds
    assert found.ceiling == pytest.approx(6.0, abs=0.05)


def test_one_run_without_noise_refutes_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_the_noise(monkeypatch)
    found = audit_one_run(replace(SAMPLE, claimed=3.0), np.random.default_rng(1))
    assert found.right >= 0.99 * found.guesses
    assert not found.holds


def test_the_subject_is_the_client_whose_examples_are_seen_best(tiny: Path) -> None:
    experiment = load(
        tiny, ["data.test=0", "privacy.noise_multiplier=1.0", "privacy.delta=1e-5", "training.local_epochs=2"]
    )
    audited = audit_subject(experiment, tiny.parent, None)
    # q sqrt(2/q) is largest for the largest q: the smallest client's.
    assert audited.charge.sample_rate == max(
        audited.charge.sample_rate, *(16 / size for size in sizes(tiny) if size >= 16)
    )
    assert audited.rounds <= experiment.rounds
    assert audited.claimed > 0


def test_without_privacy_there_is_nothing_to_audit(tiny: Path) -> None:
    with pytest.raises(InputError, match="nothing to audit"):
        audit_subject(load(tiny, []), tiny.parent, None)


def sizes(tiny: Path) -> list[int]:
    from fedtrain.data.federated import build

    experiment = load(tiny, ["data.test=0"])
    return build(experiment.data, None, tiny.parent, experiment.seed).sizes().tolist()
