import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedtrain import simulations
from fedtrain.cli.audit import audit
from fedtrain.errors import InputError, PrivacyError
from fedtrain.experiment import load
from fedtrain.privacy.rng import NoiseSource

SAMPLE = [
    'data.partition={kind="iid"}',
    'privacy.accountant="rdp"',
    "privacy.noise_multiplier=1.0",
    "privacy.delta=1e-5",
]
CLIENT = [*SAMPLE, 'privacy.unit="client"', 'clients.sampling="poisson"']


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations.audit, "_STEPS", 120)


def audited(tiny: Path, overrides: Sequence[str], *, quick: bool = True, as_json: bool = False) -> None:
    audit(load(tiny, ["data.test=0", *overrides]), tiny.parent, None, quick=quick, as_json=as_json)


@pytest.mark.parametrize(("overrides", "what"), [(SAMPLE, "client's real training"), (CLIENT, "server's real aggr")])
def test_it_says_what_was_audited_and_what_was_found(
    tiny: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], what: str
) -> None:
    audited(tiny, overrides, quick=False)
    out = capsys.readouterr().out
    assert out.startswith("Audited: the ")
    assert what in out
    for check in ("noise on the sum", "canary in the sum", "noise, round to round", "noise, run to run"):
        assert f"  {check:21}  ok " in out
    assert "not refuted: the lower bound is " in out
    assert "could show at most 6.01." in out
    assert max(map(len, out.splitlines())) <= 80


def test_quick_leaves_out_the_one_run(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited(tiny, CLIENT)
    assert "guesses" not in capsys.readouterr().out


def test_json_is_one_object(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited(tiny, CLIENT, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["unit"] == "client"
    assert document["seeded"] is False
    assert document["per_round"] == {"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 1}
    assert [check["holds"] for check in document["checks"]] == [True] * 4
    assert document["one_run"] is None


def test_what_is_refuted_fails(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseSource, "add_noise", lambda self, values, std: values)
    few = ["privacy.epsilon=0.5", *(override for override in CLIENT if "noise_multiplier" not in override)]
    with pytest.raises(PrivacyError, match="got noise on the sum, epsilon") as error:
        audited(tiny, few, quick=False)
    assert error.value.exit_code == 1
    out = capsys.readouterr().out
    assert "noise on the sum       FAILED  0 (0 to 0), claimed 2" in out
    assert "the plan's" in out
    assert "  REFUTED: the lower bound is " in out


def test_noise_from_a_seed_is_called_not_private(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited(tiny, [*CLIENT, "privacy.noise_seed=1"])
    assert capsys.readouterr().out.startswith("NOT PRIVATE")


def test_without_privacy_there_is_nothing_to_audit(tiny: Path) -> None:
    with pytest.raises(InputError, match="nothing to audit") as error:
        audited(tiny, [])
    assert error.value.exit_code == 2
