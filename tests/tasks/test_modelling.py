"""What `[model]` makes of a task's model: where it starts, and what of it is trained."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedtrain.data.base import DataSpec
from fedtrain.errors import InputError, TaskError
from fedtrain.experiment.model import ModelSection
from fedtrain.params import exchanged
from fedtrain.seeds import global_torch_seed
from fedtrain.tasks.modelling import adapt, digests, trains_in

SPEC = DataSpec((4,), "class", 3)
CASES = {"fc1.weight": (5, 4), "fc1.bias": (5,), "fc2.weight": (3, 5), "fc2.bias": (3,)}


def perceptron(seed: int = 1) -> nn.Sequential:
    with global_torch_seed(seed, "test"):
        model = nn.Sequential()
        model.add_module("fc1", nn.Linear(4, 5))
        model.add_module("relu", nn.ReLU())
        model.add_module("fc2", nn.Linear(5, 3))
        return model


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def adapted(model: nn.Module, base: Path = Path(), **fields: object) -> nn.Module:
    with global_torch_seed(2, "test"):
        return adapt(model, ModelSection.model_validate(fields), SPEC, base)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """The weights of another perceptron."""
    save_file(dict(perceptron(9).state_dict()), tmp_path / "start.safetensors")
    return tmp_path


def equal(one: nn.Module, other: nn.Module) -> set[str]:
    theirs = other.state_dict()
    return {name for name, t in one.state_dict().items() if name in theirs and torch.equal(t, theirs[name])}


def test_the_default_section_draws_nothing_and_changes_nothing():
    model = perceptron()
    with global_torch_seed(2, "test"):
        before = torch.get_rng_state()
        assert adapt(model, ModelSection(), SPEC, Path()) is model
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(model, perceptron()) == CASES.keys()
    assert all(p.requires_grad for p in model.parameters())
    assert trains_in(ModelSection(), "fc1.weight", 1)


def test_the_init_of_the_section_is_drawn_and_the_seed_decides():
    one, same = (adapted(perceptron(), init={"name": "he"}) for _ in range(2))
    assert equal(one, same) == CASES.keys()
    assert not equal(one, perceptron())


def test_gains_are_read_beside_the_experiment_file(tmp_path):
    (tmp_path / "gains.csv").write_text("feature,gain\na,0\nb,1\nc,1\nd,1\n")
    section = ModelSection(gains="gains.csv")
    model = adapt(perceptron(), section, DataSpec((4,), "class", 3, tuple("abcd")), tmp_path)
    assert not model.fc1.weight[:, 0].any()
    assert digests(section, tmp_path) == {
        "gains.csv": hashlib.sha256((tmp_path / "gains.csv").read_bytes()).hexdigest()
    }


def test_a_start_replaces_all_and_a_dropped_part_keeps_its_initial_values(start):
    assert equal(adapted(perceptron(), start, start="start.safetensors"), perceptron(9)) == CASES.keys()
    model = adapted(perceptron(), start, start="start.safetensors", drop=["fc2.*"])
    assert equal(model, perceptron(9)) == {"fc1.weight", "fc1.bias"}
    assert equal(model, perceptron()) == {"fc2.weight", "fc2.bias"}


def test_a_start_with_other_names_and_another_head(tmp_path):
    other = perceptron(9).state_dict()
    tensors = {
        "encoder.0.weight": other["fc1.weight"].half(),
        "encoder.0.bias": other["fc1.bias"].half(),
        "fc2.weight": torch.ones(7, 5),
        "fc2.bias": torch.ones(7),
        "projector.weight": torch.ones(2, 2),
    }
    save_file(tensors, tmp_path / "start.safetensors")
    fields = {"start": "start.safetensors", "rename": {"encoder.0.": "fc1."}}
    model = adapted(perceptron(), tmp_path, **fields, drop=["fc2.*", "projector.*"])
    torch.testing.assert_close(model.fc1.weight, other["fc1.weight"], atol=1e-3, rtol=0)
    assert equal(model, perceptron()) == {"fc2.weight", "fc2.bias"}
    why = (
        r"it has unknown projector\.weight; of another kind are fc2\.weight \(7, 5\) and not \(3, 5\), "
        r'fc2\.bias .*model\.drop = \["fc2\.\*", "projector\.\*"\]'
    )
    with pytest.raises(InputError, match=why):
        adapted(perceptron(), tmp_path, **fields)


def test_a_start_of_another_model_is_called_one_and_a_part_without_a_layer_is_named_alone(tmp_path):
    other = {name: torch.ones(7, 7) for name in perceptron().state_dict()}
    save_file(other, tmp_path / "start.safetensors")
    with pytest.raises(InputError, match=r"of another kind are fc1.*It is of another model.*model\.rename"):
        adapted(perceptron(), tmp_path, start="start.safetensors")
    save_file({**perceptron().state_dict(), "scale": torch.ones(1)}, tmp_path / "start.safetensors")
    with pytest.raises(InputError, match=r'it has unknown scale\..*model\.drop = \["scale"\]'):
        adapted(perceptron(), tmp_path, start="start.safetensors")


def test_a_start_that_lacks_much_is_refused_with_the_first_few(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "start.safetensors")
    why = r"it lacks fc1\.weight, fc1\.bias, fc2\.weight and 1 more; it has unknown x\..*model\.rename"
    with pytest.raises(InputError, match=why):
        adapted(perceptron(), tmp_path, start="start.safetensors")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "cannot be read"),
        (b"\xff" * 40, "cannot be read"),
        (b"\x08\0\0\0\0\0\0\0{} ] : 1 ", "cannot be read"),
    ],
)
def test_a_damaged_start_is_refused(tmp_path, content, why):
    if content is not None:
        (tmp_path / "start.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=why):
        adapted(perceptron(), tmp_path, start="start.safetensors")


def test_a_start_that_is_cut_short_or_not_finite_is_refused(start):
    file = start / "start.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="cannot be read"):
        adapted(perceptron(), start, start="start.safetensors")
    tensors = perceptron().state_dict()
    tensors["fc1.bias"][2] = torch.nan
    save_file(dict(tensors), file)
    with pytest.raises(InputError, match=r"not finite in fc1\.bias"):
        adapted(perceptron(), start, start="start.safetensors")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"drop": ["head.*"]}, r"got model\.drop = head\.\*"),
        ({"rename": {"encoder.": ""}}, r"got model\.rename = encoder\."),
        ({"rename": {"fc1.": "fc2."}}, "gives two tensors of the file one name: got fc2.bias"),
    ],
)
def test_what_fits_nothing_in_a_start_is_refused(start, fields, why):
    with pytest.raises(InputError, match=why):
        adapted(perceptron(), start, start="start.safetensors", **fields)


def test_tied_tensors_may_stand_in_a_start_once(tmp_path):
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    tensors = {"0.weight": torch.eye(4), "0.bias": torch.ones(4), "2.bias": torch.ones(4)}
    save_file(tensors, tmp_path / "start.safetensors")
    assert torch.equal(adapted(tied(), tmp_path, start="start.safetensors")[2].weight, torch.eye(4))


def test_adapters_stand_beside_a_start_that_has_none_or_come_from_one_that_has(start):
    model = adapted(perceptron(), start, start="start.safetensors", lora={"rank": 2})
    assert equal(model, perceptron(9)) == CASES.keys()
    assert not model.fc1.lora_b.weight.any()
    with torch.no_grad():
        model.fc1.lora_b.weight.fill_(0.5)
    save_file(dict(model.state_dict()), start / "start.safetensors")
    again = adapted(perceptron(), start, start="start.safetensors", lora={"rank": 2})
    assert equal(again, model) == model.state_dict().keys()
    with pytest.raises(InputError, match=r"trained with model\.lora"):
        adapted(perceptron(), start, start="start.safetensors")
    with pytest.raises(InputError, match=r"of another kind are fc1\.lora_a\.weight \(2, 4\) and not \(3, 4\)"):
        adapted(perceptron(), start, start="start.safetensors", lora={"rank": 3})


def test_what_is_frozen_does_not_travel():
    model = adapted(perceptron(), freeze=["fc1.*"])
    assert exchanged(model).keys() == {"fc2.weight", "fc2.bias"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"freeze": ["fc3.*"]}, r"got model\.freeze = fc3\.\*; expected .* among fc1\.weight, fc1\.bias, fc2\.weight"),
        ({"freeze": ["fc1.wieght"]}, r"Did you mean fc1\.weight\?"),
        ({"freeze": ["*"]}, r"model\.freeze leaves nothing to train"),
        ({"unfreeze": {"fc3.*": 2}}, r"got model\.unfreeze = fc3\.\*"),
        ({"freeze": ["fc1.*"], "unfreeze": {"fc1.*": 2}}, r"got model\.unfreeze = fc1\.\*; .* fc2\.weight, fc2\.bias"),
        ({"unfreeze": {"*": 2}}, r"model\.unfreeze leaves nothing to train in the first round: got \*"),
        ({"freeze": ["fc2.*"], "unfreeze": {"fc1.*": 2}}, r"leaves nothing to train in the first round"),
    ],
)
def test_patterns_that_fit_nothing_or_leave_nothing_are_refused(fields, why):
    with pytest.raises(TaskError, match=why):
        adapted(perceptron(), **fields)


def test_the_first_pattern_says_from_which_round_on_a_parameter_is_trained():
    section = ModelSection(unfreeze={"fc1.bias": 1, "fc1.*": 3})
    assert exchanged(adapt(perceptron(), section, SPEC, Path())).keys() == CASES.keys()
    trained = {number: [name for name in CASES if trains_in(section, name, number)] for number in (1, 2, 3)}
    assert trained == {1: ["fc1.bias", "fc2.weight", "fc2.bias"], 2: trained[1], 3: list(CASES)}


def test_frozen_batch_normalisation_keeps_its_statistics():
    frozen, trained = adapted(normed(), freeze=["0.*", "1.*"]), adapted(normed(), freeze=["0.*"])
    inputs = torch.randn(8, 4) + 3
    for model, moves in ((frozen, False), (trained, True)):
        before = model[1].running_mean.clone()
        model.train()(inputs)
        assert torch.equal(model[1].running_mean, before) != moves
    alone, together = frozen.train()(inputs[:1]), frozen.train()(inputs)[:1]
    torch.testing.assert_close(alone, together)  # no example changes another


def test_a_file_that_is_not_there_has_no_digest(tmp_path):
    with pytest.raises(InputError, match=r"a file of \[model\] cannot be read \(No such file"):
        digests(ModelSection(start="none.safetensors"), tmp_path)
