"""Private runs that are really killed and started again never count less than they released."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.privacy.accounting import Spend, bound_within
from fedtrain.privacy.book import Book, ledgers

KILL_AT = Path(__file__).with_name("kill_at.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
EVERYBODY = """
seed = 3
rounds = 4
[task]
name = "logistic"
[data]
name = "digits"
clients = 3
central_test = 0.2
[training]
batch_size = 200
local_steps = 2
[privacy]
noise_multiplier = 2.0
delta = 1e-4
accountant = "rdp"
[run]
workers = 0
device = "cpu"
"""
BY_THE_SERVER = EVERYBODY.replace("[privacy]", '[privacy]\nunit = "client"')


def kill_at(point: str, file: Path, out: Path) -> None:
    command = [sys.executable, str(KILL_AT), point, "simulate", str(file), "--out", str(out)]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "model.safetensors").exists()


def histories(out: Path) -> list[list[Spend]]:
    return [Book(path, bound_within(1e9)).history() for path in ledgers(out / "ledgers")]


def rounds(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "private.toml"
    path.write_text(EVERYBODY)
    return path


# Client 0 has reserved; client 0 has committed; the second update was on its way; all updates are in the model.
@pytest.mark.parametrize(("point", "repeated"), [("reserved", 1), ("committed", 1), ("mid-round", 2), ("released", 3)])
def test_a_killed_round_is_paid_for_again_by_who_had_begun_it(
    point: str, repeated: int, file: Path, tmp_path: Path, simulated: Callable
) -> None:
    out = tmp_path / "out"
    kill_at(point, file, out)
    resumed, notices = simulated(file, "out")
    # The noise is calibrated for four rounds: who has paid for one twice has three, and ends before the last.
    ended = [client for record in rounds(resumed) for client in record["ended"]]
    charge = histories(out)[0][0]
    begun = [history[0].steps // 2 for history in histories(out)]
    assert charge == Spend(2.0, min(1.0, 200 / 479), 8)
    assert begun == [4, 4, 4]
    assert len(ended) == repeated
    assert rounds(resumed)[-1]["epsilon"] >= max(bound_within(1e9)(h, 1e-4) for h in histories(out))
    assert any("resuming" in notice for notice in notices)


def test_a_killed_server_pays_again_for_noise_that_was_in_the_model(
    file: Path, tmp_path: Path, simulated: Callable
) -> None:
    file.write_text(BY_THE_SERVER)
    kill_at("released", file, tmp_path / "out")
    resumed, notices = simulated(file, "out")
    # Round 2 was paid for twice, and so the fourth of the planned four is round 3.
    assert histories(resumed) == [[Spend(2.0, 1.0, 4)]]
    assert [record["round_number"] for record in rounds(resumed)] == [0, 1, 2, 3]
    assert rounds(resumed)[-1]["epsilon"] == bound_within(1e9)([Spend(2.0, 1.0, 4)], 1e-4)
    assert "the run ends after round 3: all 4 rounds of noise that the plan has are used up" in notices[-1]
    assert json.loads((resumed / "manifest.json").read_text())["status"] == "complete"


def test_nothing_is_paid_for_noise_that_was_never_drawn(file: Path, tmp_path: Path, simulated: Callable) -> None:
    file.write_text(BY_THE_SERVER)
    kill_at("mid-round", file, tmp_path / "out")
    resumed, _ = simulated(file, "out")
    assert histories(resumed) == [[Spend(2.0, 1.0, 4)]]
    assert [record["round_number"] for record in rounds(resumed)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("text", [EVERYBODY, BY_THE_SERVER], ids=["sample", "client"])
def test_seeded_noise_comes_back_to_the_byte(text: str, file: Path, tmp_path: Path, simulated: Callable) -> None:
    file.write_text(text.replace("delta", "noise_seed = 5\ndelta"))
    kill_at("mid-round", file, tmp_path / "killed")
    killed, whole = (simulated(file, name)[0] for name in ("killed", "whole"))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert rounds(killed)[-1]["epsilon"] == rounds(whole)[-1]["epsilon"]
