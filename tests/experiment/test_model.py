import re
import tomllib

import pytest
from pydantic import ValidationError

from fedtrain.errors import ExperimentError
from fedtrain.experiment import Experiment, load, to_toml
from fedtrain.experiment.model import LoraSection, ModelSection, VarianceInit, objections

BASE = '[data]\nname = "digits"\nclients = 4\n'


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "first.toml"
    path.write_text(BASE)
    return path


def test_nothing_is_changed_unless_asked(file):
    model = load(file).model
    assert model == ModelSection()
    assert (model.init.name, model.files) == ("task", [])


def test_a_full_section_survives_a_round_trip(file):
    file.write_text(
        BASE
        + """
[model]
init = { name = "he", distribution = "uniform", gain = 0.5 }
start = "start.safetensors"
drop = ["fc2.*"]
rename = { "encoder." = "" }
unfreeze = { "fc1.*" = 5 }
lora = { rank = 4, alpha = 8.0, layers = ["fc1"], train = ["fc2.*"], dropout = 0.1 }
"""
    )
    model = load(file).model
    assert model.init == VarianceInit(name="he", distribution="uniform", gain=0.5)
    assert model.lora == LoraSection(rank=4, alpha=8.0, layers=["fc1"], train=["fc2.*"], dropout=0.1)
    assert ModelSection.model_validate(tomllib.loads(to_toml(load(file)))["model"]) == model


@pytest.mark.parametrize(
    ("override", "got"),
    [
        ('model.init.name="kaiming"', "model.init.name: got"),
        ("model.init.gain=2", "gain goes with name = xavier, he, lecun or orthogonal"),
        ('model.init={name="orthogonal", distribution="normal"}', "model.init.distribution: got an unknown key"),
        ('model.init={name="he", gain=0}', "model.init.gain: got 0; expected a number greater than 0"),
        ("model.lora.rank=0", "model.lora.rank: got 0; expected an integer of at least 1"),
        ("model.lora.layers=[]", "model.lora.layers: got []"),
        ("model.lora.dropout=1", "model.lora.dropout: got 1"),
        ('model.unfreeze={"fc1.*"=0}', "model.unfreeze"),
    ],
)
def test_a_wrong_value_is_named(file, override, got):
    with pytest.raises(ExperimentError, match=re.escape(got)):
        load(file, [override])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"drop": ["fc1.*"]}, "drop and rename go with start"),
        ({"rename": {"a": "b"}}, "drop and rename go with start"),
        ({"start": "a.safetensors", "init": {"name": "lsuv"}}, 'start brings the layers that gains and init.name = "l'),
        ({"start": "a.safetensors", "gains": "gains.csv"}, "start brings the layers"),
        ({"freeze": ["fc1.*"], "lora": {}}, "lora freezes all but the adapters"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(model, why):
    with pytest.raises(ValidationError, match=re.escape(why)):
        ModelSection.model_validate(model)


def test_training_must_begin_before_the_run_ends():
    fields = {"data": {"name": "digits", "clients": 3}, "rounds": 4}
    on_time = Experiment.model_validate({**fields, "model": {"unfreeze": {"fc1.*": 4}}})
    assert list(objections(on_time)) == []
    late = on_time.model_copy(update={"rounds": 3})
    (sentence,) = objections(late)
    assert 'model.unfreeze would train "fc1.*" after the last of rounds = 3' in sentence


def test_without_files_the_shape_of_the_model_stays():
    section = ModelSection(start="a.safetensors", drop=["x"], rename={"a": "b"}, lora=LoraSection())
    assert section.without_files() == ModelSection(lora=LoraSection())
