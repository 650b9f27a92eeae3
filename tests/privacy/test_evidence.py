import math

import numpy as np
import pytest

from fedtrain.privacy.evidence import (
    check_correlation,
    check_deviation,
    check_mean,
    epsilon_lower_bound,
    one_run,
    p_value,
    right_guesses,
)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def randomised_response(epsilon: float, delta: float, answers: int) -> list[float]:
    """Chances of 0, 1, ... true answers: with delta the truth for sure, else with odds of e^epsilon."""
    true = delta + (1 - delta) / (1 + math.exp(-epsilon))
    return [math.comb(answers, k) * true**k * (1 - true) ** (answers - k) for k in range(answers + 1)]


def test_the_interval_of_a_deviation_is_that_of_chi_square() -> None:
    noise = np.array([1.0, -1.0] * 500)
    check = check_deviation("noise", noise, 1.0)
    # The quantiles of chi-square with 1000 degrees of freedom at 5e-7 and 1 - 5e-7 are 796.3095 and 1234.2429.
    assert (check.measured, check.low, check.high) == pytest.approx(
        (1.0, math.sqrt(1000 / 1234.2429), math.sqrt(1000 / 796.3095)), rel=1e-4
    )


@pytest.mark.parametrize(("scale", "holds"), [(1.0, True), (0.9, False), (1.1, False), (0.0, False)])
def test_a_deviation_is_told_from_a_tenth_more_or_less(scale: float, holds: bool) -> None:
    assert check_deviation("noise", scale * 2.0 * normal(10_000), 2.0).holds is holds


def test_the_interval_of_a_mean_is_4_89_standard_errors_to_each_side() -> None:
    check = check_mean("canary", np.array([0.5, 1.5] * 50), claimed=1.0, deviation=2.0)
    assert (check.measured, check.low, check.high) == pytest.approx((1.0, 1 - 0.97833, 1 + 0.97833), abs=1e-4)
    assert check.holds
    assert not check_mean("canary", np.array([0.5, 1.5] * 50), claimed=2.0, deviation=2.0).holds


def test_noise_that_is_used_twice_correlates() -> None:
    first, second = normal(2, 20_000)
    assert check_correlation("noise", first, second).holds
    assert not check_correlation("noise", first, second + 0.1 * first).holds
    assert not check_correlation("noise", first, -first).holds


def test_no_noise_correlates_with_nothing() -> None:
    assert check_correlation("noise", np.zeros(1000), np.zeros(1000)).measured == 0.0


def test_the_highest_are_guessed_in_and_the_lowest_out() -> None:
    scores = np.array([5.0, -3.0, 0.1, 4.0, -4.0, 0.2])
    included = np.array([True, False, False, False, True, True])
    assert right_guesses(scores, included, 2) == 1  # 5 is in, and so is -4
    assert right_guesses(scores, included, 4) == 2  # 4 is not in, -3 is out
    assert right_guesses(scores, included, 6) == 4


def test_without_delta_the_p_value_is_the_binomial_tail() -> None:
    assert p_value(0.0, 0.0, canaries=10, guesses=4, right=3) == pytest.approx(5 / 16)
    assert p_value(math.log(3), 0.0, canaries=10, guesses=3, right=3) == pytest.approx(27 / 64)
    assert p_value(1.0, 0.0, canaries=10, guesses=4, right=0) == pytest.approx(1.0)


def test_delta_adds_to_the_p_value_by_theorem_5_2() -> None:
    # 4 coins: P[W = 0, 1, 2, 3, 4] = 1, 4, 6, 4, 1 sixteenths.
    # For v = 3, P[3 > W >= 3 - i] / i is 6, 10/2, 11/3 sixteenths; for v = 4 it is 4, 10/2, 14/3, 15/4.
    assert p_value(0.0, 0.01, canaries=10, guesses=4, right=3) == pytest.approx((5 + 0.01 * 10 * 2 * 6) / 16)
    assert p_value(0.0, 0.01, canaries=10, guesses=4, right=4) == pytest.approx((1 + 0.01 * 10 * 2 * 5) / 16)


@pytest.mark.parametrize("guesses", [1, 20, 2000])
def test_if_all_guesses_are_right_the_bound_has_a_closed_form(guesses: int) -> None:
    share = 0.05 ** (1 / guesses)  # the success that makes all right in one of 20 runs
    bound = epsilon_lower_bound(0.0, 2000, guesses, guesses, confidence=0.95)
    assert bound == pytest.approx(max(0.0, math.log(share / (1 - share))), abs=2e-3)


def test_the_bound_is_what_the_p_value_refutes() -> None:
    bound = epsilon_lower_bound(1e-3, 100, 60, 55, confidence=0.9)
    assert p_value(bound, 1e-3, 100, 60, 55) <= 0.1 < p_value(bound + 2e-3, 1e-3, 100, 60, 55)
    assert bound < epsilon_lower_bound(0.0, 100, 60, 55, confidence=0.9)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (0.5, 1e-3), (1.0, 0.02)])
def test_the_bound_errs_in_1_of_20_runs_of_randomised_response_at_most(epsilon: float, delta: float) -> None:
    answers = 100
    chances = randomised_response(epsilon, delta, answers)
    bounds = [epsilon_lower_bound(delta, answers, answers, right, 0.95) for right in range(answers + 1)]
    errs = sum(chance for chance, bound in zip(chances, bounds, strict=True) if bound > epsilon)
    assert errs <= 0.05
    if delta == 0:
        assert errs > 0.02  # only whole numbers can be right: the bound is as tight as they allow


def test_one_run_of_randomised_response_comes_near_its_epsilon_from_below() -> None:
    rng = np.random.default_rng(7)
    bounds = []
    for _ in range(100):
        included = rng.random(1000) < 0.5
        answers = included ^ (rng.random(1000) > 1 / (1 + math.exp(-1.0)))
        bounds.append(one_run(answers + 0.1 * rng.random(1000), included, claimed=1.0, delta=0.0).lower_bound)
    assert np.mean(np.array(bounds) > 1.0) <= 0.05
    assert 0.7 < np.mean(bounds) < 0.95


def test_one_run_refutes_a_claim_below_the_bound_alone() -> None:
    included = np.arange(200) % 2 == 0
    found = one_run(np.where(included, 1.0, -1.0), included, claimed=3.0, delta=1e-5)
    assert (found.canaries, found.guesses, found.right) == (200, 200, 200)
    assert found.lower_bound == found.ceiling == pytest.approx(3.8, abs=0.1)  # 0.0125^(1/200) over what is left to 1
    assert not found.holds
    assert one_run(np.where(included, 1.0, -1.0), included, claimed=4.0, delta=1e-5).holds


def test_one_run_without_a_signal_bounds_nothing() -> None:
    included = np.random.default_rng(3).random(1000) < 0.5
    found = one_run(normal(1000), included, claimed=0.1, delta=1e-5)
    assert found.lower_bound == 0.0
    assert found.ceiling > 5
