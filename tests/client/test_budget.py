from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fedtrain.client.budget import Budget
from fedtrain.data.base import FederatedData
from fedtrain.errors import BudgetError, LedgerError, PolicyError
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.training import TrainingSection
from fedtrain.privacy import accounting
from fedtrain.privacy.accounting import Spend, bound_within
from fedtrain.privacy.book import Account, Book
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.plan import sample_plan
from fedtrain.privacy.policy import Policy, Request
from fedtrain.wire import Instruction

TRAINING = TrainingSection(batch_size=20, local_epochs=2)
request = partial(
    Request,
    run="run-1",
    experiment="xray",
    experiment_hash="a" * 64,
    task="cnn",
    parameters=10,
    model_bytes=40,
    unit="sample",
)


class Fingerprints:
    def fingerprint(self, client_id: str) -> str:
        return client_id * 8


def budget(folder: Path | None, policy: dict[str, Any] | None = None, **section: object) -> Budget:
    given = {"noise_multiplier": 2.0, "delta": 1e-3, "accountant": "rdp", **section}
    plan = sample_plan(SamplePrivacy.model_validate(given), TRAINING, [40], participations=2)
    rules = Policy.model_validate({"max_epsilon": 100.0, "delta": 1e-3, **(policy or {})})
    return Budget(plan, request, folder, rules, cast("FederatedData", Fingerprints()))


def asked(round_number: int, **also: Any) -> Instruction:
    return Instruction(round_number, {}, **also)


def book(folder: Path) -> Book:
    return Book(Account("north", "north" * 8, "sample").path(folder), bound_within(100.0))


def test_a_round_is_on_the_ledger_before_its_first_step_and_committed_with_what_is_sent(tmp_path: Path) -> None:
    with budget(tmp_path).reserved("north", asked(1), 40) as reserved:
        assert reserved.charge == Spend(2.0, 0.5, 4)
        assert (book(tmp_path).history(), book(tmp_path).summary(1e-3).uncommitted) == ([reserved.charge], 1)
        reserved.commit({"w": torch.ones(2)}, {})
    assert book(tmp_path).summary(1e-3).uncommitted == 0


def test_what_is_committed_is_the_digest_of_the_update(tmp_path: Path) -> None:
    digests = []
    for number, value in enumerate((1.0, 2.0), start=1):
        with budget(tmp_path).reserved("north", asked(number), 40) as reserved:
            reserved.commit({"w": torch.tensor([value])}, {})
        digests.append(book(tmp_path).export()["entries"][-1]["entry"]["update_sha256"])
    assert digests[0] != digests[1]


def test_a_round_that_breaks_off_counts_in_full(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), budget(tmp_path).reserved("north", asked(1), 40):
        raise ZeroDivisionError
    assert book(tmp_path).history() == [Spend(2.0, 0.5, 4)]
    with budget(tmp_path).reserved("north", asked(1), 40):
        pass
    used_up = pytest.raises(BudgetError, match="all 2 rounds that the noise is calibrated for are used up")
    with used_up, budget(tmp_path).reserved("north", asked(2), 40):
        pytest.fail("it must not begin")


def test_who_has_little_time_pays_for_the_steps_it_takes(tmp_path: Path) -> None:
    with budget(tmp_path).reserved("north", asked(1, work=0.5), 40) as reserved:
        assert reserved.charge.steps == 2


def test_the_policy_is_stronger_than_the_server(tmp_path: Path) -> None:
    for policy, error in (({"max_epsilon": 0.1}, BudgetError), ({"least_noise_multiplier": 3.0}, PolicyError)):
        with pytest.raises(error), budget(tmp_path, policy).reserved("north", asked(1), 40):
            pytest.fail("it must not begin")
    assert book(tmp_path).history() == []


def test_other_runs_on_the_same_examples_add_up(tmp_path: Path) -> None:
    limit = accounting.epsilon([Spend(2.0, 0.5, 4)], 1e-3, "rdp").value
    with budget(tmp_path).reserved("north", asked(1), 40):
        pass
    other = budget(tmp_path, {"max_epsilon": limit})
    again = Budget(other.plan, partial(request, run="run-2"), tmp_path, other.policy, other.data)
    with pytest.raises(BudgetError, match="would overspend"), again.reserved("north", asked(1), 40):
        pytest.fail("it must not begin")


def test_a_ledger_that_another_process_holds_stops_the_round(tmp_path: Path) -> None:
    held = Ledger(tmp_path, Account("north", "north" * 8, "sample"), bound_within(1.0))
    refused = pytest.raises(LedgerError, match="another process holds")
    with held, refused, budget(tmp_path).reserved("north", asked(1), 40):
        pytest.fail("it must not begin")


def test_an_older_copy_of_the_ledger_is_noticed_by_the_receipt(tmp_path: Path) -> None:
    with budget(tmp_path).reserved("north", asked(1), 40) as reserved:
        old = {path: path.read_bytes() for path in tmp_path.iterdir()}
        receipt = reserved.commit({"w": torch.ones(2)})
    for path, content in old.items():
        path.write_bytes(content)
    refused = pytest.raises(LedgerError, match="is an older copy, or not the one that was used before")
    with refused, budget(tmp_path).reserved("north", asked(2, receipt=receipt), 40):
        pytest.fail("it must not begin")


def test_seeded_noise_protects_nothing_and_has_no_ledger(tmp_path: Path) -> None:
    with budget(None, noise_seed=1).reserved("north", asked(1), 40) as reserved:
        assert reserved.commit({"w": torch.ones(2)}) == ""
    assert list(tmp_path.iterdir()) == []


def test_what_the_calibration_has_proved_is_not_proved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = budget(tmp_path, {"max_epsilon": 4.0}, noise_multiplier=None, epsilon=4.0)
    monkeypatch.setattr("fedtrain.client.budget.bound_within", lambda _: pytest.fail)
    for number in (1, 2):
        with target.reserved("north", asked(number), 40):
            pass
    assert book(tmp_path).reservations("run-1") == 2


def test_a_history_of_other_noise_is_proved(tmp_path: Path) -> None:
    with budget(tmp_path, noise_multiplier=0.8).reserved("north", asked(1), 40):
        pass
    target = budget(tmp_path, {"max_epsilon": 4.0}, noise_multiplier=None, epsilon=4.0)
    other = Budget(target.plan, partial(request, run="run-2"), tmp_path, target.policy, target.data)
    with pytest.raises(BudgetError, match="would overspend"), other.reserved("north", asked(1), 40):
        pytest.fail("it must not begin")
