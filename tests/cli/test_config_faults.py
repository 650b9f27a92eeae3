"""Every fault of an experiment file is in one error with its dotted path, exit code 2, and nothing is made."""

from collections.abc import Callable
from pathlib import Path

import pytest

DIGITS = '[data]\nname = "digits"\nclients = 5\n'


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            DIGITS + '[training]\noptimiser = "sgd"',
            ["training.optimiser: got an unknown key", "Did you mean optimizer?"],
        ),
        (DIGITS + "[datta]\nx = 1", ["datta: got an unknown key", "Did you mean data?"]),
        ('rounds = "20"\n' + DIGITS, ['rounds: got "20"; expected an integer from 1 to 1000000']),
        (DIGITS + "[clients]\nquorum = 1.5", ["clients.quorum: got 1.5; expected a number from 0 to 1"]),
        (DIGITS + "partition = { kind = 'dirichlet', alpha = -1 }", ["data.partition.alpha: got -1"]),
        (DIGITS + "[task]\nname = 3", ["task.name: got 3; expected a string"]),
        ("rounds = 3", ["data: got nothing; expected a table with name, path"]),
        (DIGITS + "rounds = 3 4", ["line 4, column 12: got rounds = 3 4; expected TOML"]),
        ("\x00\x01 PK", ["file.toml has 1 fault", "expected TOML"]),
        (
            DIGITS + "[training]\nlocal_epochs = 1\nlocal_steps = 2",
            ["training: got local_epochs = 1, local_steps = 2", "contradict each other: give one"],
        ),
        (DIGITS + "[clients]\nper_round = 6", ["clients.per_round = 6", "data.clients = 5"]),
        (
            DIGITS + "[strategy]\nname = 'scafold'",
            ['strategy.name: got "scafold"; expected one of: fedavg,', "scaffold?"],
        ),
        (DIGITS + "[strategy]\nmu = 0.1", ["strategy.mu: got an unknown key", "mu goes with name = fedprox or ditto."]),
        (DIGITS + "[strategy]\nname = 'fedbuff'", ["got no strategy.buffer_size, data.clients = 5"]),
    ],
)
def test_a_fault_has_its_path_and_what_is_allowed(fedtrain: Callable, text: str, told: list[str]) -> None:
    Path("file.toml").write_text(text)
    result = fedtrain("simulate", "file.toml")
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    assert result.err.startswith("fedtrain: file.toml has 1 fault\n")
    for part in told:
        assert part in result.err
    assert [path.name for path in Path().iterdir()] == ["file.toml"]


def test_all_faults_are_told_at_once(fedtrain: Callable) -> None:
    Path("file.toml").write_text("lr = 0.1\nrounds = 0\n" + DIGITS + "[training]\nbatch_size = 1.5\n")
    result = fedtrain("simulate", "file.toml", "--set", "clients.quorum=2", "--set", "oops")
    assert result.code == 2
    first, *faults = result.err.splitlines()
    assert first == "fedtrain: file.toml has 5 faults"
    assert {fault.split(":")[0].strip() for fault in faults} == {
        "lr",
        "rounds",
        "training.batch_size",
        "clients.quorum",
        "--set oops",
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fiel.toml", "there is no such experiment file: got fiel.toml. Did you mean file.toml?"),
        ("folder", "the experiment file is a folder: got folder"),
        ("latin.toml", "the experiment file is not UTF-8 text: got latin.toml"),
    ],
)
@pytest.mark.parametrize("command", [["simulate"], ["data", "describe"]])
def test_a_file_that_cannot_be_read(fedtrain: Callable, command: list[str], name: str, told: str) -> None:
    Path("file.toml").write_text(DIGITS)
    Path("folder").mkdir()
    Path("latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    result = fedtrain(*command, name)
    assert (result.code, result.out) == (2, "")
    assert told in result.err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("task.name=cnnn", "there is no such built-in task: got cnnn"),
        ("task.options={ width = 3 }", "task 'mlp' has no such option: got width"),
        ("task.name=gone.py:Task", "there is no such Python file"),
        ("strategy.name=gone.py:build", "there is no such Python file"),
        ("data.name=digit", "there is no such data source: got digit"),
        ("data.options={ size = 3 }", "digits"),
        ("data.clients=5000", "there are more clients than examples: got data.clients = 5000"),
    ],
)
def test_a_fault_that_shows_with_the_data_leaves_no_folder(fedtrain: Callable, change: str, told: str) -> None:
    Path("file.toml").write_text(DIGITS)
    result = fedtrain("simulate", "file.toml", "--set", "run.workers=0", "--set", change)
    assert result.code == 2
    assert told in result.err
    assert "Traceback" not in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--rounds", "Values of the experiment are changed by --set, such as --set rounds=VALUE"),
        ("--learning-rate", "such as --set training.optimizer.lr=VALUE"),
        ("--foo", "No such option: --foo"),
    ],
)
def test_an_option_that_is_a_key_is_told_of_set(fedtrain: Callable, option: str, told: str) -> None:
    Path("file.toml").write_text(DIGITS)
    result = fedtrain("simulate", "file.toml", option, "3")
    assert (result.code, result.out) == (2, "")
    assert told in result.err
    assert ("--set" in result.err) == (option != "--foo")
    assert option == "--foo" or "Did you mean" not in result.err
    assert "--set" not in fedtrain("report", "run", option, "3").err
