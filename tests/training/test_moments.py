import pytest
import torch
from torch import nn

from fedtrain.experiment.optimizers import AdamSection, OtherOptimizer, SgdSection
from fedtrain.experiment.training import TrainingSection
from fedtrain.params import RunningMean, exchanged, load, snapshot
from fedtrain.training.moments import read_moments, register_moments, write_moments
from fedtrain.training.optimizer import LocalOptimizer

MOMENTUM = TrainingSection(optimizer=SgdSection(momentum=0.5), optimizer_state="average")


def built(training: TrainingSection) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 1), nn.Tanh())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)
    register_moments(model, training)
    return model


def trained(model: nn.Module, training: TrainingSection, *gradients: float) -> dict[str, torch.Tensor]:
    """What a client's round makes of a model whose every gradient is the same number."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    optimizer = LocalOptimizer(training, params, read_moments(model))
    for gradient in gradients:
        optimizer.step([torch.full_like(p, gradient) for p in params.values()], 1.0)
    write_moments(model, optimizer.state())
    return snapshot(exchanged(model))


def test_moments_travel_as_buffers_of_the_model() -> None:
    model = built(TrainingSection(optimizer=AdamSection(name="adam"), optimizer_state="average"))
    shapes = {name: tuple(t.shape) for name, t in exchanged(model).items()}
    assert shapes == {
        "0.weight": (1, 2),
        "0.bias": (1,),
        "optimizer-step-0-weight": (),
        "optimizer-exp_avg-0-weight": (1, 2),
        "optimizer-exp_avg_sq-0-weight": (1, 2),
        "optimizer-step-0-bias": (),
        "optimizer-exp_avg-0-bias": (1,),
        "optimizer-exp_avg_sq-0-bias": (1,),
    }
    assert model(torch.zeros(3, 2)).shape == (3, 1)


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_else_a_model_has_none(state: str) -> None:
    model = built(TrainingSection(optimizer=AdamSection(name="adam"), optimizer_state=state))
    assert exchanged(model).keys() == {"0.weight", "0.bias"}


def test_two_clients_go_on_from_the_mean_of_their_moments() -> None:
    server = built(MOMENTUM)
    mean = RunningMean(like=snapshot(exchanged(server)))
    mean.add(trained(built(MOMENTUM), MOMENTUM, 2.0), weight=3)
    mean.add(trained(built(MOMENTUM), MOMENTUM, -6.0), weight=1)
    load(server, mean.mean())
    # Buffers of 2 and -6, whose mean by examples is 0; then both weights have gone 0.
    assert read_moments(server) == {}
    mean.add(trained(built(MOMENTUM), MOMENTUM, 4.0), weight=4)
    load(server, mean.mean())
    assert read_moments(server)["0.weight"]["momentum"].tolist() == [[2.0, 2.0]]
    # 1 - 0.1 * 2 was the mean of the weights; the next step goes 0.1 * (0.5 * 2 + 1).
    after = trained(server, MOMENTUM, 1.0)
    torch.testing.assert_close(after["0.weight"], torch.full((1, 2), 0.6))


@pytest.mark.parametrize("name", ["nadam", "rprop", "asgd", "adagrad"])
def test_the_first_round_starts_afresh_and_one_client_goes_on_as_alone(name: str) -> None:
    training = TrainingSection(optimizer=OtherOptimizer(name=name), optimizer_state="average")
    model, alone = built(training), {n: p.detach().clone() for n, p in built(training).named_parameters()}
    optimizer = LocalOptimizer(training, alone)
    for gradients in ([2.0, 1.0], [-3.0]):
        for gradient in gradients:
            optimizer.step([torch.full_like(p, gradient) for p in alone.values()], 1.0)
        there = trained(model, training, *gradients)
    for key, value in alone.items():
        torch.testing.assert_close(there[key], value)


def test_a_count_of_steps_adds_nothing_to_the_norm_of_an_update() -> None:
    training = TrainingSection(optimizer=AdamSection(name="adam"), optimizer_state="average")
    model = built(training)
    sent = trained(model, training, *[1.0] * 20)
    assert float(sent["optimizer-step-0-bias"]) == pytest.approx(2e-5)
    assert float(read_moments(model)["0.bias"]["step"]) == pytest.approx(20.0)


def test_a_parameter_that_is_not_trained_in_a_round_leaves_its_moments() -> None:
    model = built(MOMENTUM)
    trained(model, MOMENTUM, 2.0)
    write_moments(model, {"0.bias": {"momentum": torch.tensor([9.0])}})
    found = read_moments(model)
    assert found["0.bias"]["momentum"].tolist() == [9.0]
    assert found["0.weight"]["momentum"].tolist() == [[2.0, 2.0]]
