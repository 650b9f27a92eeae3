"""Adapters beside frozen layers: what they compute, what is trained, and what of each example's gradient is seen."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.experiment.model import LoraSection
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import TaskSection
from fedtrain.params import exchanged
from fedtrain.privacy.accounting import Spend
from fedtrain.privacy.rng import NoiseSource
from fedtrain.privacy.sample import PrivateGradients
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks import make_task
from fedtrain.tasks.lora import LoraLinear, adapter_names, add_adapters, merged

SPEC = DataSpec((6,), "class", 3)
TEXT = DataSpec((5,), "tokens", 7)


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(6, 5))
    model.add_module("relu", nn.ReLU())
    model.add_module("fc2", nn.Linear(5, 3))
    return model


def adapted(model: nn.Module, spec: DataSpec = SPEC, seed: int = 2, **fields: object) -> nn.Module:
    with global_torch_seed(seed, "test"):
        return add_adapters(model, LoraSection.model_validate({"rank": 2, "alpha": 3.0, **fields}), spec)


def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    """As after some training: B is not zero any more."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng), alpha=by)
    return model


def test_an_adapter_adds_nothing_at_first_and_then_its_scaled_product():
    plain = perceptron()
    model = adapted(copy.deepcopy(plain))
    inputs = torch.randn(4, 6)
    assert torch.equal(model(inputs), plain(inputs))
    layer = moved(model).fc1
    a, b = layer.lora_a.weight, layer.lora_b.weight
    by_hand = inputs @ layer.weight.T + layer.bias + 3 / 2 * inputs @ a.T @ b.T
    torch.testing.assert_close(layer(inputs), by_hand)


def test_a_starts_as_he_et_al_have_it_and_b_at_zero():
    layer = adapted(nn.Sequential(nn.Linear(600, 10)), DataSpec((600,), "class", 10), rank=100)[0]
    assert float(layer.lora_a.weight.detach().var()) == pytest.approx(2 / 600, rel=0.03)
    assert not layer.lora_b.weight.any()


def test_names_stay_and_only_adapters_and_what_is_named_are_trained():
    model = adapted(perceptron(), train=["fc2.bias"])
    assert list(model.state_dict()) == [
        *("fc1.weight", "fc1.bias", "fc1.lora_a.weight", "fc1.lora_b.weight"),
        *("fc2.weight", "fc2.bias", "fc2.lora_a.weight", "fc2.lora_b.weight"),
    ]
    assert exchanged(model).keys() == adapter_names(model) | {"fc2.bias"}
    one = adapted(perceptron(), layers=["fc1"])
    assert adapter_names(one) == {"fc1.lora_a.weight", "fc1.lora_b.weight"} == exchanged(one).keys()
    assert type(one.fc2) is nn.Linear


def test_the_seed_decides_of_a():
    first, same, other = (adapted(perceptron(), seed=seed).fc1.lora_a.weight for seed in (2, 2, 3))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_one_layer_in_two_places_gets_one_adapter_and_a_lone_layer_may_be_the_model():
    layer = nn.Linear(6, 6)
    twice = adapted(nn.Sequential(layer, nn.ReLU(), layer))
    assert twice[0] is twice[2]
    assert isinstance(twice[0], LoraLinear)
    alone = adapted(nn.Linear(6, 3))
    assert adapter_names(alone) == {"lora_a.weight", "lora_b.weight"}


def test_merged_tensors_are_a_plain_model_with_the_same_outputs():
    model = moved(adapted(perceptron(), layers=["fc1"]))
    plain = perceptron()
    plain.load_state_dict(merged(model.state_dict(), LoraSection(rank=2, alpha=3.0)))
    inputs = torch.randn(4, 6)
    torch.testing.assert_close(plain(inputs), model(inputs))


def test_dropout_is_of_the_adapters_input_in_training_alone():
    model = moved(adapted(perceptron(), dropout=0.5, layers=["fc1"]))
    inputs = torch.randn(4, 6)
    with global_torch_seed(4, "test"):
        drawn = [model(inputs) for _ in range(2)]
    assert not torch.equal(*drawn)
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"layers": ["fc3"]}, r"got model\.lora\.layers = fc3; expected a name or pattern among fc1, fc2"),
        ({"train": ["fc1.wieght"]}, r"model\.lora\.train = fc1.wieght.*Did you mean fc1\.weight"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused(fields, why):
    with pytest.raises(TaskError, match=why):
        adapted(perceptron(), **fields)


def test_models_without_linear_layers_or_with_other_inputs_are_refused():
    with pytest.raises(TaskError, match="needs a model with Linear layers"):
        adapted(nn.Sequential(nn.Conv1d(1, 1, 1)))
    with pytest.raises(TaskError, match=r"trying the model with model\.lora failed"):
        adapted(perceptron(), DataSpec((4,), "class", 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Flatten(), nn.Linear(6, 3))


def test_layers_that_are_read_and_not_called_are_refused_by_name():
    with pytest.raises(TaskError, match=r"without calling them: 1\.linear1, 1\.linear2.*such as 3"):
        adapted(encoder())
    model = adapted(encoder(), layers=["3"])
    assert model.training
    assert all(module.training for module in model.modules())


def test_where_an_lstm_reads_its_weights_the_head_can_be_adapted():
    lstm = make_task(TaskSection(name="char-lstm", options={"hidden": 4, "layers": 1}), TEXT, Path())
    model = adapted(lstm.model(), TEXT, layers=["fc"])
    assert adapter_names(model) == {"fc.lora_a.weight", "fc.lora_b.weight"} == exchanged(model).keys()


def rows_one_by_one(model, loss, trained, inputs, targets, bound):
    """The sum of clipped gradients by a loop over examples."""
    total = [torch.zeros_like(p) for p in trained]
    for i in range(len(inputs)):
        gradients = torch.autograd.grad(loss(model(inputs[i : i + 1]), targets[i : i + 1]).sum(), trained)
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        for t, g in zip(total, gradients):
            t.add_(g, alpha=min(1.0, bound / norm))
    return total


@pytest.mark.parametrize("mode", ["auto", "hooks", "ghost", "functorch"])
@pytest.mark.parametrize("name", ["mlp", "transformer", "cnn"])
def test_gradients_of_examples_are_those_of_a_loop_in_every_mode(mode, name, draw):
    pytest.importorskip("opacus")
    options = {"mlp": {"hidden": [8]}, "transformer": {"width": 8, "heads": 2, "layers": 1}, "cnn": {}}[name]
    spec = {"mlp": SPEC, "transformer": TEXT, "cnn": DataSpec((1, 8, 8), "class", 3)}[name]
    task = make_task(TaskSection(name=name, options=options), spec, Path())
    train = {"mlp": ["fc2.*"], "transformer": ["norm.*", "fc.bias"], "cnn": ["conv1.*"]}[name]
    with global_torch_seed(3, "test"):
        model = adapted(task.model(), spec, train=train)
    moved(model, by=0.05)
    trained = [p for p in model.parameters() if p.requires_grad]
    examples = draw(spec, 5)
    section = SamplePrivacy(noise_multiplier=1.0, delta=1e-5, max_grad_norm=0.5, mode=mode)
    private = PrivateGradients(model, task.loss, trained, section)
    (found,) = private.steps(*vars(examples).values(), Spend(0.0, 1.0, 1), NoiseSource(0))
    for got, want in zip(found, rows_one_by_one(model, task.loss, trained, *vars(examples).values(), 0.5), strict=True):
        torch.testing.assert_close(got, want / 5, atol=1e-5, rtol=1e-4)
