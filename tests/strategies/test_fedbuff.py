import torch

from fedtrain.experiment.strategies import FedBuffStrategy
from fedtrain.params import Params
from fedtrain.strategies.base import Asynchrony, FederatedStrategy
from fedtrain.strategies.fedbuff import fedbuff
from fedtrain.wire import Update

PARAMS: Params = {"w": torch.tensor([10.0])}


def build(exponent: float = 0.5, server_lr: float = 1.0) -> FederatedStrategy:
    section = FedBuffStrategy(
        name="fedbuff", buffer_size=3, max_in_flight=7, staleness_exponent=exponent, server_lr=server_lr
    )
    return fedbuff(section)


def update(round_number: int, delta: float) -> Update:
    return Update("a", round_number, {"w": torch.tensor([delta])}, num_examples=round_number)


def after(strategy: FederatedStrategy, *rounds: list[Update]) -> float:
    state, params = strategy.algorithm.init(PARAMS), PARAMS
    for updates in rounds:
        params, state = strategy.algorithm.apply(state, params, iter(updates))
    return params["w"].item()


def test_algorithm_1_by_hand() -> None:
    waiting = [[update(r, 0.0)] for r in (1, 2, 3)]
    # In round 4: 8 is fresh, 6 is 3 steps old and weighs 1 / sqrt(1 + 3); divided by K = 2, not by 1.5.
    assert after(build(server_lr=0.5), *waiting, [update(4, 8.0), update(1, 6.0)]) == 10 + 0.5 * (8 + 6 / 2) / 2


def test_updates_of_their_own_round_are_not_stale() -> None:
    assert after(build(), *[[update(r, 1.0)] for r in (1, 2, 3)]) == 13.0


def test_an_exponent_of_0_ignores_staleness() -> None:
    assert after(build(exponent=0.0), [update(1, 1.0)], [update(1, 1.0)], [update(1, 1.0)]) == 13.0


def test_the_count_of_rounds_catches_up_after_rounds_without_updates() -> None:
    fresh, stale = update(3, 1.0), update(3, 2.0)
    assert after(build(), [], [], [fresh]) == 11.0
    assert after(build(exponent=1.0), [], [], [fresh], [stale]) == 12.0  # one step old


def test_the_server_knows_how_clients_overlap() -> None:
    assert build().asynchrony == Asynchrony(buffer_size=3, max_in_flight=7)
