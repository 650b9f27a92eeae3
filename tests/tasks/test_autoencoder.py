from __future__ import annotations

import math

import pytest
import torch

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.autoencoder import Autoencoder, Vae

SPEC = DataSpec((3,), "class", 2)


def plane(count: int) -> torch.Tensor:
    """Points of a plane in space."""
    first, second = torch.randn(2, count, generator=torch.Generator().manual_seed(1))
    return torch.stack([first, second, first + second], 1)


def trained(task, inputs: torch.Tensor, steps: int):
    with global_torch_seed(5):
        model = task.model().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            task.loss(model(inputs), None).mean().backward()
            optimizer.step()
    return model.eval()


def test_the_score_is_the_logarithm_of_the_error_over_the_threshold():
    task = Autoencoder(SPEC, hidden=[], code=2, threshold=0.5)
    model = task.model()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    outputs = model(torch.tensor([[1.0, 1.0, 1.0], [0.6, 0.0, 0.0]]))  # errors 1 and 0.12
    assert outputs[:, 0].tolist() == pytest.approx([math.log(2), math.log(0.24)])
    assert task.loss(outputs, None).tolist() == pytest.approx([1.0, 0.12])
    assert task.metrics()["flagged"](outputs, None).tolist() == [1.0, 0.0]


def test_what_lies_off_the_plane_is_an_anomaly():
    inputs = plane(200)
    model = trained(Autoencoder(SPEC, hidden=[], code=2), inputs, 400)
    normal, anomalous = model(inputs)[:, 0], model(inputs + torch.tensor([1.0, 1.0, -1.0]))[:, 0]
    assert normal.max() < anomalous.min()


def test_the_lower_bound_by_hand():
    task = Vae(SPEC, hidden=[], code=1, variance=2.0)
    model = task.model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encoder.fc1.bias.copy_(torch.tensor([2.0, math.log(3)]))  # mean, log variance
        model.decoder.fc1.weight.fill_(0.5)
    outputs = model(torch.tensor([[1.0, 3.0, 1.0]]))  # decoded: 1, 1, 1
    assert outputs[0].tolist() == pytest.approx([4 / 4, (4 + 3 - 1 - math.log(3)) / 2])
    assert task.loss(outputs, None).item() == pytest.approx(outputs.sum().item())


def test_only_training_samples():
    model = Vae(SPEC).model()
    inputs = plane(4)
    assert not torch.equal(model.train()(inputs), model(inputs))
    assert torch.equal(model.eval()(inputs), model(inputs))


def test_the_decoder_draws_what_inputs_look_like():
    model = trained(Vae(SPEC, hidden=[32], code=2, variance=0.05), plane(400), 600)
    with torch.no_grad():
        drawn = model.decoder(torch.randn(500, 2, generator=torch.Generator().manual_seed(2)))
    off = drawn[:, 0] + drawn[:, 1] - drawn[:, 2]
    assert off.std() < 0.3
    assert torch.allclose(drawn[:, :2].std(0), torch.ones(2), atol=0.35)


@pytest.mark.parametrize(("task", "option"), [(Autoencoder, "threshold"), (Vae, "variance"), (Vae, "code")])
def test_an_option_below_its_least_is_refused(task, option):
    with pytest.raises(TaskError, match=f"the task option '{option}' is wrong: got 0"):
        task(SPEC, **{option: 0})


def test_tokens_are_refused():
    with pytest.raises(TaskError, match="'vae' needs features or images, and these are tokens"):
        Vae(DataSpec((8,), "tokens", 5))
