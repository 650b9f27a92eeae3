"""Initial weights: their variances against the papers' formulas, computed by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import FedtrainError, InputError, TaskError
from fedtrain.experiment.model import LsuvInit, OrthogonalInit, TaskInit, VarianceInit
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.initialization import initialize, scale_by_gains

WIDE = DataSpec((300,), "class", 5)
IMAGES = DataSpec((3, 8, 8), "class", 9)
NAMED = DataSpec((3,), "class", 2, ("age", "dose", "site"))


def drawn(model: nn.Module, section, spec: DataSpec = WIDE, seed: int = 1) -> nn.Module:
    with global_torch_seed(seed, "test"):
        initialize(model, section, spec)
    return model.requires_grad_(False)  # to read numbers from it


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize(("name", "variance"), [("xavier", 2 / 500), ("he", 2 / 300), ("lecun", 1 / 300)])
def test_the_variance_is_the_formulas(name, variance, distribution):
    section = VarianceInit(name=name, distribution=distribution, gain=3.0)
    layer = drawn(nn.Linear(300, 200), section)
    deviation = 3 * math.sqrt(variance)
    assert float(layer.weight.std()) == pytest.approx(deviation, rel=0.02)
    assert float(layer.weight.mean()) == pytest.approx(0, abs=0.02 * deviation)
    assert not layer.bias.any()
    beyond = float(layer.weight.abs().max()) / deviation
    assert beyond == pytest.approx(math.sqrt(3), rel=0.01) if distribution == "uniform" else beyond > 3


@pytest.mark.parametrize(
    ("layer", "inputs", "outputs"),
    [
        (nn.Conv2d(20, 30, 5), 500, 750),
        (nn.Conv2d(20, 40, 5, groups=4), 125, 1000),
        (nn.Conv1d(90, 60, 3), 270, 180),
        (nn.ConvTranspose2d(20, 30, 5), 500, 750),
    ],
)
def test_a_convolutions_fans_count_its_field(layer, inputs, outputs):
    drawn(layer, VarianceInit(name="he"))
    assert float(layer.weight.var()) == pytest.approx(2 / inputs, rel=0.05)
    drawn(layer, VarianceInit(name="xavier"))
    assert float(layer.weight.var()) == pytest.approx(2 / (inputs + outputs), rel=0.05)


@pytest.mark.parametrize(("shape", "short"), [((40, 60), 0), ((60, 40), 1)])
def test_orthogonal_rows_or_columns_have_the_length_of_the_gain(shape, short):
    weight = drawn(nn.Linear(*reversed(shape)), OrthogonalInit(name="orthogonal", gain=2.0)).weight
    product = weight @ weight.T if short == 0 else weight.T @ weight
    torch.testing.assert_close(product, 4 * torch.eye(40), atol=1e-4, rtol=0)


class Gated(nn.Module):
    """Two gates' matrices in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked = {"inputs": 2}
        self.inputs = nn.Linear(30, 60)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.LSTM(30, 30, num_layers=2), ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1"]),
        (nn.LSTM(30, 30, proj_size=10), ["weight_ih_l0"]),
        (nn.GRU(30, 30), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.LSTMCell(30, 30), ["weight_hh"]),
        (nn.MultiheadAttention(30, 2), ["in_proj_weight", "out_proj.weight"]),
        (Gated(), ["inputs.weight"]),
    ],
)
def test_matrices_of_one_weight_are_drawn_each_by_itself(model, names):
    drawn(model, OrthogonalInit(name="orthogonal"))
    parameters = dict(model.named_parameters())
    for name in names:
        for matrix in parameters[name].split(30):
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(30), atol=1e-4, rtol=0)
    assert not any(p.any() for name, p in parameters.items() if "bias" in name)
    drawn(model, VarianceInit(name="xavier"))
    assert float(parameters[names[0]].var()) == pytest.approx(2 / 60, rel=0.12)


