from pathlib import Path

import numpy as np
import pytest
import torch

from fedtrain.data.federated import PartitionedData, build
from fedtrain.errors import InputError
from fedtrain.experiment import load
from fedtrain.experiment.sections import Experiment
from fedtrain.simulations.range_test import RangeTest, Rates, find_clients, range_test
from fedtrain.tasks.adapted import experiment_task


def prepared(file: Path, *overrides: str) -> tuple[Experiment, PartitionedData]:
    experiment = load(file, overrides)
    return experiment, build(experiment.data, None, file.parent, experiment.seed)


def found(file: Path, *overrides: str, rates: Rates, count: int | None = None) -> RangeTest:
    experiment, data = prepared(file, *overrides)
    task = experiment_task(experiment, data.spec, file.parent)
    clients = find_clients(data, (), count, experiment.seed)
    examples = [(name, data.client(name).train) for name in clients]
    return range_test(experiment, task, examples, torch.device("cpu"), rates)


def test_the_rates_grow_by_one_factor_from_the_first_to_the_last(tiny: Path) -> None:
    test = found(tiny, rates=Rates(1e-5, 1e-3, 21))
    assert test.rates == pytest.approx(np.geomspace(1e-5, 1e-3, 21))
    assert not test.diverged
    assert len(test.losses) == len(test.smoothed) == 21


def test_the_first_loss_is_that_of_the_first_batch_and_the_second_that_after_a_step(tiny: Path) -> None:
    one = found(tiny, rates=Rates(1e-5, 1e-3, 10))
    # As SGD's steps are proportional to the rate, the second loss moves from that without a step by a hundred times.
    slow, fast = (found(tiny, rates=Rates(low, 0.05, 10)).losses for low in (1e-5, 1e-3))
    assert slow[0] == fast[0] == one.losses[0] == pytest.approx(np.log(10), rel=0.1)
    still = found(tiny, rates=Rates(1e-12, 1e-11, 10)).losses[1]
    assert (fast[1] - still) / (slow[1] - still) == pytest.approx(100, rel=0.05)


def test_it_stops_where_the_loss_diverges_and_suggests_rates_below(tiny: Path) -> None:
    test = found(tiny, "training.optimizer.momentum=0.9", rates=Rates(1e-4, 1e4, 60))
    assert test.diverged
    assert len(test.rates) < 60
    assert test.steepest is not None
    assert 1e-3 < test.steepest <= test.least < test.rates[-1]
    assert test.smoothed.min() < 0.8 * test.smoothed[0]


def test_several_clients_give_the_mean_of_their_curves(tiny: Path) -> None:
    experiment, data = prepared(tiny)
    task, rates = experiment_task(experiment, data.spec, tiny.parent), Rates(1e-4, 1e-2, 10)
    pairs = [(name, data.client(name).train) for name in data.client_ids()[:2]]
    device = torch.device("cpu")
    both = range_test(experiment, task, pairs, device, rates).losses
    each = [range_test(experiment, task, [pair], device, rates).losses for pair in pairs]
    assert both == pytest.approx(np.mean(each, axis=0))


def test_the_schedule_and_what_is_kept_take_no_part(tiny: Path) -> None:
    rates = Rates(1e-4, 1e-2, 10)
    plain = found(tiny, rates=rates)
    scheduled = found(
        tiny, 'training.schedule={name="cosine", warmup_rounds=3}', "training.optimizer.lr=7", rates=rates
    )
    assert scheduled.losses.tolist() == plain.losses.tolist()


def test_suggestions_by_hand() -> None:
    rates = np.geomspace(1e-3, 1e3, 7)
    losses = np.array([10.0, 9.9, 8.0, 5.0, 4.5, 4.4, 20.0])
    test = RangeTest(rates, losses, losses, diverged=True)
    assert (test.steepest, test.least) == (pytest.approx(1e-1), pytest.approx(1e2))  # (9.9 - 5) / 2 a decade
    assert RangeTest(rates, np.sort(losses), np.sort(losses), diverged=True).steepest is None


def test_clients_by_name_by_lot_or_the_largest(tiny: Path) -> None:
    _, data = prepared(tiny)
    names, sizes = data.client_ids(), data.sizes()
    assert find_clients(data, (), None, 3) == [names[int(sizes.argmax())]]
    assert find_clients(data, [names[1], names[0], names[1]], None, 3) == [names[1], names[0]]
    drawn = find_clients(data, (), 4, 3)
    assert drawn == find_clients(data, (), 4, 3)
    assert len(set(drawn)) == 4
    assert drawn == [name for name in names if name in drawn]


@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        (["client-99"], None, "no such client: got client-99. Did you mean client-"),
        (["client-1"], 2, "Give one of both"),
        ([], 7, "not so many clients with training examples: got 7; expected 1 to 6"),
        ([], 0, "got 0; expected 1 to 6"),
    ],
)
def test_clients_that_are_not_there_are_refused(names: list[str], count: int | None, message: str, tiny: Path) -> None:
    with pytest.raises(InputError, match=message):
        find_clients(prepared(tiny)[1], names, count, 3)


@pytest.mark.parametrize(("low", "high", "steps"), [(0.0, 1.0, 10), (1.0, 1.0, 10), (1.0, float("inf"), 10), (1, 2, 9)])
def test_rates_that_do_not_grow_are_refused(low: float, high: float, steps: int) -> None:
    with pytest.raises(InputError, match=r"must grow|no curve"):
        Rates(low, high, steps)


def test_losses_of_private_examples_are_not_shown(tiny: Path) -> None:
    private = ("data.test=0", 'privacy={unit="client", noise_multiplier=2.0, delta=1e-4}', "clients.sampling=poisson")
    with pytest.raises(InputError, match=r'have no noise: got privacy\.unit = "client"'):
        found(tiny, *private, rates=Rates())


def test_a_rate_that_breaks_the_first_step_is_refused(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"no finite number from the first step on\. Lower --from"):
        found(tiny, "training.optimizer.weight_decay=1e38", rates=Rates(1e30, 1e31, 10))
