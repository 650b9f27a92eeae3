from dataclasses import replace
from pathlib import Path

import pytest

from fedtrain.errors import ExperimentError, InputError
from fedtrain.privacy.policy import Policy, Request, load_policy

HASH = "a" * 64
REQUEST = Request(
    run="run-1",
    round_number=3,
    experiment="xray",
    experiment_hash=HASH,
    task="cnn",
    parameters=1000,
    model_bytes=4000,
    unit="sample",
    noise_multiplier=1.0,
    sample_rate=0.1,
    steps=10,
)
POLICY = Policy(max_epsilon=8.0, delta=1e-5)


def written(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text)
    return path


def test_a_policy_file_says_what_its_owner_allows(tmp_path: Path) -> None:
    policy = load_policy(
        written(
            tmp_path,
            f"""
            max_epsilon = 3
            delta = 1e-6
            least_noise_multiplier = 0.8
            tasks = ["cnn", "mlp"]
            experiments = ["{HASH}"]
            max_parameters = 2_000_000
            """,
        )
    )
    assert (policy.max_epsilon, policy.delta, policy.least_noise_multiplier) == (3.0, 1e-6, 0.8)
    assert policy.tasks == ["cnn", "mlp"]
    assert policy.max_parameters == 2_000_000
    assert policy.unit == "sample"
    assert policy.objections(REQUEST) == []


def test_what_the_policy_leaves_out_is_allowed() -> None:
    assert POLICY.objections(REQUEST) == []


@pytest.mark.parametrize(
    ("policy", "asked", "objection"),
    [
        ({"least_noise_multiplier": 1.1}, {}, "noise_multiplier 1.0: the policy asks for at least 1.1"),
        ({"tasks": ["mlp"]}, {}, "task cnn: the policy allows mlp"),
        ({"experiments": ["knee"]}, {}, "experiment xray (aaaaaaaaaaa…): the policy allows knee"),
        ({"experiments": ["b" * 64]}, {}, f"experiment xray (aaaaaaaaaaa…): the policy allows {'b' * 64}"),
        ({"max_parameters": 999}, {}, "a model of 1000 parameters: the policy allows 999"),
        ({"max_model_bytes": 3999}, {}, "a model of 4000 bytes: the policy allows 3999"),
        ({}, {"unit": "client"}, "unit client: the policy allows sample"),
        ({}, {"noise_multiplier": 0.0}, "noise_multiplier 0.0: must be a finite number above 0"),
        ({}, {"noise_multiplier": float("inf")}, "noise_multiplier inf: must be a finite number above 0"),
        ({}, {"sample_rate": 0.0}, "sample_rate 0.0: must be a number above 0 and up to 1"),
        ({}, {"sample_rate": 1.01}, "sample_rate 1.01: must be a number above 0 and up to 1"),
        ({}, {"sample_rate": float("nan")}, "sample_rate nan: must be a number above 0 and up to 1"),
        ({}, {"steps": 0}, "steps 0: must be at least 1"),
        ({}, {"steps": -5}, "steps -5: must be at least 1"),
        ({}, {"round_number": 0}, "round_number 0: must be at least 1"),
        ({}, {"run": "r" * 201}, f"run {'r' * 79}…: must be 1 to 200 characters"),
        ({}, {"experiment_hash": "A" * 64}, f"experiment_hash {'A' * 64}: must be a SHA-256 in hex"),
    ],
)
def test_each_objection_alone(policy: dict, asked: dict, objection: str) -> None:
    assert POLICY.model_copy(update=policy).objections(replace(REQUEST, **asked)) == [objection]


@pytest.mark.parametrize("edge", [{"noise_multiplier": 1.1}, {"sample_rate": 1.0}, {"steps": 1}, {"run": "r" * 200}])
def test_the_bounds_themselves_are_allowed(edge: dict) -> None:
    policy = POLICY.model_copy(update={"least_noise_multiplier": 1.0, "max_parameters": 1000, "max_model_bytes": 4000})
    assert policy.objections(replace(REQUEST, **edge)) == []


def test_an_experiment_is_allowed_by_its_name_or_by_its_hash() -> None:
    assert POLICY.model_copy(update={"experiments": ["xray"]}).objections(REQUEST) == []
    assert POLICY.model_copy(update={"experiments": [HASH]}).objections(REQUEST) == []


def test_nan_is_no_noise() -> None:
    objections = POLICY.objections(replace(REQUEST, noise_multiplier=float("nan")))
    assert objections[0] == "noise_multiplier nan: must be a finite number above 0"


def test_a_name_from_the_server_cannot_reach_the_terminal_raw() -> None:
    policy = POLICY.model_copy(update={"tasks": ["mlp"], "experiments": ["knee"]})
    objections = policy.objections(replace(REQUEST, task="\x1b[31m" + "x" * 500, experiment="\x1b[0m"))
    assert not any("\x1b" in text or len(text) > 200 for text in objections)


def test_all_faults_of_a_file_in_one_error(tmp_path: Path) -> None:
    text = """
        max_epsilon = -1
        detla = 1e-5
        unit = "exmaple"
        tasks = []
        experiments = [3]
        max_parameters = "many"
        """
    with pytest.raises(ExperimentError) as error:
        load_policy(written(tmp_path, text))
    assert {fault.path: fault.got for fault in error.value.faults} == {
        "max_epsilon": "-1",
        "delta": "nothing",
        "detla": "an unknown key",
        "unit": '"exmaple"',
        "tasks": "[]",
        "experiments[0]": "3",
        "max_parameters": '"many"',
    }
    told = str(error.value)
    assert told.startswith(f"{tmp_path / 'policy.toml'} has 7 faults\n")
    assert "delta: got nothing; expected a number greater than 0 and below 1. The delta at which" in told
    assert "Did you mean delta?" in told
    assert "Did you mean sample?" in told


@pytest.mark.parametrize(
    "text", ["max_epsilon = ", "\xff", "max_epsilon = inf\ndelta = 0.1", "max_epsilon = 1\ndelta = 1"]
)
def test_a_policy_that_cannot_be_meant_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ExperimentError, match="has 1 fault"):
        load_policy(path)


def test_no_policy_no_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(No such file.*no policy, no training"):
        load_policy(tmp_path / "policy.toml")


def test_an_editor_on_windows_writes_a_policy_too(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes("max_epsilon = 1\r\ndelta = 1e-5 # café".encode("utf-8-sig"))
    assert load_policy(path).max_epsilon == 1