def test_other_layers_stay_and_the_seed_decides():
    def model() -> nn.Module:
        with global_torch_seed(0, "test"):
            return nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    one, same, other = (drawn(model(), VarianceInit(name="he"), seed=seed) for seed in (1, 1, 2))
    for name, p in model().named_parameters():
        changed = not torch.equal(p, one.get_parameter(name))
        assert changed == name.startswith("2.")
        assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one[2].weight, other[2].weight)
    drawn(other, TaskInit())
    assert torch.equal(other[2].weight, drawn(model(), VarianceInit(name="he"), seed=2)[2].weight)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(TaskError, match=r'model\.init\.name = "he"'):
        drawn(nn.Sequential(nn.Embedding(5, 8)), VarianceInit(name="he"))


@pytest.mark.parametrize(
    ("layers", "spec"),
    [
        ([nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 40), nn.Tanh()], DataSpec((20,), "class", 9)),
        ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.Flatten(), nn.Linear(288, 20)], IMAGES),
        ([nn.Embedding(9, 6), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9)], DataSpec((7,), "tokens", 9)),
    ],
)
def test_lsuv_gives_each_layer_outputs_of_variance_one(layers, spec):
    model = nn.Sequential(*layers)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    drawn(model, LsuvInit(name="lsuv"), spec)
    assert model.training
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    rng = torch.Generator().manual_seed(5)
    shape = (2000, *spec.input_shape)
    value = torch.randint(9, shape, generator=rng) if spec.target == "tokens" else torch.randn(shape, generator=rng)
    model.eval()
    for layer in model:
        value = layer(value)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert float(value.var()) == pytest.approx(1, rel=0.1)


def test_lsuv_says_that_a_model_cannot_take_random_inputs():
    with pytest.raises(TaskError, match=r'model\.init\.name = "lsuv" failed'):
        drawn(nn.Linear(4, 2), LsuvInit(name="lsuv"))


def gains(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gains.csv"
    path.write_text(text)
    return path


def test_gains_scale_the_first_layer_at_mean_square_one(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.Linear(4, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale_by_gains(model, gains(tmp_path, "feature,gain\ndose,2\nage,1\nsite,0\n"), NAMED)
    factors = torch.tensor([1.0, 2.0, 0.0]) / math.sqrt(5 / 3)
    torch.testing.assert_close(model[1].weight, before["1.weight"] * factors)
    for name in ("1.bias", "2.weight", "2.bias"):
        assert torch.equal(model.get_parameter(name), before[name])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("feature,gain\nage,1\ndose,1\n", "it lacks site"),
        ("feature,gain\nage,1\ndose,1\nsite,1\nweight,1\n", "it has unknown weight"),
        ("feature,gain\nage,1\nage,1\n", "names a feature twice: got age"),
        ("feature,gain\nage,-1\n", "the gain of age is wrong: got -1"),
        ("feature,gain\nage,nan\n", "the gain of age is wrong: got nan"),
        ("feature,gain\nage\n", "the gain of age is wrong: got nothing"),
        ("feature,gain\nage,0\ndose,0\nsite,0\n", "to zero"),
        ("name,gain\n", "expected the columns feature and gain"),
        ("", "expected the columns feature and gain"),
    ],
)
def test_a_wrong_table_of_gains_is_named(tmp_path, text, why):
    with pytest.raises(InputError, match=why):
        scale_by_gains(nn.Linear(3, 2), gains(tmp_path, text), NAMED)


def test_gains_need_their_file_and_features_with_names(tmp_path):
    with pytest.raises(InputError, match=r"model\.gains cannot be read \(No such file"):
        scale_by_gains(nn.Linear(3, 2), tmp_path / "none.csv", NAMED)
    for model, spec in ((nn.Linear(3, 2), DataSpec((3,), "class", 2)), (nn.Linear(4, 2), NAMED), (nn.ReLU(), NAMED)):
        with pytest.raises(FedtrainError, match=r"model\.gains needs features with names"):
            scale_by_gains(model, tmp_path / "none.csv", spec)
