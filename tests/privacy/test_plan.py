import math
import pickle

import pytest

from fedtrain.errors import InputError, PrivacyError
from fedtrain.experiment.privacy import ClientPrivacy, SamplePrivacy
from fedtrain.experiment.training import TrainingSection
from fedtrain.privacy.accounting import Spend, epsilon, noise_multiplier_for
from fedtrain.privacy.plan import ClientPlan, SamplePlan, client_plan, sample_plan

pytest.importorskip("opacus")

TRAINING = TrainingSection(batch_size=50, local_epochs=2)
SIZES = [7, 50, *range(60, 2000, 100)]


def sample(sizes: list[int], participations: int = 4, **section: object) -> SamplePlan:
    section = {"delta": 1e-5, "epsilon": 2.0} | section
    return sample_plan(SamplePrivacy.model_validate(section), TRAINING, sizes, participations)


def client(num_clients: int, per_round: int, rounds: int, **section: object) -> ClientPlan:
    section = {"unit": "client", "delta": 1e-5} | section
    return client_plan(ClientPrivacy.model_validate(section), num_clients, per_round, rounds)


def of_whole_run(plan: SamplePlan, size: int) -> float:
    charge = plan.charge(size)
    steps = charge.steps * plan.participations
    return epsilon([Spend(charge.noise_multiplier, charge.sample_rate, steps)], 1e-5, plan.section.accountant).value


def test_a_round_of_a_client() -> None:
    plan = sample([120], epsilon=None, noise_multiplier=1.1)
    assert plan.charge(120) == Spend(1.1, 50 / 120, 6)  # two passes of three batches


def test_up_to_the_batch_size_each_example_is_in_each_step() -> None:
    plan = sample([7, 50], epsilon=None, noise_multiplier=1.1)
    assert plan.charge(7) == plan.charge(50) == Spend(1.1, 1.0, 2)
    assert len(plan.groups) == 1


@pytest.mark.parametrize(("accountant", "expected"), [("prv", 5.976), ("rdp", 6.822)])
def test_reference_value_at_client_level(accountant: str, expected: float) -> None:
    plan = client(1000, 100, 100, noise_multiplier=1.0, delta=1e-4, accountant=accountant)
    assert plan.charge == Spend(1.0, 0.1, 1)
    assert plan.whole_run() == (pytest.approx(expected, abs=0.01), accountant)
    assert plan.epsilon(100) == plan.whole_run().value


def test_clients_of_one_size_are_calibrated_exactly_and_for_all_steps() -> None:
    plan = sample([120])
    assert plan.charge(120).noise_multiplier == noise_multiplier_for(2.0, 1e-5, 50 / 120, 4 * 6)
    assert plan.epsilon({120: 4}) == plan.whole_run().value == of_whole_run(plan, 120)
    assert 1.99 < plan.whole_run().value <= 2.0


def test_noise_that_was_guessed_from_that_of_other_sizes_keeps_the_budget_and_uses_it() -> None:
    plan = sample([120, 130, 250, 3000])
    assert [group.low for group in plan.groups] == [120, 130, 250, 3000]
    assert all(1.96 < of_whole_run(plan, size) <= 2.0 for size in (120, 130, 250, 3000))


def test_in_groups_no_client_passes_the_target() -> None:
    plan = sample(SIZES, accountant="rdp")
    assert 10 < len(plan.groups) <= 16
    assert all(1.3 < of_whole_run(plan, size) <= 2.0 for size in SIZES)
    assert plan.epsilon(dict.fromkeys(SIZES, 4)) == plan.whole_run().value <= 2.0
    assert all(plan.charge(size) == plan.charge(size + 1) for size in (7, 20))


def test_noise_that_is_given_is_the_same_for_all() -> None:
    plan = sample(SIZES, epsilon=None, noise_multiplier=1.1)
    assert {plan.charge(size).noise_multiplier for size in SIZES} == {1.1}
    assert plan.whole_run("rdp").value >= max(
        epsilon([Spend(1.1, plan.charge(size).sample_rate, 4 * plan.charge(size).steps)], 1e-5, "rdp").value
        for size in SIZES
    )


def test_the_curve_lies_above_prv_below_rdp_and_ends_at_prv() -> None:
    plan = client(100, 20, 60, epsilon=2.0)
    curve = [plan.epsilon(done) for done in range(61)]
    assert curve[0] == 0
    assert curve == sorted(curve)
    for done in (1, 7, 31, 59, 60):
        spent = [Spend(plan.charge.noise_multiplier, 0.2, done)]
        assert epsilon(spent, 1e-5).value <= curve[done] <= epsilon(spent, 1e-5, "rdp").value
    assert curve[60] == epsilon([Spend(plan.charge.noise_multiplier, 0.2, 60)], 1e-5).value <= 2.0


def test_between_points_the_next_one_is_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtrain.privacy.plan._EFFORT", 0)  # the least: two points, at 4 and 16
    plan = client(100, 20, 16, noise_multiplier=2.0)

    def exact(rounds: int) -> float:
        return epsilon([Spend(2.0, 0.2, rounds)], 1e-5).value

    assert [plan.epsilon(done) for done in (4, 15, 16)] == [exact(4), exact(16), exact(16)]
    assert plan.epsilon(5) == epsilon([Spend(2.0, 0.2, 5)], 1e-5, "rdp").value < exact(16)


