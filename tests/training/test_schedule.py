import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch.optim import lr_scheduler

from fedtrain.experiment.schedules import ScheduleSection
from fedtrain.training.schedule import factor_at, lr_factor, round_rate

ROUNDS = 12


def schedule(**settings) -> ScheduleSection:
    return TypeAdapter(ScheduleSection).validate_python(settings)


def torchs(kind: type, lr: float = 1.0, **settings) -> list[float]:
    """The rates of the rounds as a scheduler of torch has them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = kind(optimizer, **settings)
    rates = []
    for _ in range(ROUNDS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("settings", "kind", "theirs"),
    [
        ({"name": "step", "every": 5, "gamma": 0.5}, lr_scheduler.StepLR, {"step_size": 5, "gamma": 0.5}),
        ({"name": "exponential", "gamma": 0.9}, lr_scheduler.ExponentialLR, {"gamma": 0.9}),
        (
            {"name": "cosine", "final_factor": 0.1},
            lr_scheduler.CosineAnnealingLR,
            {"T_max": ROUNDS, "eta_min": 0.1},
        ),
        (
            {"name": "linear", "final_factor": 0.25},
            lr_scheduler.LinearLR,
            {"start_factor": 1.0, "end_factor": 0.25, "total_iters": ROUNDS},
        ),
        (
            {"name": "triangular", "period": 4, "least_factor": 0.2},
            lr_scheduler.CyclicLR,
            {"base_lr": 0.2, "max_lr": 1.0, "step_size_up": 2, "cycle_momentum": False},
        ),
        (
            {"name": "triangular", "period": 6, "least_factor": 0.2, "gamma": 0.5},
            lr_scheduler.CyclicLR,
            {"base_lr": 0.2, "max_lr": 1.0, "step_size_up": 3, "mode": "triangular2", "cycle_momentum": False},
        ),
        (
            {"name": "cosine-restarts", "period": 2, "multiplier": 2, "final_factor": 0.1},
            lr_scheduler.CosineAnnealingWarmRestarts,
            {"T_0": 2, "T_mult": 2, "eta_min": 0.1},
        ),
        (
            {"name": "cosine-restarts", "period": 5},
            lr_scheduler.CosineAnnealingWarmRestarts,
            {"T_0": 5},
        ),
        (  # torch's last step is at the end of its curve, and its peak one step before its share
            {"name": "one-cycle", "rise": 0.25, "start_factor": 0.1, "final_factor": 0.01},
            lr_scheduler.OneCycleLR,
            {"max_lr": 1.0, "total_steps": ROUNDS + 1, "pct_start": 4 / 13, "div_factor": 10, "final_div_factor": 10},
        ),
    ],
)
def test_each_curve_is_torchs(settings: dict, kind: type, theirs: dict) -> None:
    section = schedule(**settings)
    ours = [lr_factor(section, number, ROUNDS) for number in range(1, ROUNDS + 1)]
    extra = {"cycle_momentum": False} if kind is lr_scheduler.OneCycleLR else {}
    assert ours == pytest.approx(torchs(kind, **theirs, **extra), abs=1e-12)


def test_warm_up_and_cosine_are_to_the_bit_what_they_were() -> None:
    for rounds in range(1, 40):
        for warmup in range(6):
            section = schedule(name="cosine", warmup_rounds=warmup, final_factor=0.07)
            for number in range(1, rounds + 1):
                if number <= warmup:
                    before = number / warmup
                else:
                    progress = (number - warmup - 1) / (rounds - warmup)
                    before = 0.07 + (1 - 0.07) * 0.5 * (1 + math.cos(math.pi * progress))
                assert lr_factor(section, number, rounds) == before


def test_a_warm_up_rises_to_where_the_schedule_begins() -> None:
    section = schedule(name="triangular", period=4, least_factor=0.2, warmup_rounds=2)
    factors = [lr_factor(section, number, rounds=10) for number in range(1, 8)]
    assert factors == pytest.approx([0.1, 0.2, 0.2, 0.6, 1.0, 0.6, 0.2])


def test_by_round_all_steps_have_the_rate_of_the_rounds_beginning() -> None:
    rate = round_rate(schedule(name="linear"), 3, rounds=4)
    assert [rate(0.0), rate(0.99)] == [0.5, 0.5]


def test_by_step_the_rate_goes_on_within_the_round() -> None:
    section = schedule(name="linear", by="step")
    assert [round_rate(section, 3, rounds=4)(share) for share in (0.0, 0.5)] == [0.5, 0.375]
    warm = schedule(by="step", warmup_rounds=4)
    assert [round_rate(warm, 1, rounds=9)(share) for share in (0.0, 0.5)] == [0.25, 0.375]
    assert round_rate(warm, 4, rounds=9)(0.5) == 1.0, "it never rises beyond"


def test_a_plateau_knows_only_its_warm_up() -> None:
    section = schedule(name="plateau", warmup_rounds=2)
    assert [lr_factor(section, number, rounds=9) for number in (1, 2, 9)] == [0.5, 1.0, 1.0]


@given(
    st.sampled_from(
        [
            {},
            {"name": "step", "every": 3},
            {"name": "exponential"},
            {"name": "cosine"},
            {"name": "linear"},
            {"name": "triangular", "period": 0.1},
            {"name": "cosine-restarts", "period": 1, "multiplier": 3},
            {"name": "one-cycle"},
            {"name": "plateau"},
        ]
    ),
    st.integers(0, 10**6),
    st.integers(1, 10**6),
    st.floats(0, 1, exclude_max=True),
)
def test_no_factor_is_ever_below_0_or_above_1(settings: dict, warmup: int, rounds: int, share: float) -> None:
    section = schedule(**settings, warmup_rounds=warmup)
    for number in (1, min(warmup + 1, rounds), rounds):
        assert 0 <= factor_at(section, number - 1 + share, rounds) <= 1
