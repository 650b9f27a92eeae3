from __future__ import annotations

from pathlib import Path

import pytest

from fedtrain.errors import ExperimentError, InputError
from fedtrain.sweep.grid import Axis, axis, grid

FILE = """
seed = 3
[data]
name = "digits"
clients = 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "digits.toml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lr=0.1,0.3", ("0.1", "0.3")),
        ("lr = 0.1 , 0.3 ", ("0.1", "0.3")),
        ("lr=0.1,0.1", ("0.1",)),
        ("name=fedavg,fedprox", ("fedavg", "fedprox")),
        ('name=["fedavg", "fedprox"]', ('"fedavg"', '"fedprox"')),
        ("hidden=[[64], [64, 32]]", ("[64]", "[64, 32]")),
        ("s={name='a',mu=1},{name='b',c=[1,2]}", ("{name='a',mu=1}", "{name='b',c=[1,2]}")),
        ("pair=[0.5,0.9],[0.9,0.99]", None),
        ('target="a,b",c', ('"a,b"', "c")),
        ("key={a='}',b=1},2", ("{a='}',b=1}", "2")),
    ],
)
def test_values_stand_between_commas_or_in_an_array(text: str, values: tuple[str, ...] | None) -> None:
    if values is None:
        with pytest.raises(InputError, match="no TOML array"):
            axis(text)
    else:
        assert axis(text).values == values


@pytest.mark.parametrize("text", ["lr", "lr=", "=1", "lr=1,,2", "lr=[]", "lr=[1"])
def test_what_names_no_values_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        axis(text)


def test_a_grid_is_every_combination_with_every_seed(file: Path) -> None:
    trials = grid(
        file, [axis("strategy.name=fedavg,fedprox"), axis("training.optimizer.lr=0.1,0.3"), axis("rounds=5")], 2
    )
    assert [trial.label for trial in trials] == [
        "strategy.name=fedavg, training.optimizer.lr=0.1",
        "strategy.name=fedavg, training.optimizer.lr=0.3",
        "strategy.name=fedprox, training.optimizer.lr=0.1",
        "strategy.name=fedprox, training.optimizer.lr=0.3",
    ]
    assert {tuple(e.seed for e in trial.experiments) for trial in trials} == {(3, 4)}
    assert {e.rounds for trial in trials for e in trial.experiments} == {5}
    assert trials[2].experiments[0].strategy.name == "fedprox"


def test_values_are_set_in_the_order_in_which_they_were_given(file: Path) -> None:
    (trial,) = grid(file, [axis("strategy={name='fedprox'}"), axis("strategy.mu=0.5")], 1)
    assert trial.experiments[0].strategy.mu == 0.5


def test_the_faults_of_all_combinations_are_told_at_once(file: Path) -> None:
    with pytest.raises(ExperimentError) as caught:
        grid(file, [axis("training.optimizer.lr=0.1,-1,-2"), axis("strategy.name=fedavg,fedavgg")], 2)
    assert sorted(fault.path for fault in caught.value.faults) == [
        "strategy.name",
        "training.optimizer.lr",
        "training.optimizer.lr",
    ]


def test_what_contradicts_itself_or_is_too_much_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match="set twice: got rounds"):
        grid(file, [axis("rounds=1"), axis("rounds=2")], 1)
    with pytest.raises(InputError, match="--seeds and --set seed"):
        grid(file, [axis("seed=1,2")], 2)
    many = tuple(map(str, range(1, 200)))
    with pytest.raises(InputError, match="too many runs: got 39601"):
        grid(file, [Axis("rounds", many), Axis("training.batch_size", many)], 1)


def test_a_runs_folder_follows_from_its_experiment(file: Path, tmp_path: Path) -> None:
    one, other = grid(file, [axis("training.optimizer.lr=0.1,0.3")], 2)
    folders = one.folders(tmp_path) + other.folders(tmp_path)
    assert len(set(folders)) == 4
    assert folders[1].name.startswith("0.1-seed4-")
    folders[0].mkdir()
    (wider, *_) = grid(file, [axis("training.optimizer.lr=0.1,0.3,0.5"), axis("strategy.name=fedavg,fedprox")], 2)
    assert wider.folders(tmp_path)[0] == folders[0]
    assert wider.folders(tmp_path)[1].name.startswith("0.1-fedavg-seed4-")


def test_hostile_values_stay_inside_the_folder(file: Path, tmp_path: Path) -> None:
    trials = grid(file, [axis('task.name=["../../x", "/etc/passwd", "a\\u001b[2J"]')], 1)
    assert {folder.parent for trial in trials for folder in trial.folders(tmp_path)} == {tmp_path}


def test_combinations_that_are_one_experiment_are_refused(file: Path) -> None:
    with pytest.raises(InputError, match=r"the same experiment.*run.threads=1; run.threads=2"):
        grid(file, [axis("run.threads=1,2")], 2)