@pytest.mark.parametrize("effort", [0, 3000])
def test_rounds_that_were_repeated_beyond_the_plan_are_counted(effort: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtrain.privacy.plan._EFFORT", effort)
    plan = client(100, 20, 10, noise_multiplier=2.0)
    assert plan.epsilon(12) == epsilon([Spend(2.0, 0.2, 12)], 1e-5).value > plan.epsilon(10)


def test_over_clients_it_is_the_largest_and_not_the_sum() -> None:
    plan = sample([120, 600], epsilon=None, noise_multiplier=1.5)
    small, large = plan.epsilon({120: 3}), plan.epsilon({600: 4})
    assert small > large > 0
    assert plan.epsilon({120: 3, 600: 4}) == small
    assert plan.epsilon({120: 0, 600: 4}) == large
    assert plan.epsilon({}) == 0


def test_in_a_group_the_client_that_was_asked_most_counts() -> None:
    plan = sample([7, 50], epsilon=None, noise_multiplier=3.0)
    assert plan.epsilon({7: 1, 50: 3}) == plan.epsilon({7: 3, 50: 1}) == plan.epsilon({50: 3})


def test_a_size_that_was_not_planned_for_is_refused() -> None:
    plan = sample([120, 600], epsilon=None, noise_multiplier=1.1)
    for size in (49, 119, 121, 601):
        with pytest.raises(PrivacyError, match=f"no client of this size: got {size} examples"):
            plan.charge(size)


def test_clients_without_examples_take_no_part() -> None:
    assert [group.low for group in sample([0, 120], epsilon=None, noise_multiplier=1.1).groups] == [120]
    with pytest.raises(InputError, match="no client has training examples"):
        sample([0])


def test_workers_get_the_same_plan() -> None:
    plan = sample([120, 600], noise_seed=1, accountant="rdp")
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert copy.charge(120) == plan.charge(120)


def test_the_guarantee_says_all_that_belongs_to_epsilon() -> None:
    found = sample([120], epsilon=None, noise_multiplier=2.0).guarantee(1.5, 3)
    assert (found.epsilon, found.delta, found.unit, found.rounds) == (1.5, 1e-5, "sample", 3)
    assert (found.accountant, found.sampling, found.relation, found.seeded) == (
        "prv",
        "Poisson",
        "add/remove one",
        False,
    )
    assert client(10, 5, 2, noise_multiplier=2.0).guarantee(1.5, 2).trust == "the server"


def test_the_guarantee_names_the_accountant_that_could_prove_it() -> None:
    assert client(10, 5, 2, noise_multiplier=2.0, delta=1e-11).guarantee(3.0, 2).accountant == "rdp"


def test_noise_from_a_seed_is_not_private() -> None:
    found = client(10, 5, 2, noise_multiplier=2.0, noise_seed=0).guarantee(1.5, 2)
    assert found.sentences()[0].startswith("NOT PRIVATE")


def test_signal_to_noise_of_a_step() -> None:
    section = SamplePrivacy(noise_multiplier=1.1, delta=1e-5)
    plan = sample_plan(section, TrainingSection(batch_size=256, local_steps=1), [60000], 9)
    # 256 clipped gradients against 1.1 clipping norms in each of 26,010 directions.
    assert plan.signal(60000, 1, 9, 26010).per_round == pytest.approx(256 / (1.1 * math.sqrt(26010)))
    assert plan.signal(60000, 1, 9, 26010).whole_run == pytest.approx(3 * 1.44303, rel=1e-4)
    assert plan.signal(60000, 4, 9, 26010).per_round == pytest.approx(2 * 1.44303, rel=1e-4)
    longer = sample_plan(section, TrainingSection(batch_size=256, local_steps=25), [60000], 9)
    assert longer.signal(60000, 1, 9, 26010).per_round == pytest.approx(5 * 1.44303, rel=1e-4)


def test_signal_to_noise_of_a_round_of_clients() -> None:
    signal = client(1000, 100, 16, noise_multiplier=2.0).signal(10_000)
    assert signal.per_round == pytest.approx(100 / (2 * 100))
    assert signal.whole_run == pytest.approx(2.0)
    assert signal.warning() is None


def test_five_clients_at_epsilon_one_are_hopeless_and_more_clients_are_not() -> None:
    signal = client(5, 5, 10, epsilon=1.0).signal(26010)
    told = signal.warning()
    assert told is not None
    assert told.startswith("Hopeless: over the run the noise is 12")
    assert f"about {signal.enough_clients:,} clients a round" in told
    assert "no epsilon below 100 would be" in told
    better = client(signal.enough_clients, signal.enough_clients, 10, epsilon=1.0).signal(26010)
    assert better.whole_run == pytest.approx(1.0, rel=0.01)
    assert better.warning() is None


def test_the_epsilon_that_would_be_enough() -> None:
    section = SamplePrivacy(epsilon=0.02, delta=1e-3, accountant="rdp")
    plan = sample_plan(section, TRAINING, [600], 10)
    signal = plan.signal(600, 5, 10, 100_000)
    told = signal.warning()
    assert told is not None
    assert told.endswith(f"or epsilon {signal.enough_epsilon:.2g}")
    enough = section.model_copy(update={"epsilon": signal.enough_epsilon})
    better = sample_plan(enough, TRAINING, [600], 10).signal(600, 5, 10, 100_000)
    assert better.whole_run == pytest.approx(3.0, rel=0.01)
    more = plan.signal(600, signal.enough_clients, 10, 100_000)
    assert more.whole_run == pytest.approx(3.0, rel=0.01)
