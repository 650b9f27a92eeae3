import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtrain.errors import InputError, MissingExtraError, RunError
from fedtrain.privacy import accounting
from fedtrain.privacy.accounting import Accountant, Guarantee, Spend, delta_warning, epsilon, noise_multiplier_for

pytest.importorskip("opacus")

# history, delta, epsilon by Opacus RDP, by Opacus PRV, by dp-accounting PLD
REFERENCES = {
    "long": ([Spend(1.1, 256 / 60000, 14062)], 1e-5, 2.5966, 2.3917, 2.3817),
    "noisy": ([Spend(4, 0.01, 10000)], 1e-5, 1.0355, 0.9569, 0.9470),
    "small-data": ([Spend(1, 1 / 19, 950)], 1e-4, 10.978, 9.934, 9.924),
    "client-level": ([Spend(1, 0.1, 100)], 1e-4, 6.822, 5.976, 5.966),
    "two-mechanisms": ([Spend(1, 0.1, 50), Spend(2, 0.05, 500)], 1e-4, 5.6063, 4.8881, 4.8777),
    "shuffled": ([Spend(1, 1, 50)], 1e-4, 53.586, 50.508, 50.496),  # no amplification: one step per epoch
}


@pytest.mark.parametrize(("history", "delta", "rdp", "prv", "_pld"), REFERENCES.values(), ids=REFERENCES)
def test_reference_values(history: list[Spend], delta: float, rdp: float, prv: float, _pld: float) -> None:
    assert epsilon(history, delta, "rdp") == (pytest.approx(rdp, rel=0.001), "rdp")
    assert epsilon(history, delta) == (pytest.approx(prv, abs=0.001), "prv")


@pytest.mark.parametrize(("history", "delta", "_rdp", "_prv", "pld"), REFERENCES.values(), ids=REFERENCES)
def test_pld_reference_values(history: list[Spend], delta: float, _rdp: float, _prv: float, pld: float) -> None:
    pytest.importorskip("dp_accounting")
    assert epsilon(history, delta, "pld") == (pytest.approx(pld, abs=0.001), "pld")


@pytest.mark.parametrize(("noise", "epochs", "expected"), [(0.7, 45, 6.113), (1.1, 60, 2.506), (1.3, 15, 0.922)])
def test_mnist_example_of_opacus(noise: float, epochs: int, expected: float) -> None:
    history = [Spend(noise, 0.004, epochs * 250)]
    assert epsilon(history, 1e-5, "rdp").value == pytest.approx(expected, rel=0.005)  # of whole orders


@pytest.mark.parametrize(("noise", "epochs", "expected"), [(0.7, 45, 6.86), (1.1, 60, 2.91), (1.3, 15, 1.16)])
def test_mnist_example_of_opacus_by_the_conversion_of_its_time(noise: float, epochs: int, expected: float) -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    divergences = compute_rdp(q=0.004, noise_multiplier=noise, steps=epochs * 250, orders=orders)
    bounds = [rdp - math.log(1e-5) / (order - 1) for rdp, order in zip(divergences, orders)]
    assert min(bounds) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1, 0.05, 950), (0.6, 0.3, 20), (2, 0.01, 300)])
def test_opacus_accountants_agree(noise: float, rate: float, steps: int) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    theirs, rdp = PRVAccountant(), RDPAccountant()
    theirs.history = rdp.history = [(noise, rate, steps)]
    assert epsilon([Spend(noise, rate, steps)], 1e-5).value == pytest.approx(theirs.get_epsilon(1e-5), abs=1e-4)
    assert epsilon([Spend(noise, rate, steps)], 1e-5, "rdp").value == pytest.approx(rdp.get_epsilon(1e-5), rel=1e-9)


def test_rounds_compose_to_one_long_run() -> None:
    rounds = [Spend(1.1, 0.01, 20)] * 10
    assert epsilon(rounds, 1e-5) == epsilon([Spend(1.1, 0.01, 200)], 1e-5)
    apart = epsilon([Spend(1.1, 0.01, 100), Spend(1.1 + 1e-9, 0.01, 100)], 1e-5)
    assert apart.value == pytest.approx(epsilon(rounds, 1e-5).value, abs=1e-3)


