import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedtrain.cli.privacy import app
from fedtrain.errors import InputError
from fedtrain.experiment import load
from fedtrain.privacy.accounting import Spend, epsilon
from fedtrain.privacy.book import Account
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.policy import Policy, Request, load_policy
from fedtrain.records import PrivacySummary
from fedtrain.rundir import RunFolder

pytest.importorskip("opacus")

POLICY = Policy(max_epsilon=10.0, delta=1e-4)
REQUEST = Request(
    run="run-of-a-name-that-is-longer-than-a-column",
    round_number=1,
    experiment="xray",
    experiment_hash="a" * 64,
    task="cnn",
    parameters=10,
    model_bytes=40,
    unit="sample",
    noise_multiplier=2.0,
    sample_rate=0.1,
    steps=20,
)


def nothing(history: Sequence[Spend], delta: float) -> float:
    return 0.0


def write(folder: Path, client: str, rounds: int, committed: int) -> Path:
    """A ledger of some rounds of 20 steps, of which 18 were taken where it was committed."""
    account = Account(client, "f" * 64, "sample")
    with Ledger(folder, account, nothing) as ledger:
        for number in range(1, rounds + 1):
            name = ledger.reserve(replace(REQUEST, round_number=number), POLICY)
            if number <= committed:
                ledger.commit(name, 18)
    return account.path(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clients: north with 18 + 18 + 20 steps, the last not committed; south with 18."""
    write(tmp_path, "north", 3, 2)
    write(tmp_path, "south", 1, 1)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def found(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.output)


def priced(steps: int, delta: float, accountant: str = "prv") -> float:
    return epsilon([Spend(2.0, 0.1, steps)], delta, accountant).value


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"steps":20', b'"steps":19'))


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_status_adds_up_each_account(folder: Path) -> None:
    status = found("status", folder)
    assert (status["delta"], status["delta_from"], status["accountant"]) == (1e-5, "unless --delta says else", "prv")
    north, south = status["accounts"]
    assert north["account"] == {"client_id": "north", "fingerprint": "f" * 64, "unit": "sample"}
    assert (north["rounds"], north["steps"], north["uncommitted"], north["epsilon"]) == (3, 56, 1, priced(56, 1e-5))
    assert (south["rounds"], south["steps"], south["uncommitted"], south["epsilon"]) == (1, 18, 0, priced(18, 1e-5))
    assert "by_round" not in north


def test_status_by_rdp(folder: Path) -> None:
    assert found("status", folder, "--fast")["accounts"][0]["epsilon"] == priced(56, 1e-5, "rdp")


def test_status_tells_what_each_round_of_a_client_added(folder: Path) -> None:
    (north,) = found("status", folder, "--client", "north", "--fast")["accounts"]
    spent = [priced(steps, 1e-5, "rdp") for steps in (18, 36, 56)]
    assert [entry["epsilon"] for entry in north["by_round"]] == spent
    assert [entry["increment"] for entry in north["by_round"]] == pytest.approx(
        [spent[0], spent[1] - spent[0], spent[2] - spent[1]]
    )
    assert [entry["committed"] for entry in north["by_round"]] == [True, True, False]


def test_status_of_an_unknown_client(folder: Path) -> None:
    error = run("status", folder, "--client", "nroth").exception
    assert error.exit_code == 2
    assert str(error) == "no ledger is of this client: got nroth. Did you mean north?"


def test_delta_as_asked_or_of_the_policy_or_of_the_run(folder: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("max_epsilon = 3\ndelta = 1e-6")
    by_policy = found("status", folder, "--policy", policy)
    assert (by_policy["delta"], by_policy["max_epsilon"]) == (1e-6, 3.0)
    assert by_policy["accounts"][0]["epsilon"] == priced(56, 1e-6)
    asked = found("status", folder, "--policy", policy, "--delta", "1e-3")
    assert (asked["delta"], asked["max_epsilon"]) == (1e-3, None)
    told = run("status", folder, "--policy", policy).output
    assert f"The policy allows epsilon 3; at most {priced(56, 1e-6):.3f} was spent on one data set." in told


def test_a_delta_that_is_none(folder: Path) -> None:
    error = run("status", folder, "--delta", "1").exception
    assert (error.exit_code, str(error)) == (2, "no valid delta: got 1.0; expected a number between 0 and 1")


def private_run(folder: Path, ledgers: str) -> Path:
    folder.mkdir()
    summary = PrivacySummary.model_construct(
        unit="sample",
        relation="add/remove one",
        delta=1e-3,
        accountant="prv",
        sampling="Poisson",
        planned_epsilon=1.0,
        noise_multiplier=(2.0, 2.0),
        sample_rate=(0.1, 0.1),
        steps=(20, 20),
        participations=3,
        clipping="",
        seeded=False,
        ledgers=ledgers,
    )
    RunFolder(folder).write_privacy(summary)
    return folder


def test_a_run_has_its_own_ledgers_or_names_them(tmp_path: Path) -> None:
    own = private_run(tmp_path / "own", "ledgers")
    write(own / "ledgers", "north", 1, 1)
    status = found("status", own)
    assert (status["delta"], status["delta_from"], len(status["accounts"])) == (1e-3, "the run's", 1)
    shared = private_run(tmp_path / "shared", str(tmp_path / "elsewhere"))
    write(tmp_path / "elsewhere", "south", 1, 1)
    assert found("status", shared)["accounts"][0]["account"]["client_id"] == "south"


def test_a_folder_in_which_the_ledgers_lie(tmp_path: Path) -> None:
    write(tmp_path / "ledgers", "north", 1, 1)
    assert len(found("verify", tmp_path)["ok"]) == 1


@pytest.mark.parametrize("command", ["status", "verify", "export"])
def test_no_ledger_there(command: str, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        error = run(command, place).exception
        assert error.exit_code == 2
        assert str(error).startswith("there are no privacy ledgers here: got ")


@pytest.mark.parametrize(
    ("made", "told"),
    [("roster.json", r"on its own machine, in its --home: fedtrain privacy status HOME$"), ("local-clients", "/NAME$")],
)
def test_the_ledgers_of_a_deployed_run_are_its_clients(made: str, told: str, tmp_path: Path) -> None:
    deployed = private_run(tmp_path / "run", "ledgers")
    (deployed / "roster.json").write_text("{}")
    if made == "local-clients":
        (deployed / made).mkdir()
    error = run("status", deployed).exception
    assert error.exit_code == 2
    assert re.search(f"Each client of this run keeps its own, .*{told}", str(error))


@pytest.mark.parametrize("command", ["status", "verify", "export"])
def test_a_ledger_that_is_held_is_read_and_nothing_is_changed(command: str, folder: Path) -> None:
    before = content(folder)
    with Ledger(folder, Account("north", "f" * 64, "sample"), nothing):
        assert run(command, folder).exit_code == 0
    assert content(folder) == before


def test_verify_names_each_ledger(folder: Path) -> None:
    result = run("verify", folder)
    assert result.exit_code == 0
    assert [line.split()[:5] for line in result.output.splitlines()] == [
        ["ok", "north", "sample", "6", "entries,"],
        ["ok", "south", "sample", "3", "entries,"],
    ]


def test_verify_tells_of_a_crash(folder: Path) -> None:
    path = Account("south", "f" * 64, "sample").path(folder)
    with path.open("ab") as file:
        file.write(b'{"previ')
    assert "note: a crash came before the last entry was whole" in run("verify", folder).output
    assert found("verify", folder)["ok"][1]["notes"] != []


def test_a_ledger_under_another_name_is_no_ledger_of_its_account(folder: Path) -> None:
    path = Account("north", "f" * 64, "sample").path(folder)
    for kind in (".jsonl", ".head"):
        path.with_suffix(kind).rename(folder / f"sample-{'0' * 32}{kind}")
    result = run("verify", folder)
    assert result.exit_code == 1
    assert "its name is not that of its client and data" in " ".join(result.output.split())


def test_a_run_without_privacy_has_no_ledgers_to_show(folder: Path, simulated: Callable, tiny: Path) -> None:
    out, _ = simulated(tiny, "out", "rounds=1")
    for command in ("status", "verify"):
        with pytest.raises(InputError, match="this run protects nobody, and keeps no ledgers"):
            CliRunner().invoke(app, [command, str(out)], catch_exceptions=False)


def test_a_damaged_ledger_is_named_and_the_others_are_shown(folder: Path) -> None:
    path = Account("north", "f" * 64, "sample").path(folder)
    damage(path)
    before = content(folder)
    for command in ("verify", "status"):
        for form in ([], ["--json"]):
            result = run(command, folder, *form)
            assert result.exception.exit_code == 1
            assert str(result.exception).startswith(f"1 of 2 privacy ledgers cannot be trusted: got {path.name}")
            assert "south" in result.output
            assert ("does not follow" in result.output) is (command == "verify" or form == ["--json"])
    assert run("export", folder).exception.exit_code == 1
    assert run("export", folder).output == ""
    assert content(folder) == before


def test_a_ledger_whose_head_alone_is_left_is_damaged(folder: Path) -> None:
    Account("north", "f" * 64, "sample").path(folder).unlink()
    assert run("verify", folder).exception.exit_code == 1


def test_export_can_be_checked_by_anybody(folder: Path) -> None:
    ledgers = json.loads(run("export", folder).output)["ledgers"]
    assert [ledger["client_id"] for ledger in ledgers] == ["north", "south"]
    previous = "0" * 64
    for entry in ledgers[0]["entries"]:
        assert entry["entry"]["previous"] == previous
        previous = hashlib.sha256(json.dumps(entry["entry"], separators=(",", ":")).encode()).hexdigest()
        assert entry["sha256"] == previous
    assert ledgers[0]["head"] == previous


def test_export_to_a_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run("export", folder, "--out", out)
    assert result.output == f"Wrote 2 ledgers to {out}\n"
    assert out.read_text() == run("export", folder).output
    error = run("export", folder, "--out", tmp_path / "missing" / "out.json").exception
    assert error.exit_code == 2
    assert "cannot write" in str(error)


def test_for_a_person_in_80_columns(folder: Path) -> None:
    write(folder, "a client of a very long name \x1b[31m", 1, 1)
    out = run("status", folder, "--client", "north").output + run("status", folder).output
    lines = out.splitlines()
    table = [line for line in lines if "  " in line]
    assert max(map(len, table)) <= 80
    assert "\x1b" not in out + run("verify", folder).output
    assert any(line.startswith("north            sample ffffffff      3       56    1 ") for line in lines)
    assert sum(line.endswith(" open") for line in table) == 1


def test_the_guide_shows_valid_sections(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "shown.toml").write_text('[data]\nname = "mnist"\nclients = 1000\n' + block)
        assert load(tmp_path / "shown.toml").privacy is not None
    (policy,) = re.findall(r"^```text\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "policy.toml").write_text(policy)
    assert load_policy(tmp_path / "policy.toml").max_epsilon == 3.0
