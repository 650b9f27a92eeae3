import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

CHECKS = [
    "inputs",
    "targets",
    "first loss",
    "gradient",
    "reach",
    "units",
    "gradient norms",
    "learning rate",
    "DP-SGD",
    "one batch",
]


def test_it_shows_layers_and_findings(fedtrain: Callable, tiny: Path) -> None:
    result = fedtrain("check", tiny)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("mlp on ")
    assert lines[2].split() == ["Layer", "Kind", "Output", "Parameters", "Trained", "Deviation", "Dead"]
    layers = {line.split()[0]: line.split() for line in lines[3 : lines.index("", 3)]}
    assert layers["fc1"][1:5] == ["Linear", "8", "520", "520"]
    verdicts = {line[6:22].strip(): line.split()[0] for line in lines if line.startswith(("ok ", "odd ", "wrong "))}
    assert list(verdicts) == CHECKS
    assert lines[-1] == f"All {len(CHECKS)} checks are ok."
    assert list(tiny.parent.iterdir()) == [tiny], "nothing is written"


def test_json_has_the_same_of_the_client_that_is_named(fedtrain: Callable, tiny: Path) -> None:
    result = fedtrain("check", tiny, "--json", "--client", "client-2", "--set", 'model.freeze=["fc1.*"]')
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["client"] == "client-2"
    assert [one["name"] for one in found["findings"]] == CHECKS
    layers = {one["name"]: one for one in found["layers"]}
    assert [layers[name]["trained"] for name in ("fc1", "fc2")] == [0, 90]
    assert layers["fc2"]["shape"] == [10]


def test_what_cannot_work_is_exit_code_1_and_all_checks_are_made(fedtrain: Callable, tiny: Path) -> None:
    result = fedtrain("check", tiny, "--set", "training.optimizer.lr=1e30")
    assert (result.code, result.err) == (1, "")
    lines = [line for line in result.out.splitlines() if line.startswith("wrong")]
    assert len(lines) == 1
    assert lines[0].split()[1:3] == ["learning", "rate"]
    assert "training diverges" in " ".join(result.out.split())
    assert result.out.splitlines()[-1] == f"1 of {len(CHECKS)} checks failed: training cannot work like this."


def test_what_is_odd_is_exit_code_0(fedtrain: Callable, tiny: Path) -> None:
    result = fedtrain("check", tiny, "--set", "training.optimizer.lr=1e-9")
    assert result.code == 0
    assert result.out.splitlines()[-1] == f"1 of {len(CHECKS)} checks found something odd."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--client", "client-9"), "there is no such client: got client-9"),
        (("--set", "training.optimizer.lr=-1"), "training.optimizer.lr: got -1"),
        (("--set", 'training.loss={name="mse"}'), 'training.loss.name = "mse" does not go with'),
        (("--set", "data.name=mnist", "--data-root", "nowhere"), "nowhere"),
        (("--bogus",), "No such option"),
    ],
)
def test_what_cannot_be_checked_is_exit_code_2(
    fedtrain: Callable, tiny: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = fedtrain("check", tiny, *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in " ".join(result.err.split())
