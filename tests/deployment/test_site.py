"""A client's own data: equal to what a simulation deals it, by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtrain.data.federated import build
from fedtrain.deployment.site import Owner, assemble, own_device
from fedtrain.deployment.terms import offer_for
from fedtrain.errors import DataError, InputError, PolicyError
from fedtrain.experiment.privacy import SamplePrivacy
from fedtrain.experiment.sections import Experiment
from fedtrain.link.control import Offer


def table(path: Path, rows: list[tuple[str, float, float, str]]) -> Path:
    path.write_text("hospital,age,dose,outcome\n" + "".join(f"{h},{a},{d},{o}\n" for h, a, d, o in rows))
    return path


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    rng = np.random.default_rng(1)
    rows = [
        ("north" if n % 3 else "south", float(rng.normal()), float(rng.normal()), "yes" if n % 2 else "no")
        for n in range(60)
    ]
    table(tmp_path / "all.csv", rows)
    for name in ("north", "south"):
        table(tmp_path / f"{name}.csv", [row for row in rows if row[0] == name])
    data = {"path": str(tmp_path / "all.csv"), "target": "outcome", "client_column": "hospital", "test": 0.2}
    return Experiment.model_validate(
        {"task": {"name": "logistic"}, "data": {**data, "partition": {"kind": "natural"}, "scaling": "client"}}
    )


def test_a_hospitals_own_file_is_its_share_of_the_pooled_one(tmp_path: Path, experiment: Experiment) -> None:
    pytest.importorskip("pyarrow")
    from fedtrain.deployment.site import _own_data

    pooled = build(experiment.data, None, tmp_path, experiment.seed)
    for name in ("north", "south"):
        own = _own_data(experiment, Owner(name, tmp_path / f"{name}.csv", tmp_path / "home"))
        assert own.spec == pooled.spec
        for part in ("train", "test"):
            theirs, ours = getattr(pooled.client(name), part), getattr(own.client(name), part)
            assert torch.equal(theirs.inputs, ours.inputs)
            assert torch.equal(theirs.targets, ours.targets)


def test_who_has_too_few_examples_takes_no_part(tmp_path: Path, experiment: Experiment) -> None:
    pytest.importorskip("pyarrow")
    south = Owner("south", tmp_path / "south.csv", tmp_path / "home")

    def offered(least: int) -> Offer:
        natural = experiment.data.partition.model_copy(update={"min_examples": least})
        data = experiment.data.model_copy(update={"partition": natural})
        return offer_for(experiment.model_copy(update={"data": data}), "0" * 32)

    assert assemble(south, offered(20)).facts["num_examples"] == 16  # 20 rows, of which a fifth is held out
    with pytest.raises(DataError, match=r"too few .* got 20; expected at least data.partition.min_examples = 21"):
        assemble(south, offered(21))


def test_a_share_is_taken_by_name(tmp_path: Path, experiment: Experiment) -> None:
    pytest.importorskip("pyarrow")
    offer = offer_for(experiment, "0" * 32)
    whole = assemble(Owner("north", tmp_path / "all.csv", tmp_path / "home", share=True), offer)
    assert whole.facts["num_examples"] == 32  # 40 rows, of which a fifth is held out
    with pytest.raises(DataError, match="no share"):
        assemble(Owner("west", tmp_path / "all.csv", tmp_path / "home", share=True), offer)


def test_classes_found_in_the_rows_are_not_told_where_examples_are_protected(
    tmp_path: Path, experiment: Experiment
) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("opacus")
    owner = Owner("north", tmp_path / "north.csv", tmp_path / "home", device="cpu")
    privacy = SamplePrivacy(unit="sample", noise_multiplier=1.0, delta=1e-5)
    data = experiment.data.model_copy(update={"scaling": "none", "test": 0.0})
    private = experiment.model_copy(update={"privacy": privacy, "data": data})
    with pytest.raises(DataError, match=r"data\.classes"):
        assemble(owner, offer_for(private, "0" * 32))
    data = data.model_copy(update={"classes": ["no", "yes", "unknown"]})
    found = assemble(owner, offer_for(private.model_copy(update={"data": data}), "0" * 32))
    assert found.facts["data"]["class_names"] == ["no", "yes", "unknown"]
    assert found.facts["data"]["num_classes"] == 3


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got --device cuda:99; expected .*Use --device cpu"):
        own_device(Owner("north", tmp_path, tmp_path, device="cuda:99"))


def test_code_that_the_owner_has_not_allowed_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nTask = None\n")
    wanted = Experiment.model_validate({"task": {"name": "mine.py:Task"}, "data": {"name": "digits", "clients": 3}})
    with pytest.raises(PolicyError):
        assemble(Owner("client-0", tmp_path, tmp_path / "home", base=tmp_path), offer_for(wanted, "0" * 32))
    assert not (tmp_path / "ran").exists()


def test_sizes_are_not_told_where_examples_are_protected(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    privacy = {"unit": "sample", "noise_multiplier": 1.0, "delta": 1e-5}
    fields = {"task": {"name": "logistic"}, "data": {"name": "digits", "clients": 3}, "privacy": privacy}
    found = assemble(
        Owner("client-0", tmp_path, tmp_path / "home"), offer_for(Experiment.model_validate(fields), "0" * 32)
    )
    assert found.facts["num_examples"] is None
