import math

import pytest
import torch

from fedtrain.training.adabound import AdaBound


def stepped(gradients: list[float], factor: float = 1.0, **settings) -> list[float]:
    """The one parameter, 1 at first, after each step."""
    param = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdaBound([param], **settings)
    optimizer.param_groups[0]["lr"] *= factor
    values = []
    for gradient in gradients:
        param.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        values.append(float(param.detach()))
    return values


def test_two_steps_by_hand() -> None:
    # Step 1: m = 0.5 * 4 = 2, v = 0.75 * 0 + 0.25 * 16 = 4, Adam's rate 0.1 sqrt(0.25) / 0.5 / 2 = 0.05; the bounds are
    # 0.2 (1 - 1 / 1.5) = 0.0667 and 0.2 (1 + 1 / 0.5) = 0.6: clipped from below, 1 - 0.0667 * 2 = 0.8667.
    # Step 2: m = 0.5 * 2 - 0.5 * 8 = -3, v = 0.75 * 4 + 0.25 * 64 = 19, rate 0.1 sqrt(0.4375) / 0.75 / sqrt(19) = 0.02;
    # bounds 0.2 (1 - 1 / 2) = 0.1 and 0.2 (1 + 1 / 1) = 0.4: 0.8667 + 0.1 * 3.
    settings = {"lr": 0.1, "betas": (0.5, 0.75), "final_lr": 0.2, "gamma": 0.5, "eps": 1e-12}
    assert stepped([4.0, -8.0], **settings) == pytest.approx([1 - 0.4 / 3, 1 - 0.4 / 3 + 0.3])


def test_a_rate_between_the_bounds_is_adams() -> None:
    ours = stepped([4.0, -8.0, 0.5], lr=0.1, final_lr=0.05, gamma=1e-9)
    param = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    adam, theirs = torch.optim.Adam([param], lr=0.1), []
    for gradient in (4.0, -8.0, 0.5):
        param.grad = torch.tensor([gradient], dtype=torch.float64)
        adam.step()
        theirs.append(float(param.detach()))
    assert ours == pytest.approx(theirs)


def test_a_rate_above_the_upper_bound_is_clipped() -> None:
    # m = 0.1 * 1e-6, and Adam's rate 1 / 1e-6 is far above 0.1 (1 + 1 / 0.999) = 0.2001
    assert stepped([1e-6], lr=1.0, gamma=0.999) == pytest.approx([1 - 0.1 * (1 + 1 / 0.999) * 1e-7], abs=1e-15)


def test_a_schedule_scales_the_bounds_too() -> None:
    moved = [1 - stepped([2.0], factor, lr=0.1, final_lr=5.0, gamma=0.5)[0] for factor in (1.0, 0.25)]
    assert moved[1] == pytest.approx(moved[0] / 4)


def test_weight_decay_is_part_of_the_gradient() -> None:
    assert stepped([2.0], lr=0.1, weight_decay=0.5) == stepped([2.5], lr=0.1)


def test_amsbound_never_takes_a_smaller_second_moment() -> None:
    gradients = [8.0, 0.0, 0.0, 0.0, 1.0]
    settings = {"lr": 0.1, "betas": (0.5, 0.5), "final_lr": 1e-3, "gamma": 1e-4}
    plain, ams = (stepped(gradients, **settings, amsbound=ams) for ams in (False, True))
    assert plain[0] == ams[0]
    assert 0 < ams[3] - ams[4] < plain[3] - plain[4]


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"gamma": 1.0}, {"betas": (0.9, 1.0)}, {"final_lr": math.nan}])
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        stepped([], **settings)
