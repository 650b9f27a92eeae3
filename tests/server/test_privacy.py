from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fedtrain.errors import BudgetError, RunFolderError
from fedtrain.experiment.privacy import ClientPrivacy, SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.training import TrainingSection
from fedtrain.privacy.accounting import Spend, bound_within, epsilon
from fedtrain.privacy.book import Account
from fedtrain.privacy.ledger import Ledger
from fedtrain.privacy.plan import ClientPlan, SamplePlan, client_plan, sample_plan
from fedtrain.privacy.policy import Policy, Request
from fedtrain.server.privacy import CentralSpending, LocalSpending, privacy_plan
from fedtrain.server.selection import Crowd

SIZES = np.array([40, 40, 80, 0])
POLICY = Policy(max_epsilon=100.0, delta=1e-3, unit="client")
request = partial(
    Request,
    run="run-1",
    experiment="xray",
    experiment_hash="a" * 64,
    task="cnn",
    parameters=10,
    model_bytes=40,
    unit="client",
)


def local_plan(**section: object) -> SamplePlan:
    privacy = SamplePrivacy.model_validate({"noise_multiplier": 2.0, "delta": 1e-3, "accountant": "rdp", **section})
    return sample_plan(privacy, TrainingSection(batch_size=20), [40, 80], participations=3)


def central_plan(**section: object) -> ClientPlan:
    known = {"unit": "client", "noise_multiplier": 2.0, "delta": 1e-3, "accountant": "rdp"}
    return client_plan(ClientPrivacy.model_validate({**known, **section}), num_clients=10, per_round=5, rounds=3)


def spent(charge: Spend, rounds: int) -> float:
    return epsilon([Spend(charge.noise_multiplier, charge.sample_rate, charge.steps * rounds)], 1e-3, "rdp").value


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledgers", Account("all clients", "f" * 64, "client"), bound_within(100.0)) as opened:
        yield opened


def test_the_dearest_client_is_what_a_run_has_spent(tmp_path: Path) -> None:
    plan = local_plan()
    spending = LocalSpending(plan, SIZES, tmp_path / "asked.jsonl")
    assert spending.epsilon() == 0
    spending.begin(1, [0, 2])
    spending.begin(2, [0, 1])
    # Half of 40 examples are in each of 2 steps, a quarter of 80 in each of 4; client 0 was asked twice.
    assert (plan.charge(40), plan.charge(80)) == (Spend(2.0, 0.5, 2), Spend(2.0, 0.25, 4))
    assert spending.epsilon() == spent(plan.charge(40), 2) > spent(plan.charge(80), 1)


def test_rounds_that_a_resumed_run_repeats_count_twice(tmp_path: Path) -> None:
    plan, journal = local_plan(), tmp_path / "asked.jsonl"
    LocalSpending(plan, SIZES, journal).begin(1, [0])
    resumed = LocalSpending(plan, SIZES, journal)
    resumed.begin(1, [0])
    assert resumed.epsilon() == spent(plan.charge(40), 2)


def test_repeated_noise_counts_once(tmp_path: Path) -> None:
    plan, journal = local_plan(noise_seed=1), tmp_path / "asked.jsonl"
    LocalSpending(plan, SIZES, journal).begin(1, [0])
    resumed = LocalSpending(plan, SIZES, journal)
    resumed.begin(1, [0])
    assert resumed.epsilon() == spent(plan.charge(40), 1)


def test_a_torn_line_of_the_journal_was_never_asked(tmp_path: Path) -> None:
    plan, journal = local_plan(), tmp_path / "asked.jsonl"
    LocalSpending(plan, SIZES, journal).begin(1, [0])
    with journal.open("ab") as file:
        file.write(b'{"round": 2, "cli')
    torn = LocalSpending(plan, SIZES, journal)
    assert torn.epsilon() == spent(plan.charge(40), 1)
    torn.begin(2, [0])
    assert LocalSpending(plan, SIZES, journal).epsilon() == spent(plan.charge(40), 2)


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "asked.jsonl"
    journal.write_text("{}\n")
    with pytest.raises(RunFolderError, match="is damaged: it tells how often clients were asked"):
        LocalSpending(local_plan(), SIZES, journal)


def test_the_server_pays_before_its_noise_is_drawn(ledger: Ledger) -> None:
    plan = central_plan()
    spending = CentralSpending(plan, request, ledger, POLICY)
    spending.begin(1, [0, 1])
    assert (spending.epsilon(), ledger.reservations("run-1")) == (0.0, 0)  # nothing is released yet
    spending.charge()
    assert ledger.history() == [Spend(2.0, 0.5, 1)]
    assert spending.epsilon() == plan.epsilon(1) == spent(plan.charge, 1)


def test_a_repeated_round_uses_up_one_of_those_planned(ledger: Ledger) -> None:
    spending = CentralSpending(central_plan(), request, ledger, POLICY)
    for round_number in (1, 1, 2):
        spending.begin(round_number, [])
        spending.charge()
    with pytest.raises(BudgetError, match="all 3 rounds of noise that the plan has are used up"):
        spending.begin(3, [])


def test_a_round_that_would_overspend_is_refused_before_it_begins(ledger: Ledger) -> None:
    plan = central_plan()
    spending = CentralSpending(plan, request, ledger, POLICY.model_copy(update={"max_epsilon": spent(plan.charge, 1)}))
    spending.begin(1, [])
    spending.charge()
    with pytest.raises(BudgetError, match="round 2 of run run-1 would overspend"):
        spending.begin(2, [])


def test_seeded_noise_is_its_rounds_own_and_costs_nothing() -> None:
    def noise(round_number: int) -> list[float]:
        spending = CentralSpending(central_plan(noise_seed=1), request, None, POLICY)
        spending.begin(round_number, [])
        spending.charge()
        return spending.noise.gaussian((3,), 1.0).tolist()

    assert noise(1) == noise(1) != noise(2)


def experiment(**sections: object) -> Experiment:
    known = {"rounds": 30, "data": {"name": "digits", "clients": 4}, "privacy": {"noise_multiplier": 1.0, "delta": 0.1}}
    return Experiment.model_validate({**known, **sections})


def test_a_plan_covers_the_client_that_the_draw_takes_most_often() -> None:
    uniform = experiment(clients={"per_round": 1})
    crowd = Crowd(uniform.clients, uniform.seed, SIZES)
    draws = [int(client) for number in range(1, 31) for client in crowd.draw(number)]
    plan = privacy_plan(uniform, SIZES)
    assert isinstance(plan, SamplePlan)
    assert plan.participations == max(draws.count(client) for client in range(3)) < 30
    for sections, most in (({}, 30), ({"privacy": {**uniform.privacy.model_dump(), "max_participations": 4}}, 4)):
        plan = privacy_plan(experiment(**sections), SIZES)
        assert isinstance(plan, SamplePlan)
        assert plan.participations == most


def test_a_plan_of_client_privacy_counts_those_that_may_be_asked() -> None:
    privacy = {"unit": "client", "noise_multiplier": 1.0, "delta": 0.1}
    plan = privacy_plan(experiment(privacy=privacy, clients={"per_round": 1, "sampling": "poisson"}), SIZES)
    assert isinstance(plan, ClientPlan)
    assert plan.charge == Spend(1.0, 1 / 3, 1)


def test_without_privacy_there_is_no_plan() -> None:
    assert privacy_plan(experiment(privacy=None), SIZES) is None