def test_order_of_the_history_does_not_matter() -> None:
    history = REFERENCES["two-mechanisms"][0]
    assert epsilon(history, 1e-4) == epsilon(reversed(history), 1e-4)


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
def test_nothing_spent_and_nothing_protected(accountant: Accountant) -> None:
    assert epsilon([], 1e-5, accountant) == (0, accountant)
    assert epsilon([Spend(1, 0.1, 0), Spend(0, 0, 5)], 1e-5, accountant) == (0, accountant)
    assert epsilon([Spend(1, 0.1, 10), Spend(0, 0.1, 1)], 1e-5, accountant) == (math.inf, accountant)


@pytest.mark.parametrize(
    ("spend", "delta", "truth"),
    [
        (Spend(1, 1e-6, 1_000_000), 1e-6, 0.0034),  # PRV's own estimate, before its error is added
        (Spend(10, 0.1, 1_000_000), 1e-6, 97.0),  # a fine grid would have 80 million points
        (Spend(1, 1e-8, 10), 1e-5, 0.0),
    ],
)
def test_prv_copes_with_many_steps_and_small_rates(spend: Spend, delta: float, truth: float) -> None:
    value, accountant = epsilon([spend], delta)
    assert accountant == "prv"
    assert truth < value < truth * 1.01 + 0.02


@pytest.mark.parametrize(
    ("spend", "delta"),
    [
        (Spend(0.1, 0.01, 100), 1e-5),  # exp overflows
        (Spend(10, 0.1, 2_000_000), 1e-6),  # a grid too coarse to be of use
        (Spend(1, 1e-6, 10_000_000), 1e-6),  # errors of single steps add up
        (Spend(1, 0.01, 1000), 1e-12),  # rounding dominates
        (Spend(100, 0.01, 10), 1e-5),  # RDP's bound is lower than PRV's error
    ],
)
def test_rdp_answers_where_prv_cannot_and_says_so(spend: Spend, delta: float) -> None:
    assert epsilon([spend], delta) == epsilon([spend], delta, "rdp")


def test_a_failure_inside_prv_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.accountants.analysis import prv

    def fail(*_arguments: object) -> None:
        raise RuntimeError("Discrete mean differs significantly from continuous mean.")

    monkeypatch.setattr(prv, "discretize", fail)
    accounting._prv_epsilon.cache_clear()
    assert epsilon([Spend(1, 0.02, 30)], 1e-5).accountant == "rdp"


@settings(max_examples=8, deadline=None)
@given(st.floats(0.7, 20), st.floats(1e-4, 0.2), st.integers(1, 500), st.sampled_from(["rdp", "prv"]))
def test_more_noise_costs_less_and_more_steps_cost_more(
    noise: float, rate: float, steps: int, accountant: Accountant
) -> None:
    def cost(noise: float, rate: float, steps: int) -> float:
        return epsilon([Spend(noise, rate, steps)], 1e-5, accountant).value

    here = cost(noise, rate, steps)
    numerics = 1e-3
    assert 0 <= cost(noise * 1.5, rate, steps) <= here + numerics
    assert cost(noise, rate / 2, steps) <= here + numerics
    assert here <= cost(noise, rate, 2 * steps) + numerics
    assert here <= epsilon([Spend(noise, rate, steps)], 1e-5, "rdp").value


@settings(max_examples=4, deadline=None)
@given(st.floats(0.3, 10), st.floats(1e-3, 0.2), st.integers(1, 500), st.sampled_from(["rdp", "prv"]))
def test_calibration_keeps_the_target_and_wastes_little(
    target: float, rate: float, steps: int, accountant: Accountant
) -> None:
    noise = noise_multiplier_for(target, 1e-5, rate, steps, accountant)
    assert epsilon([Spend(noise, rate, steps)], 1e-5, accountant).value <= target
    assert epsilon([Spend(noise / 1.002, rate, steps)], 1e-5, accountant).value > target


def test_calibration_covers_the_whole_run_not_a_round() -> None:
    per_round, whole = (noise_multiplier_for(8, 1e-4, 1 / 19, steps, "rdp") for steps in (19, 950))
    assert epsilon([Spend(per_round, 1 / 19, 19)] * 50, 1e-4, "rdp").value > 40
    assert epsilon([Spend(whole, 1 / 19, 19)] * 50, 1e-4, "rdp").value <= 8


