from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg, FedTrimmedAvg, QFedAvg

from fedtrain.errors import InputError, RunError
from fedtrain.experiment.strategies import OwnStrategy
from fedtrain.params import Params
from fedtrain.strategies.base import FederatedStrategy, State
from fedtrain.strategies.own import load_own
from fedtrain.training.rules import LocalStart
from fedtrain.wire import Update

EXAMPLES = Path(__file__).parents[2] / "examples"
FLWR = "flwr.serverapp.strategy"
OWN = """
import torch
from flwr.serverapp.strategy import FedAvg, FedProx
from fedtrain.strategies.base import Algorithm, FederatedStrategy

def algorithm(new=lambda params: params):
    return Algorithm(lambda params: {"rounds": 0}, lambda state, params, updates: (new(params), state))

def double(factor=2.0):
    if factor < 0:
        raise ValueError("negative factor")
    return FederatedStrategy(algorithm(lambda params: {n: factor * t.double() for n, t in params.items()}))

finished = double()
flwr_finished = FedAvg(fraction_train=0.5)
number = 3

def nothing(): ...
def needs(size): return algorithm()
def not_finite(): return algorithm(lambda params: {n: t / 0 for n, t in params.items()})
def broken(): return algorithm(lambda params: params["missing"])
def bad_init(): return Algorithm(lambda params: 1 / 0, None)
def bare(): return FederatedStrategy(lambda params: {}, None)
def bad_rule(): return FederatedStrategy(algorithm(), len)
def state_of(first, later=None):
    return Algorithm(lambda params: first, lambda state, params, updates: (params, first if later is None else later))
def bad_share(): return algorithm()._replace(share=lambda state: state["missing"])
def bad_extra(): return algorithm()._replace(extra=lambda params: 1 / 0)
def bad_objection(): return algorithm()._replace(objection=lambda update: update.missing)

def in_place():
    def init(params):
        params["w"].sub_(1)
        return {"m": params, "deep": {"rounds": [0]}}
    def apply(state, params, updates):
        state["m"]["w"].add_(1)
        state["deep"]["rounds"][0] += 1
        params["w"].add_(state["m"]["w"])
        scratch["m"].copy_(state["m"]["w"])
        return params, {**state, "m": {"w": scratch["m"]}}
    def share(state):
        return {"w": state["m"]["w"].neg_()}
    scratch = {"m": torch.zeros(2)}
    return Algorithm(init, apply, share)

def proximal(mu): return FedProx(proximal_mu=mu)
def by_size(): return FedAvg(weighted_by_key="size")

class Flwr(FedAvg):
    def __init__(self, extra, **kwargs):
        super().__init__(**kwargs)
        self.extra = extra
"""

Load = Callable[..., Any]


@pytest.fixture
def own(tmp_path: Path) -> Load:
    (tmp_path / "own.py").write_text(OWN)
    return lambda name, **options: load_own(OwnStrategy(name="own", path=f"own.py:{name}", options=options), tmp_path)


def flwrs(name: str, **options: object) -> object:
    return load_own(OwnStrategy(name="own", path=f"{FLWR}:{name}", options=options), Path())


def step(strategy: object, params: Params) -> Params:
    assert isinstance(strategy, FederatedStrategy)
    algorithm = strategy.algorithm
    algorithm.extra(params)
    state = algorithm.init(params)
    algorithm.share(state)
    return algorithm.apply(state, params, iter(()))[0]


@pytest.mark.parametrize(("name", "options", "factor"), [("double", {"factor": 3.0}, 3), ("finished", {}, 2)])
def test_a_strategy_of_fedtrains_kind_gets_its_options(own: Load, name: str, options: dict, factor: int) -> None:
    new = step(own(name, **options), {"w": torch.ones(2)})
    assert new["w"].tolist() == [factor, factor]
    assert new["w"].dtype == torch.float32  # the strategy made float64


def test_an_algorithm_alone_is_a_strategy_without_a_local_rule(own: Load) -> None:
    strategy = own("algorithm")
    assert isinstance(strategy, FederatedStrategy)
    assert strategy.local_rule is None


