import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedtrain.cli.ca import app, enroll
from fedtrain.errors import InputError
from fedtrain.link.identity import Identity, Token


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def said(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.exception
    return result.output


def entries() -> list[tuple[str, str, str]]:
    return [(one["name"], one["kind"], one["state"]) for one in json.loads(said("list", "--json"))["entries"]]


def invited(name: str, server: str, *options: str) -> str:
    (token,) = re.findall(r"^  fedtrain client enroll (\S+)$", said("invite", name, "--server", server, *options), re.M)
    return token


@pytest.fixture
def address() -> Iterator[str]:
    """Of `ca serve`, in a process of its own."""
    said("init")
    command = [sys.executable, "-c", "from fedtrain.cli.ca import app; app()", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield re.search(r"served on (\S+)\. Stop it", process.stdout.readline())[1]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "Stopped.\n")
    assert all(re.match(r"\d{4}-\d\d-\d\d .* Enrol", line) for line in err.splitlines())


def test_from_nothing_to_a_member_and_out_again(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    token = invited("north", address)
    enroll(token, Path("site"))
    identity = Identity.load(Path("site"))
    told = capsys.readouterr().out
    assert told.startswith(f"Enrolled as north, until {identity.not_after:%Y-%m-%d %H:%M} UTC.")
    assert "Next, take part: fedtrain client --server" in told
    assert entries() == [
        ("fedtrain server", "server", "valid"),
        ("north", "client", "valid"),
        ("north", "invitation", "used"),
    ]
    with pytest.raises(InputError, match="the token is not valid"):
        enroll(token, Path("elsewhere"))
    assert said("revoke", "north").startswith("Revoked north: 1 valid certificate;")
    assert ("north", "client", "revoked") in entries()
    assert re.search("^north +client +revoked +since ", said("list"), re.M)


def test_each_command_tells_the_next() -> None:
    assert "fedtrain ca invite NAME --server HOST:7444\n" in said("init")
    assert "fedtrain ca invite NAME --server HOST:7444 --ca other\n" in said("init", "--ca", "other")
    assert "fedtrain ca invite NAME" in said("list")
    out = said("invite", "north", "--server", "train.example.org:9000", "--ca", "other")
    assert "fedtrain ca serve --listen 0.0.0.0:9000 --ca other\n" in out
    assert Path("ca/key.pem").exists()


@pytest.mark.parametrize(("valid", "minutes"), [("30m", 30), ("12h", 720), ("3d", 4320)])
def test_how_long_an_invitation_lasts(valid: str, minutes: int) -> None:
    said("init")
    token = Token.read(invited("north", "localhost:7444", "--valid", valid))
    assert (token.name, token.server) == ("north", "localhost:7444")
    (entry,) = json.loads(said("list", "--json"))["entries"]
    left = datetime.fromisoformat(entry["time"]) - datetime.now(UTC)
    assert left.total_seconds() / 60 == pytest.approx(minutes, abs=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init"], "cannot make a certificate authority"),
        (["invite", "north", "--server", "x"], "no valid address: got x; expected HOST:PORT"),
        (["invite", "north", "--server", "x:1", "--valid", "3y"], "no valid time: got 3y; expected a number with d, h"),
        (["invite", "north", "--server", "x:1", "--valid", "31d"], "expected up to 30 days"),
        (["invite", "../north", "--server", "x:1"], "no valid name for a client: got ../north"),
        (["revoke", "north"], "no client has this name: got north. There is none"),
        (["list", "--ca", "missing"], "there is no certificate authority here: got missing. Make one with"),
        (["serve", "--listen", "nowhere"], "no valid address"),
    ],
)
def test_input_that_is_refused(arguments: list[str], message: str) -> None:
    said("init")
    error = run(*arguments).exception
    assert isinstance(error, InputError)
    assert error.exit_code == 2
    assert message in str(error)
    assert entries() == []


def test_a_new_token_replaces_the_open_one() -> None:
    said("init")
    first, second = (invited("north", "localhost:7444") for _ in range(2))
    assert first != second
    assert [line.split()[:3] for line in said("list").splitlines()[1:]] == [["north", "invitation", "open"]]
    assert said("list").splitlines()[1].split()[3] == "until"
    assert invited("north", "localhost:7444", "--replace")


def test_a_narrow_table() -> None:
    said("init")
    invited("n" * 24, "localhost:7444")
    assert max(map(len, said("list").splitlines())) <= 80


def test_an_identity_is_a_folder() -> None:
    Path("identity").touch()
    with pytest.raises(InputError, match="--identity is no folder: got identity"):
        enroll("token", Path("identity"))