def test_a_large_target_needs_hardly_any_noise_and_a_tiny_one_cannot_be_reached() -> None:
    assert noise_multiplier_for(1e9, 1e-5, 0.1, 1, "rdp") <= 0.02
    with pytest.raises(InputError, match="no noise reaches this epsilon"):
        noise_multiplier_for(1e-4, 1e-5, 0.1, 100)


@pytest.mark.parametrize(
    "values", [(-1, 0.1, 1), (math.inf, 0.1, 1), (1, 1.1, 1), (1, math.nan, 1), (1, 0.1, 1.5), (1, 0.1, -1)]
)
def test_spends_are_checked(values: tuple[float, float, int]) -> None:
    with pytest.raises(RunError):
        Spend(*values)


def test_arguments_are_checked() -> None:
    for delta in (0, 1, math.nan):
        with pytest.raises(RunError, match="delta"):
            epsilon([Spend(1, 0.1, 1)], delta)
    with pytest.raises(RunError, match="target"):
        noise_multiplier_for(0, 1e-5, 0.1, 1)
    with pytest.raises(RunError, match="target"):
        noise_multiplier_for(math.inf, 1e-5, 0.1, 1)


@pytest.mark.parametrize(("package", "accountant"), [("dp_accounting", "pld"), ("opacus", "prv")])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, package: str, accountant: Accountant) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=package):
        epsilon([Spend(1.234, 0.0567, 89)], 1e-5, accountant)


def test_delta_must_be_below_one_over_n() -> None:
    assert delta_warning(1e-5, 60_000) is None
    assert "not below 1/60000" in str(delta_warning(1 / 60_000, 60_000))
    assert delta_warning(1e-5, 0) is None


def test_sample_level_sentences() -> None:
    assert Guarantee(1, 1e-5, "sample", "prv", "Poisson", 50).sentences() == (
        "Over 50 rounds, each example is protected against everybody who sees what its client sends, including the "
        "server; only the client's own machine must be trusted.",
        # e^1 x 1 in 100 + 0.001 in 100, rounded up
        "Epsilon 1 means: a test for whether a given example was used, if it wrongly names 1 in 100 that were not, "
        "finds at most 2.8 in 100 that were, and but for delta nobody's odds on it change by more than a factor of "
        "2.72 (delta 1e-05, add/remove one example, PRV accountant, Poisson sampling).",
    )


def test_client_level_sentences() -> None:
    # 1 - e^-4 x (1 - 0.01 - 0.001) = 0.98189, where e^4 x 0.01 + 0.001 = 0.547 is less
    assert Guarantee(4, 1e-3, "client", "rdp", "none", 1).sentences() == (
        "Over 1 round, each client with all its examples is protected against everybody who sees the models, but not "
        "against the server: it must be trusted to clip, to add the noise, and to tell nobody the updates.",
        "Epsilon 4 means: a test for whether a given client was used, if it wrongly names 1 in 100 that were not, "
        "finds at most 54.7 in 100 that were (delta 0.001, blank one client, RDP accountant, no amplification by "
        "sampling).",
    )


def test_weak_guarantees_look_weak() -> None:
    # 1 - e^-8 x (1 - 0.01 - 0.00001) = 0.99967
    assert "at most 100 in 100 that were" in Guarantee(8, 1e-5, "sample", "prv", "Poisson", 9).sentences()[1]
    # 1 - e^-5 x (1 - 0.01 - 0.5) = 0.99670
    assert "at most 99.7 in 100 that were" in Guarantee(5, 0.5, "sample", "prv", "Poisson", 9).sentences()[1]
    who, meaning = Guarantee(math.inf, 1e-5, "sample", "prv", "Poisson", 9).sentences()
    assert who.startswith("NOT PRIVATE")
    assert meaning.startswith("Epsilon is infinite")


def test_seeded_noise_is_not_private_whatever_the_figure() -> None:
    who, meaning = Guarantee(1, 1e-5, "sample", "prv", "Poisson", 9, seeded=True).sentences()
    assert who.startswith("NOT PRIVATE: the noise follows from a seed")
    assert meaning.startswith("With secret noise, epsilon 1 means")