def test_a_strategy_of_flwr_gets_its_options_and_does_not_wait_for_a_second_node() -> None:
    strategy = flwrs("FedTrimmedAvg", beta=0.3, min_train_nodes=4)
    assert isinstance(strategy, FedTrimmedAvg)
    assert strategy.beta == 0.3
    assert (strategy.min_train_nodes, strategy.min_available_nodes, strategy.min_evaluate_nodes) == (4, 1, 0)
    assert isinstance(flwrs("QFedAvg", client_learning_rate=0.1), QFedAvg)


def test_an_own_strategy_of_flwrs_kind_keeps_its_arguments(own: Load) -> None:
    strategy = own("Flwr", extra=3, fraction_train=0.5)
    assert isinstance(strategy, FedAvg)
    assert (vars(strategy)["extra"], strategy.fraction_train) == (3, 0.5)


def test_runs_in_one_process_do_not_share_a_finished_strategy(own: Load) -> None:
    assert own("flwr_finished") is not own("flwr_finished")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("doubel", {}, "own.py defines no 'doubel': got own.py:doubel. Did you mean double?"),
        (
            "double",
            {"facto": 1},
            "the options do not suit own.py:double: got an unexpected keyword argument 'facto'; "
            "expected options among factor. Did you mean factor?",
        ),
        ("nothing", {"facto": 1}, "unexpected keyword argument 'facto'; expected no options"),
        ("needs", {}, "missing a required argument: 'size'; expected options among size. Set it in [strategy] options"),
        ("double", {"factor": -1.0}, "own.py, line 11: ValueError: negative factor"),
        ("finished", {"factor": 1}, "own.py:finished is a finished strategy, which takes no options: got factor"),
        ("nothing", {}, "own.py:nothing made no strategy: got NoneType; expected a FederatedStrategy"),
        ("number", {}, "own.py:number makes no strategy: got int; expected a function or class"),
        ("bare", {}, "own.py:bare made an incomplete strategy: got (function, NoneType, NoneType); expected Federated"),
        ("bad_rule", {}, "incomplete strategy: got (Algorithm, builtin_function_or_method, NoneType)"),
        ("proximal", {"mu": 0.1}, "flwr's FedProx cannot run here: its proximal term"),
        ("by_size", {}, "own.py:by_size has another weighted_by_key than fedtrain's messages: got size; expected num-"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(own: Load, name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        own(name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FedTrimmedAvg", {"bta": 0.3}, "unexpected keyword argument 'bta'; expected options among fraction_train"),
        ("FedTrimmedAvg", {"bta": 0.3}, "Did you mean beta?"),
        ("FedTrimmedAvg", {"beta": 0.7}, "ValueError: `beta` must be in the range"),
        ("FedAvg", {"weighted_by_key": "size"}, "has another weighted_by_key than fedtrain's messages: got size"),
        ("FedAvg", {"arrayrecord_key": "model"}, "has another arrayrecord_key than fedtrain's messages: got model"),
        ("FedXgbBagging", {}, "flwr's FedXgbBagging cannot run here: it exchanges XGBoost trees"),
        ("DifferentialPrivacyServerSideFixedClipping", {}, "FixedClipping cannot run here: its noise"),
        ("Strategy", {}, "abstract class"),
    ],
)
def test_what_is_wrong_with_a_strategy_of_flwr(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        flwrs(name, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"apply of own.py:broken failed at .*own.py, line \d+: KeyError: 'missing'"),
        ("bad_init", r"init of own.py:bad_init failed at .*own.py, line \d+: ZeroDivisionError"),
        ("bad_share", r"share of own.py:bad_share failed at .*own.py, line \d+: KeyError: 'missing'"),
        ("bad_extra", r"extra of own.py:bad_extra failed at .*own.py, line \d+: ZeroDivisionError"),
        ("not_finite", "own.py:not_finite made NaN or infinite values in w"),
    ],
)
def test_a_failure_in_a_run_names_the_users_line(own: Load, name: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        step(own(name), {"w": torch.ones(2)})


def test_a_failing_objection_is_not_the_clients_fault(own: Load) -> None:
    objection = own("bad_objection").algorithm.objection
    # The gate takes a RunError for a reason to refuse the update.
    with pytest.raises(InputError, match=r"objection of own.py:bad_objection failed at .*own.py, line \d+: Attribute"):
        objection(Update("a", 1, {"w": torch.ones(2)}, 4))


def test_what_a_checkpoint_holds_stays_though_the_strategy_changes_it_in_place(own: Load) -> None:
    algorithm, params = own("in_place").algorithm, {"w": torch.ones(2)}
    first = algorithm.init(params)
    second_params, second = algorithm.apply(first, params, iter(()))
    shared = algorithm.share(second)
    third_params, third = algorithm.apply(second, second_params, iter(()))

    def numbers(params: Params, state: State) -> list[float]:
        return [params["w"][0].item(), state["m"]["w"][0].item(), state["deep"]["rounds"][0]]

    assert numbers(params, first) == [1, 0, 0]
    assert numbers(second_params, second) == [2, 1, 1]
    assert numbers(third_params, third) == [4, 2, 2]
    assert shared["w"][0].item() == -1


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"m": [torch.ones(1)]}, "state['m'][0] is of type torch.Tensor; a state maps names to tensors, numbers"),
        ({"deep": {"m": np.float32(1)}}, "state['deep']['m'] is of type numpy.float32"),
        ({"norms": {3: 0.5}}, "state['norms'] has a name of type int: 3"),
        ([1.0], "state is of type list"),
    ],
)
def test_a_state_that_no_checkpoint_can_hold_is_refused_at_once(own: Load, state: object, place: str) -> None:
    with pytest.raises(InputError) as at_init:
        own("state_of", first=state).algorithm.init({})
    later = own("state_of", first={}, later=state).algorithm
    with pytest.raises(RunError) as in_a_round:
        later.apply(later.init({}), {}, iter(()))
    for caught, function in ((at_init, "init"), (in_a_round, "apply")):
        assert f"{function} of own.py:state_of gave what no checkpoint can hold: {place}" in str(caught.value)


