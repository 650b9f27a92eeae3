import torch

from fedtrain.strategies.fedavg import fedavg
from fedtrain.wire import Update


def test_mcmahans_equation_by_hand() -> None:
    algorithm = fedavg().algorithm
    params = {"w": torch.tensor([1.0, 10.0])}
    updates = [
        Update("a", 1, {"w": torch.tensor([1.0, 0.0])}, num_examples=1),
        Update("b", 1, {"w": torch.tensor([5.0, 4.0])}, num_examples=3),
    ]
    new, state = algorithm.apply(algorithm.init(params), params, iter(updates))
    assert new["w"].tolist() == [5.0, 13.0]  # 1 + (1*1 + 3*5)/4, 10 + (0 + 3*4)/4
    assert state == {}


def test_no_update_leaves_the_model() -> None:
    algorithm = fedavg().algorithm
    params = {"w": torch.tensor([-0.0])}
    new, _ = algorithm.apply(algorithm.init(params), params, iter(()))
    assert new["w"].numpy().tobytes() == params["w"].numpy().tobytes()  # -0.0 + 0.0 would be +0.0
