from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.experiment.sections import TaskSection
from fedtrain.params import exchanged
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks import TASKS, make_task
from fedtrain.tasks.dense import Logistic, Mlp, Regressor
from fedtrain.tasks.images import Cnn, Resnet18Gn, SimpleCnn
from fedtrain.tasks.text import CharLstm, Transformer

PARAMETERS = {
    "logistic": 14,
    "mlp": 199_210,  # McMahan et al. 2017
    "cnn": 1_663_370,  # McMahan et al. 2017
    "simple-cnn": 44_426,
    "resnet18-gn": 11_173_962,  # as the CIFAR ResNet-18 with batch normalisation
    "char-lstm": 820_522,
    "transformer": 421_466,
    "regressor": 5_569,
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_built_in_task_is_counted_below():
    assert PARAMETERS.keys() == TASKS.keys()


def test_outputs_losses_metrics_and_parameters(built_in, draw):
    name, spec = built_in
    task = make_task(TaskSection(name=name), spec, Path())
    examples = draw(spec, 4)
    model = task.model()
    outputs = model(examples.inputs)
    assert count(model) == PARAMETERS[name]
    assert outputs.shape[0] == 4
    assert task.loss(outputs, examples.targets).shape == (4,)
    for metric in task.metrics().values():
        values = metric(outputs, examples.targets)
        assert values.shape == (4,)
        assert values.dtype == torch.float32


def test_a_seed_fixes_the_weights(built_in):
    name, spec = built_in
    models = []
    for seed in (1, 1, 2):
        with global_torch_seed(seed):
            models.append(make_task(TaskSection(name=name), spec, Path()).model())
    first, same, other = (exchanged(model) for model in models)
    assert list(first) == list(same)
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_names_in_a_saved_cnn_are_stable():
    assert list(Cnn(DataSpec((1, 28, 28), "class", 10)).model().state_dict()) == [
        "conv1.weight",
        "conv1.bias",
        "conv2.weight",
        "conv2.bias",
        "fc1.weight",
        "fc1.bias",
        "fc2.weight",
        "fc2.bias",
    ]


def test_images_of_other_sizes_and_channels():
    inputs = torch.zeros(2, 3, 21, 16)
    for build in (Logistic, Mlp, Cnn, SimpleCnn, Resnet18Gn):
        assert build(DataSpec((3, 21, 16), "class", 5)).model()(inputs).shape == (2, 5)


def test_two_classes_take_one_output():
    assert count(Mlp(DataSpec((30,), "class", 2), hidden=[]).model()) == 31


def test_options_change_the_model():
    assert count(Mlp(DataSpec((64,), "class", 10), hidden=32).model()) == 64 * 32 + 32 + 32 * 10 + 10
    groups = [
        m.num_groups
        for m in Resnet18Gn(DataSpec((1, 32, 32), "class", 2), 32).model().modules()
        if isinstance(m, nn.GroupNorm)
    ]
    assert groups == [32] * 20
    text = DataSpec((9,), "tokens", 7)
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    assert CharLstm(text, embedding=3, hidden=5, layers=1).model()(tokens).shape == (2, 9, 7)
    assert Transformer(text, width=6, layers=1, heads=3).model()(tokens).shape == (2, 9, 7)


def test_regressor_predicts_in_target_units():
    task = Regressor(DataSpec((1,), "number"), hidden=[], target_mean=30.0, target_std=10.0)
    model = task.model()
    with torch.no_grad():
        model.fc1.weight.fill_(2.0)
        model.fc1.bias.fill_(0.5)
    outputs = model(torch.tensor([[1.0], [-1.0]]))
    assert outputs.tolist() == [55.0, 15.0]  # (2x + .5) * 10 + 30
    assert task.loss(outputs, torch.tensor([50.0, 15.0])).tolist() == [0.25, 0.0]


@pytest.mark.parametrize("name", ["char-lstm", "transformer"])
def test_text_models_never_look_ahead(name):
    model = make_task(TaskSection(name=name), DataSpec((12,), "tokens", 90), Path()).model().eval()
    tokens = torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 7] = 80
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_transformer_takes_shorter_texts_and_tells_positions_apart():
    model = Transformer(DataSpec((12,), "tokens", 90)).model().eval()
    outputs = model(torch.full((2, 5), 3))
    assert outputs.shape == (2, 5, 90)
    assert not torch.allclose(outputs[0, 0], outputs[0, 1], atol=1e-3)


@pytest.mark.parametrize("stepwise", [False, True])
def test_lstm_equals_torch(stepwise):
    layer = CharLstm(DataSpec((12,), "tokens", 90), embedding=3, hidden=5, layers=1).model().lstm1
    reference = nn.LSTM(3, 5, batch_first=True)
    with torch.no_grad():
        reference.weight_ih_l0.copy_(layer.inputs.weight)
        reference.weight_hh_l0.copy_(layer.recurrent.weight)
        reference.bias_ih_l0.copy_(layer.inputs.bias)
        reference.bias_hh_l0.zero_()
    sequence = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0))
    calls = []
    if stepwise:
        layer.recurrent.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(layer(sequence), reference(sequence)[0], atol=1e-6)
    assert len(calls) == (12 if stepwise else 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Mlp(DataSpec((4,), "class", 2), hidden="wide"),
            "'hidden' is wrong: got \"wide\"; expected an integer",
        ),
        (lambda: Mlp(DataSpec((4,), "class", 2), hidden=[8, 0]), "'hidden' is wrong: got [8, 0]"),
        (lambda: Mlp(DataSpec((4,), "class", 2), hidden=True), "'hidden' is wrong: got true"),
        (lambda: Resnet18Gn(DataSpec((3, 32, 32), "class", 2), groups=3), "'groups' is wrong: got 3"),
        (lambda: Transformer(DataSpec((9,), "tokens", 9), width="8"), "'width' is wrong: got \"8\""),
        (
            lambda: Transformer(DataSpec((9,), "tokens", 9), width=10),
            "'width' is wrong: got 10; expected a multiple of",
        ),
        (lambda: CharLstm(DataSpec((9,), "tokens", 9), layers=1.5), "'layers' is wrong: got 1.5"),
        (lambda: Regressor(DataSpec((4,), "number"), target_std=0), "'target_std' is wrong: got 0"),
        (lambda: Regressor(DataSpec((4,), "number"), target_mean="30"), "'target_mean' is wrong: got 30"),
    ],
)
def test_wrong_options_are_refused(build, message):
    with pytest.raises(TaskError) as caught:
        build()
    assert message in str(caught.value)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_and_option_is_documented(name):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    for option in list(inspect.signature(TASKS[name].build).parameters.values())[1:]:
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert f"`{option.name} = {shown}`" in row