def example(**options: float) -> FederatedStrategy:
    strategy = load_own(OwnStrategy(name="own", path="own_strategy.py:build", options=options), EXAMPLES)
    assert isinstance(strategy, FederatedStrategy)
    return strategy


def test_the_example_by_hand() -> None:
    algorithm = example(power=0.5, momentum=0.5).algorithm
    params: Params = {"w": torch.tensor([10.0])}
    updates = [Update("a", 1, {"w": torch.tensor([1.0])}, 4), Update("b", 1, {"w": torch.tensor([6.0])}, 9)]
    state = algorithm.init(params)
    params, state = algorithm.apply(state, params, iter(updates))
    assert params["w"].tolist() == [14.0]  # (2*1 + 3*6) / 5 = 4 more
    params, state = algorithm.apply(state, params, iter(updates))
    assert params["w"].tolist() == [20.0]  # 4/2 + 4 more
    assert algorithm.apply(state, params, iter(()))[0]["w"].tolist() == [20.0]


def test_the_examples_rule_by_hand() -> None:
    assert example().local_rule is None
    rule = example(max_grad_norm=1.0).local_rule
    assert rule is not None
    assert rule.correct_gradient is not None
    begun = rule.begin(LocalStart(["w", "b"], [], {}, {}, 0.1, lambda: 0.0))
    long = rule.correct_gradient(begun, [], [torch.tensor([3.0]), torch.tensor([4.0])])
    assert torch.cat(list(long)).tolist() == pytest.approx([0.6, 0.8])
    short = rule.correct_gradient(begun, [], [torch.tensor([0.3]), torch.tensor([0.4])])
    assert torch.cat(list(short)).tolist() == pytest.approx([0.3, 0.4])


TWICE = """
def build():
    def apply(state, params, updates):
        count = sum(1 for _ in updates)
        return {n: t + sum(u.delta[n] for u in updates) / count for n, t in params.items()}, state
    return Algorithm(lambda params: {}, apply)

def half():
    def apply(state, params, updates):
        list(updates)
        return params
    return Algorithm(lambda params: {}, apply)
"""


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("build", "reads the updates twice, and they stream by once"),
        ("half", "must return the next parameters and the"),
    ],
)
def test_what_would_silently_learn_nothing_is_told(tmp_path: Path, function: str, told: str) -> None:
    (tmp_path / "own.py").write_text("from fedtrain.strategies.base import Algorithm\n" + TWICE)
    strategy = load_own(OwnStrategy(name="own", path=f"own.py:{function}"), tmp_path)
    assert isinstance(strategy, FederatedStrategy)
    params = {"w": torch.zeros(2)}
    updates = [Update("a", 1, {"w": torch.ones(2)}, 3, {"loss": 1.0})]
    with pytest.raises(RunError, match=told):
        strategy.algorithm.apply({}, params, iter(updates))
