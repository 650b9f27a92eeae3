import json
import re
from pathlib import Path

import pytest

from fedtrain.cli.plan import plan
from fedtrain.cli.terminal import fold
from fedtrain.errors import ExperimentError, MissingExtraError
from fedtrain.experiment import load

pytest.importorskip("opacus")

SAMPLE = 'privacy={noise_multiplier=1.0, delta=1e-4, accountant="rdp"}'
CLIENT = ('privacy={unit="client", noise_multiplier=2.0, delta=1e-4, accountant="rdp"}', "clients.sampling=poisson")


def planned(file: Path, *overrides: str, pld: bool = False, as_json: bool = True) -> None:
    held_out = "data.test=0"  # which would be refused
    plan(load(file, (held_out, *overrides)), file.parent, None, pld=pld, as_json=as_json)


@pytest.fixture
def shown(tiny: Path, capsys: pytest.CaptureFixture[str]):
    """The plan of the small experiment with some overrides, as JSON."""

    def show(*overrides: str) -> dict:
        planned(tiny, *overrides)
        return json.loads(capsys.readouterr().out)

    return show


def test_sample_level(shown) -> None:
    found = shown(SAMPLE, "rounds=25")
    assert (found["unit"], found["relation"], found["delta"]) == ("sample", "add/remove one", 1e-4)
    assert (found["accountant"], found["sampling"], found["seeded"]) == ("rdp", "Poisson", False)
    assert found["trust"] == "the client's own machine"
    assert (found["rounds"], found["clients"], found["clients_per_round"]) == (25, 6, 3)
    assert found["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert 3 * 25 / 6 <= found["participations"] <= 25
    assert sum(charge["clients"] for charge in found["charges"]) == 6
    for charge in found["charges"]:
        smallest, largest = charge["examples"]
        assert charge["sample_rate"] == pytest.approx(min(1, 16 / smallest))
        assert charge["steps"] == -(-largest // 16)
    rounds = [entry["round"] for entry in found["epsilon_by_round"]]
    assert rounds == sorted({1, *range(2, found["participations"] + 1, 2), found["participations"], 25})
    spent = [entry["epsilon"] for entry in found["epsilon_by_round"]]
    assert 0 < spent[0] < spent[1] < spent[-2] == spent[-1] == found["epsilon"], "no client takes part in more rounds"
    assert found["warnings"] == []


def test_a_delta_that_is_too_large_for_the_largest_client(shown) -> None:
    found = shown(SAMPLE, "privacy.delta=0.01")
    largest = found["charges"][-1]["examples"][-1]
    assert found["warnings"][0].startswith(f"delta 0.01 is not below 1/{largest}: ")


def test_client_level(shown) -> None:
    found = shown(*CLIENT, "rounds=10")
    assert (found["unit"], found["trust"], found["participations"]) == ("client", "the server", 10)
    (charge,) = found["charges"]
    assert (charge["clients"], charge["noise_multiplier"], charge["sample_rate"], charge["steps"]) == (6, 2.0, 0.5, 1)
    assert [entry["round"] for entry in found["epsilon_by_round"]] == [*range(1, 11)]
    assert found["signal_to_noise"]["per_round"] == pytest.approx(3 / (2 * 610**0.5))


def test_as_many_rounds_as_any_client_is_drawn_for(shown) -> None:
    assert shown(SAMPLE, "clients.per_round=6")["participations"] == 4
    assert (
        shown('privacy={noise_multiplier=1.0, delta=1e-4, accountant="rdp", max_participations=2}')["participations"]
        == 2
    )


def test_parameters_that_stay_or_do_not_train_are_not_counted(shown) -> None:
    assert shown(SAMPLE, 'personalization.private=["*bias"]')["parameters"] == 64 * 8 + 8 * 10


def test_what_is_hopeless_is_said(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(
        tiny,
        'privacy={unit="client", epsilon=0.5, delta=1e-5, accountant="rdp"}',
        "clients.sampling=poisson",
        "task.options={hidden=[200,200]}",
        as_json=False,
    )
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert told.startswith("warning: Hopeless: over the run the noise is ")
    assert "clients a round, all else equal" in told


def test_seeded_noise_is_not_private(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(tiny, SAMPLE, "privacy.noise_seed=1", as_json=False)
    assert "NOT PRIVATE: the noise follows from a seed" in capsys.readouterr().out


def test_for_a_person(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(tiny, *CLIENT, as_json=False)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "tiny: 4 rounds, 3 of 6 clients in each, 610 trained parameters"
    assert "Unit        each client, with all its examples (add/remove one)" in lines
    assert "Trust       the server" in lines
    assert any(line.split()[:4] == ["after", "round", "epsilon"] for line in lines)
    assert any("Epsilon" in line and "(delta 0.0001, add/remove one client, RDP accountant" in line for line in lines)
    tables = [line for line in lines if "  " in line]
    assert max(map(len, tables)) <= 80
    assert max(map(len, fold(out, 80).splitlines())) <= 80


def test_without_privacy_it_says_that_nothing_is_protected(
    tiny: Path, shown, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shown()
    assert (found["unit"], found["rounds"], found["clients_per_round"]) == (None, 4, 3)
    planned(tiny, as_json=False)
    out = capsys.readouterr().out
    least, most = found["steps_per_round"]
    assert "NOT PRIVATE: the experiment has no [privacy], so nothing is protected." in out
    assert f"Steps of a client's round: {least} to {most}" in out


def test_pld_needs_its_package(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(MissingExtraError, match=r"fedtrain\[pld\]"):
        planned(tiny, SAMPLE, pld=True)


def test_pld_stands_beside(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        "fedtrain.privacy.accounting._pld_epsilon", lambda history, delta: sum(s.steps for s in history)
    )
    planned(tiny, *CLIENT, pld=True)
    assert json.loads(capsys.readouterr().out)["epsilon_pld"] == 4
    planned(tiny, *CLIENT, pld=True, as_json=False)
    assert "At the end, by PLD: 4.000" in capsys.readouterr().out


def test_faults_of_the_section_are_named(tiny: Path) -> None:
    with pytest.raises(ExperimentError, match="give either epsilon, the budget of the whole run, or noise_multiplier"):
        planned(tiny, "privacy={delta=1e-5}")


def test_the_documented_plan_is_the_real_one(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    (block,) = re.findall(
        r"```console\n\$ fedtrain plan \S+\n(.*?)```", (root / "docs" / "systems.md").read_text(), re.DOTALL
    )
    file = root / "examples" / "devices.toml"
    plan(load(file), file.parent, None, pld=False, as_json=False)
    assert capsys.readouterr().out.startswith(block)
