import datetime
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from safetensors.torch import load_file

from fedtrain import wire
from fedtrain.errors import (
    InputError,
    InterruptedRunError,
    LedgerError,
    PrivacyError,
    RunError,
    TaskError,
)
from fedtrain.privacy.accounting import Spend, bound_within
from fedtrain.privacy.book import Book, ledgers
from fedtrain.server import manifest
from fedtrain.server.rounds import Server
from fedtrain.strategies.central_dp import central_dp
from fedtrain.training import loop

SAMPLE = """
seed = 3
rounds = 3
[task]
name = "logistic"
[data]
name = "digits"
clients = 4
partition = { kind = "quantity", alpha = 1.0, min_examples = 60 }
central_test = 0.2
[training]
batch_size = 50
local_steps = 4
[privacy]
epsilon = 8.0
delta = 1e-4
accountant = "rdp"
[run]
workers = 0
device = "cpu"
"""
CLIENT = (
    SAMPLE.replace("clients = 4", "clients = 40")
    .replace("60 }", "2 }")
    .replace("[privacy]", '[privacy]\nunit = "client"')
    .replace("[training]", '[clients]\nper_round = 20\nsampling = "poisson"\n[training]')
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "private.toml"
    path.write_text(SAMPLE)
    return path


def rounds(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def books(folder: Path) -> list[Book]:
    return [Book(path, bound_within(1e9)) for path in ledgers(folder)]


def test_the_ledgers_hold_what_was_planned(file: Path, simulated: Callable) -> None:
    out, _ = simulated(file, "out")
    promised = json.loads((out / "privacy.json").read_text())
    found = books(out / "ledgers")
    assert len(found) == 4
    for book in found:
        (spent,) = book.history()
        summary = book.summary(1e-4)
        assert (spent.steps, summary.rounds, summary.uncommitted) == (3 * 4, 3, 0)
        assert promised["noise_multiplier"][0] <= spent.noise_multiplier <= promised["noise_multiplier"][1]
        assert summary.epsilon <= 8.0
    assert promised["planned_epsilon"] == pytest.approx(8.0, abs=0.02)
    epsilons = [record["epsilon"] for record in rounds(out)]
    assert epsilons == sorted(epsilons)
    assert (epsilons[0], epsilons[-1]) == (0.0, promised["planned_epsilon"])
    assert max(book.summary(1e-4).epsilon for book in found) == pytest.approx(epsilons[-1])


def test_nothing_but_the_update_leaves_a_client(
    file: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = wire.update

    def spy(content: object) -> wire.Update:
        seen.append((sorted(content), dict(content["metrics"]), sorted(content["config"])))  # type: ignore[index,call-overload]
        return real(content)  # type: ignore[arg-type]

    monkeypatch.setattr(wire, "update", spy)
    for text in (SAMPLE, CLIENT):
        seen.clear()
        file.write_text(text)
        out, _ = simulated(file, f"out-{len(text)}")
        told = {"client-id", "server-round"} | ({"receipt"} if text == SAMPLE else set())
        assert seen
        assert all(each == (["arrays", "config", "metrics"], {"num-examples": 1}, sorted(told)) for each in seen)
        assert all(r["train"] == {} and r["num_examples"] == 0 and r["clients"] == {} for r in rounds(out))


@pytest.mark.parametrize("optimizer", ['{ name = "adam" }', "{ lr = 0.1, momentum = 0.9 }"])
def test_the_optimisers_state_never_leaves_a_client(
    file: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    seen = []
    real = wire.update

    def spy(content: RecordDict) -> wire.Update:
        value = real(content)
        seen.append({name: tuple(t.shape) for name, t in value.delta.items()})
        return value

    monkeypatch.setattr(wire, "update", spy)
    file.write_text(SAMPLE.replace("local_steps = 4", f"local_steps = 4\noptimizer = {optimizer}"))
    out, _ = simulated(file, "out")
    model = {name: tuple(t.shape) for name, t in load_file(out / "model.safetensors").items()}
    assert seen == [model] * 12
    assert not (out / "clients").exists()  # nor does it outlast the round


def test_the_seed_of_dropout_is_as_secret_as_the_noise(
    file: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    real = loop.global_torch_seed

    def spy(seed: int, *names: object) -> object:
        if names[0] == "dropout":
            seeds.append(seed)
        return real(seed, *names)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "global_torch_seed", spy)
    simulated(file, "first")
    simulated(file, "second")
    assert len(set(seeds)) == len(seeds) == 24
    assert 3 not in seeds  # the experiment's, which the server knows
    seeds.clear()
    file.write_text(SAMPLE.replace("delta", "noise_seed = 7\ndelta"))
    simulated(file, "third")
    simulated(file, "fourth")
    assert seeds[:12] == seeds[12:]


def test_one_seed_does_not_give_one_noise(file: Path, simulated: Callable) -> None:
    for text in (SAMPLE, CLIENT):
        file.write_text(text)
        first, second = (load_file(simulated(file, f"{len(text)}-{k}")[0] / "model.safetensors") for k in "ab")
        for name in first:
            assert not torch.equal(first[name], second[name])


def test_a_noise_seed_gives_the_same_bytes_with_any_number_of_workers_and_no_ledger(
    file: Path, simulated: Callable
) -> None:
    for text in (SAMPLE, CLIENT):
        file.write_text(text.replace("delta", "noise_seed = 7\ndelta"))
        outs = [simulated(file, f"{len(text)}-{k}", f"run.workers={k}")[0] for k in (0, 2)]
        assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()
        assert not (outs[0] / "ledgers").exists()
        assert json.loads((outs[0] / "privacy.json").read_text())["seeded"] is True


def test_workers_keep_the_same_ledgers(file: Path, simulated: Callable) -> None:
    out, _ = simulated(file, "out", "run.workers=2")
    assert [book.summary(1e-4).rounds for book in books(out / "ledgers")] == [3, 3, 3, 3]


def test_runs_that_share_ledgers_add_up_and_the_policy_ends_them(file: Path, simulated: Callable) -> None:
    (file.parent / "policy.toml").write_text("max_epsilon = 8.5\ndelta = 1e-4\n")
    shared = ("run.ledgers=ledgers", "run.policy=policy.toml")
    simulated(file, "first", *shared)
    out, notices = simulated(file, "second", *shared, "rounds=6")  # of other noise: what it costs is added
    found = [Book(path, bound_within(8.5)) for path in ledgers(file.parent / "ledgers")]
    assert {book.summary(1e-4).runs for book in found} == {2}
    assert all(8.0 < book.summary(1e-4).epsilon <= 8.5 for book in found)
    assert "the run ends after round" in notices[-1]
    assert any("has ended: its budget or its policy allows no more" in notice for notice in notices)
    ended = [client for record in rounds(out) for client in record["ended"]]
    assert len(set(ended)) == len(ended) > 2  # of four, with a quorum of a half
    assert f"{len(ended)} clients have ended, and {4 - len(ended)} are left for a round of 4" in notices[-1]


def test_runs_of_one_name_that_start_in_the_same_second_are_two_to_a_ledger(
    file: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = iter(datetime.datetime(2026, 3, 1, 12, 0, 0, k * 100_000, datetime.UTC) for k in (1, 2))
    clock = types.SimpleNamespace(UTC=datetime.UTC, datetime=types.SimpleNamespace(now=lambda _: next(starts)))
    monkeypatch.setattr(manifest, "datetime", clock)
    (file.parent / "policy.toml").write_text("max_epsilon = 20.0\ndelta = 1e-4\n")
    for name in ("first", "second"):  # each with the whole of the rounds that its noise is calibrated for
        simulated(file, name, "run.ledgers=ledgers", "run.policy=policy.toml")
    spent = [Book(path, bound_within(20.0)).summary(1e-4) for path in ledgers(file.parent / "ledgers")]
    assert [(book.runs, book.rounds) for book in spent] == [(2, 6)] * 4


def test_nobody_allowed_to_take_part_is_an_error_and_not_an_untrained_model(file: Path, simulated: Callable) -> None:
    (file.parent / "policy.toml").write_text("max_epsilon = 0.5\ndelta = 1e-4\n")
    with pytest.raises(PrivacyError, match="no client takes part: their policies or their ledgers"):
        simulated(file, "out", "run.policy=policy.toml")
    assert not (file.parent / "out" / "model.safetensors").exists()


def test_a_policy_that_can_never_agree_is_told_at_once(file: Path, simulated: Callable) -> None:
    (file.parent / "policy.toml").write_text('max_epsilon = 10.0\ndelta = 1e-4\ntasks = ["cnn"]\n')
    with pytest.raises(InputError, match="does not allow this run: task logistic: the policy allows cnn"):
        simulated(file, "out", "run.policy=policy.toml")


def test_a_damaged_ledger_is_never_trained_on(
    file: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Server._finish

    def stop_after_round_1(server: Server, record: object) -> None:
        real(server, record)  # type: ignore[arg-type]
        if record.round_number == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    file.write_text(SAMPLE + "[clients]\nquorum = 1.0\n")
    monkeypatch.setattr(Server, "_finish", stop_after_round_1)
    with pytest.raises(Exception, match="interrupted"):
        simulated(file, "out")
    monkeypatch.setattr(Server, "_finish", real)
    damaged = ledgers(file.parent / "out" / "ledgers")[0]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(RunError, match="only its own log says why"):
        simulated(file, "out")
    assert "was damaged or changed" in caplog.text


def test_a_model_that_noise_cannot_protect_is_refused(file: Path, simulated: Callable) -> None:
    (file.parent / "normed.py").write_text(
        "from torch import nn\nfrom fedtrain.tasks.objectives import Classification\n\n\n"
        "class Normed(Classification):\n    def __init__(self, spec):\n        pass\n\n"
        "    def model(self):\n        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))\n"
    )
    for text in (SAMPLE, CLIENT):
        file.write_text(text)
        with pytest.raises(TaskError, match="BatchNorm"):
            simulated(file, "out", 'task.name="normed.py:Normed"')
    assert not (file.parent / "out").exists()


def test_a_flwr_strategy_has_no_place_for_the_servers_noise(file: Path, simulated: Callable) -> None:
    file.write_text(CLIENT)
    with pytest.raises(InputError, match="has no noise for a flwr Strategy"):
        simulated(file, "out", 'strategy.name="flwr.serverapp.strategy:FedAvg"')


def test_missing_features_are_not_filled_with_what_examples_tell(file: Path, simulated: Callable) -> None:
    rows = "\n".join(f"{k % 7},{'' if k == 3 else k % 5},{k % 2}" for k in range(200))
    (file.parent / "table.csv").write_text(f"a,b,label\n{rows}\n")
    table = ('data={path="table.csv", target="label", clients=4, central_test=0.2}',)
    with pytest.raises(InputError, match="fills features with what the examples"):
        simulated(file, "out", *table)
    simulated(file, "zero", *table, 'data.missing="zero"')


def test_the_mode_that_is_used_is_told(file: Path, simulated: Callable) -> None:
    out, notices = simulated(file, "out", 'privacy.mode="fast"', 'task.name="mlp"')
    assert "(fast)" in json.loads((out / "privacy.json").read_text())["clipping"]
    assert not any("does not cover" in notice for notice in notices)


def test_adaptive_clipping_is_part_of_the_run(file: Path, simulated: Callable) -> None:
    file.write_text(CLIENT)
    out, _ = simulated(file, "out", "privacy.adaptive_clipping={target_quantile=0.5}")
    assert "leaves 50% unclipped" in json.loads((out / "privacy.json").read_text())["clipping"]
    (book,) = books(out / "ledgers")
    (spent,) = book.history()
    assert spent == Spend(spent.noise_multiplier, 0.5, 3)


OWN_TASK = """
from torch import nn
from fedtrain.tasks.objectives import Classification


class Telling(Classification):
    def __init__(self, spec):
        pass

    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def loss(self, outputs, targets):
        if len(targets) > 8:  # more than the task is tried on
            raise ValueError(f"SECRET labels {targets.tolist()}")
        return super().loss(outputs, targets)
"""


def test_an_error_tells_nothing_of_the_examples_but_in_the_clients_log(
    file: Path, simulated: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    (file.parent / "telling.py").write_text(OWN_TASK)
    with pytest.raises(RunError, match="the client failed; under privacy only its own log says why"):
        simulated(file, "out", 'task.name="telling.py:Telling"', "evaluation.central_every=0")
    told = [path for path in (file.parent / "out").rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
    assert not told
    assert "SECRET" in caplog.text


def test_a_model_that_dp_sgd_cannot_take_is_refused_before_anything_is_spent(file: Path, simulated: Callable) -> None:
    text = OWN_TASK.replace("if len(targets) > 8", "if False")
    text = text.replace("super().loss(outputs, targets)", "super().loss(outputs, targets).mean().expand(len(targets))")
    (file.parent / "mixing.py").write_text(text)
    with pytest.raises(TaskError, match="the loss of an example depends on the others"):
        simulated(file, "out", 'task.name="mixing.py:Telling"', "run.ledgers=ledgers")
    assert not (file.parent / "out").exists()
    assert not (file.parent / "ledgers").exists()


def test_a_policy_is_not_got_round_by_an_experiment_without_privacy(file: Path, simulated: Callable) -> None:
    (file.parent / "policy.toml").write_text("max_epsilon = 1.0\ndelta = 1e-4\n")
    with pytest.raises(InputError, match=r"allows private runs alone: got noise that follows from privacy\.noise_seed"):
        simulated(file, "out", 'run.policy="policy.toml"', "privacy.noise_seed=1")
    file.write_text(SAMPLE[: SAMPLE.index("[privacy]")])
    with pytest.raises(InputError, match=r"allows private runs alone: got no \[privacy\]"):
        simulated(file, "out", 'run.policy="policy.toml"')
    assert not (file.parent / "out").exists()


def test_a_stricter_policy_ends_clients_when_its_budget_does_and_not_before(file: Path, simulated: Callable) -> None:
    (file.parent / "policy.toml").write_text("max_epsilon = 6.0\ndelta = 1e-4\n")
    out, _ = simulated(file, "out", 'run.policy="policy.toml"')
    assert rounds(out)[1]["participants"] == [f"client-{k}" for k in range(4)]
    assert all(0 < Book(path, bound_within(6.0)).summary(1e-4).epsilon <= 6.0 for path in ledgers(out / "ledgers"))


def test_own_images_are_not_scaled_by_what_they_hold(file: Path, simulated: Callable) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (400, 1, 8, 8), dtype=np.uint8)
    np.savez(file.parent / "own.npz", x=pixels, y=np.arange(400) % 10)
    data = 'path="own.npz", target="y", clients=4, central_test=0.2'
    with pytest.raises(InputError, match="your own images are scaled by the mean and deviation of all their pixels"):
        simulated(file, "out", f"data={{{data}}}")
    simulated(file, "given", f"data={{{data}, scaling={{mean=[0.5], std=[0.25]}}}}")


@pytest.mark.parametrize(("text", "account"), [(SAMPLE, "asked.jsonl"), (CLIENT, "ledgers")])
def test_an_account_that_was_taken_away_is_missed(
    text: str, account: str, file: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_in_round_2(server: Server, turn: Any, seen: Any, *rest: Any) -> object:
        if seen.number == 2:
            raise KeyboardInterrupt
        return counted(server, turn, seen, *rest)

    counted = Server._counted
    file.write_text(text)
    monkeypatch.setattr(Server, "_counted", stop_in_round_2)
    with pytest.raises(InterruptedRunError):
        simulated(file, "out")
    monkeypatch.setattr(Server, "_counted", counted)
    taken = file.parent / "out" / account
    shutil.rmtree(taken) if taken.is_dir() else taken.unlink()
    with pytest.raises(LedgerError, match=r"older copy"):
        simulated(file, "out")


def test_clients_are_never_asked_to_measure(file: Path, simulated: Callable) -> None:
    file.write_text(CLIENT.replace("central_test", "test"))
    out, notices = simulated(file, "out")
    assert all(record["clients"] == record["central"] == {} for record in rounds(out))
    assert any("the model is not measured" in notice for notice in notices)


def test_a_client_refuses_to_measure(file: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtrain.server.cohort.Cohort.evaluators", lambda _: [0, 1])
    out, notices = simulated(file, "out")
    assert all(record["clients"] == {} for record in rounds(out))
    assert any("privacy lets no measurement on a client's examples out" in notice for notice in notices)


def test_nobody_can_foresee_who_takes_part(file: Path, simulated: Callable) -> None:
    file.write_text(CLIENT)
    drawn = [[r["participants"] for r in rounds(simulated(file, name)[0])] for name in ("one", "two")]
    assert drawn[0] != drawn[1]


def test_the_sum_is_divided_by_the_clients_that_are_expected(
    file: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(strategy: object, section: object, noise_multiplier: float, expected: float, release: object) -> object:
        seen.append(expected)
        return central_dp(strategy, section, noise_multiplier, expected, release)  # type: ignore[arg-type]

    monkeypatch.setattr("fedtrain.simulations.private.central_dp", spy)
    file.write_text(CLIENT)
    simulated(file, "out")
    assert seen == [20.0]


def test_few_or_odd_updates_neither_stop_a_round_nor_are_refused_for_their_size(
    file: Path, simulated: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(CLIENT + "\n[gate]\nnorm_factor = 1.0\n")
    real = wire.update

    def mostly_lost(content: RecordDict) -> wire.Update:
        update = real(content)
        if update.client_id.endswith(("1", "3", "5", "7", "9", "0")):
            raise RunError("lost")
        return update

    monkeypatch.setattr(wire, "update", mostly_lost)
    out, _ = simulated(file, "out", "clients.quorum=1.0", "gate.max_offences=0")
    assert len(rounds(out)) == 4
    assert {reason for record in rounds(out) for reason in record["quarantined"].values()} == {"lost"}
