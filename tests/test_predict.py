from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from fedtrain.cli.progress import RunObserver
from fedtrain.data.federated import PartitionedData, build
from fedtrain.errors import DataError, InputError, RunFolderError, TaskError
from fedtrain.experiment import load
from fedtrain.predict import predictions
from fedtrain.simulations.run import Places, simulate
from fedtrain.tasks.registry import make_task

COMMON = """
[training]
batch_size = 8
[evaluation]
central_every = 0
[run]
workers = 0
device = "cpu"
"""


def finish(folder: Path, text: str) -> Path:
    """Run a small experiment to its end; its file lies beside the run's folder."""
    file = folder / "small.toml"
    file.write_text("rounds = 1\n" + text + COMMON)
    return simulate(load(file), Places(folder, folder / "run", None), RunObserver()).path


def table(run: Path, inputs: Path) -> list[dict[str, str]]:
    header, rows, _ = predictions(run, inputs)
    return [dict(zip(header, row, strict=True)) for row in rows]


def floats(rows: list[dict[str, str]], *columns: str) -> Tensor:
    return torch.tensor([[np.float32(row[column]) for column in columns] for row in rows])


def data_of(run: Path) -> PartitionedData:
    experiment = load(run.parent / "small.toml")
    return build(experiment.data, None, run.parent, experiment.seed)


@torch.inference_mode()
def outputs_in_training_order(run: Path) -> Tensor:
    """The model's outputs for all training rows, as the clients see them, in the order of the data's file."""
    data = data_of(run)
    inputs = torch.cat([data.client(name).train.inputs for name in data.client_ids()])
    model = make_task(load(run.parent / "small.toml").task, data.spec, run.parent).model()
    model.load_state_dict(safetensors.torch.load_file(run / "model.safetensors"))
    return model.eval()(inputs[torch.from_numpy(data.partition.indices).argsort()])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    return finish(folder, '[task]\nname = "logistic"\n[data]\nname = "digits"\nclients = 3\n')


def test_digits_from_an_array_and_from_images(digits: Path, tmp_path: Path) -> None:
    images = data_of(digits).dataset.inputs
    np.save(tmp_path / "all.npy", images.numpy())
    rows = table(digits, tmp_path / "all.npy")
    outputs = outputs_in_training_order(digits)
    assert [row["row"] for row in rows] == [str(number) for number in range(1, 1798)]
    assert [int(row["prediction"]) for row in rows] == outputs.argmax(1).tolist()
    torch.testing.assert_close(floats(rows, *(f"p({digit})" for digit in range(10))), outputs.softmax(1))
    for number in range(3):  # 16 grey levels, 17 apart, are told from each other in a picture
        Image.fromarray((images[number, 0] * 255).round().byte().numpy()).save(tmp_path / f"{number}.png")
    shown = table(digits, tmp_path)
    assert [row["row"] for row in shown] == ["0.png", "1.png", "2.png"]
    assert [row["prediction"] for row in shown] == [row["prediction"] for row in rows[:3]]
    (alone,) = table(digits, tmp_path / "1.png")
    assert (alone["row"], alone["prediction"]) == ("1.png", shown[1]["prediction"])


def test_a_table_for_breast_cancer_and_its_single_logit(tmp_path: Path) -> None:
    from sklearn.datasets import load_breast_cancer

    run = finish(
        tmp_path, '[task]\nname = "logistic"\n[data]\nname = "breast-cancer"\nclients = 3\nscaling = "pooled"\n'
    )
    bunch = load_breast_cancer()
    lines = [bunch.feature_names[::-1], *bunch.data[:, ::-1].tolist()]
    (tmp_path / "new.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    rows = table(run, tmp_path / "new.csv")
    logits = outputs_in_training_order(run)
    assert logits.shape == (569, 1)
    torch.testing.assert_close(floats(rows, "p(benign)", "p(malignant)"), torch.cat([-logits, logits], 1).sigmoid())
    assert [row["prediction"] == "malignant" for row in rows] == (logits[:, 0] > 0).tolist()


PEOPLE = "".join(
    f"{40 + i},{'red' if i % 3 else 'blue'},{'' if i % 4 else i},{i * 0.5},town{i % 2}\n" for i in range(12)
)


@pytest.mark.parametrize(
    "scaling",
    ['"none"', '"pooled"', "{ mean = [45, 0.5, 0.5, 5], std = [3, 0.5, 0.5, 4] }"],
    ids=["none", "pooled", "given"],
)
def test_a_number_for_a_users_table_to_the_last_bit(tmp_path: Path, scaling: str) -> None:
    (tmp_path / "people.csv").write_text("age,colour,income,score,town\n" + PEOPLE)
    run = finish(
        tmp_path,
        '[task]\nname = "regressor"\n[data]\npath = "people.csv"\ntarget = "score"\nclient_column = "town"\n'
        f'partition = {{ kind = "natural" }}\nmissing = "zero"\nscaling = {scaling}\n',
    )
    expected = outputs_in_training_order(run)
    (tmp_path / "people.csv").unlink()
    cells = [line.split(",") for line in PEOPLE.splitlines()]
    new = "income,age,colour\n" + "".join(f"{income},{age},{colour}\n" for age, colour, income, *_ in cells)
    (tmp_path / "new.csv").write_text(new)
    rows = table(run, tmp_path / "new.csv")
    assert rows[0].keys() == {"row", "prediction"}
    assert torch.equal(floats(rows, "prediction")[:, 0], expected)


def test_rows_that_are_scaled_by_themselves_are_told_of_and_any_delimiter_is_read(
    tmp_path: Path, fedtrain: Callable[..., Any]
) -> None:
    (tmp_path / "people.csv").write_text("age;colour;income;score;town\n" + PEOPLE.replace(",", ";"))
    run = finish(
        tmp_path,
        '[task]\nname = "regressor"\n[data]\npath = "people.csv"\ntarget = "score"\nclient_column = "town"\n'
        'partition = { kind = "natural" }\nscaling = "client"\noptions = { delimiter = ";" }\n',
    )
    rows = [line.split(",")[:3] for line in PEOPLE.splitlines()]
    printed = []
    for mark in ";,\t":
        lines = [mark.join(row) for row in [["age", '"colour"', "income"], *rows]]
        (tmp_path / "new.csv").write_text("\ufeff" + "\n".join(lines))
        printed.append(fedtrain("predict", run, tmp_path / "new.csv"))
    assert {result.code for result in printed} == {0}
    assert len({result.out for result in printed}) == 1
    assert printed[0].err.startswith("note: these 12 rows are scaled by their own mean and deviation")


def test_names_of_classes_and_files_cannot_steer_the_terminal(tmp_path: Path, fedtrain: Callable[..., Any]) -> None:
    for label, grey in (("cat", 10), ("dog\x1b[31m", 200)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (4, 4), grey + number).save(tmp_path / "pictures" / label / f"{number}\x1b,.png")
    run = finish(tmp_path, '[task]\nname = "mlp"\n[data]\npath = "pictures"\nclients = 1\n')
    result = fedtrain("predict", run, tmp_path / "pictures")
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    header, *rows = csv.reader(io.StringIO(result.out))
    assert header == ["row", "prediction", "p(cat)", r"p(dog\x1b[31m)"]
    assert [row[0] for row in rows][3:5] == [r"cat/3\x1b,.png", r"dog\x1b[31m/0\x1b,.png"]


LETTERS = """
import torch
from fedtrain.data.base import Dataset, DataSpec

def letters():
    tokens = torch.arange(90).reshape(10, 9) % 3
    spec = DataSpec((8,), "tokens", 3, class_names=("a", "b", "\\n"))
    return Dataset("letters", spec, tokens[:, :8], tokens[:, 1:])
"""


def test_the_likeliest_next_characters_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "letters.py").write_text(LETTERS)
    run = finish(
        tmp_path,
        '[task]\nname = "char-lstm"\noptions = { hidden = 4 }\n[data]\nname = "letters.py:letters"\nclients = 1\n',
    )
    expected = outputs_in_training_order(run)[:, -1].softmax(1).sort(descending=True)
    (tmp_path / "letters.py").unlink()
    tokens = np.arange(90).reshape(10, 9)[:, :8] % 3
    (tmp_path / "new.txt").write_text("".join("ab\n"[token] for token in tokens[1]))
    rows = table(run, tmp_path / "new.txt")
    assert [(row["row"], row["rank"]) for row in rows] == [("new.txt", "1"), ("new.txt", "2"), ("new.txt", "3")]
    assert [row["prediction"] for row in rows] == [("a", "b", r"\n")[token] for token in expected.indices[1]]
    torch.testing.assert_close(floats(rows, "p")[:, 0], expected.values[1])
    np.savez(tmp_path / "new.npz", tokens)
    rows = table(run, tmp_path / "new.npz")
    assert [row["row"] for row in rows] == [str(row) for row in range(1, 11) for _ in range(3)]
    torch.testing.assert_close(floats(rows, "p")[:, 0], expected.values.flatten())


OWN = """
from torch import nn
from fedtrain.tasks import Classification

class Own(Classification):
    def __init__(self, spec):
        self.spec = spec
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
"""


def test_the_code_of_an_own_task_is_found_where_it_was_or_here(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    run = finish(tmp_path, '[task]\nname = "own.py:Own"\n[data]\nname = "digits"\nclients = 2\n')
    np.save(tmp_path / "new.npy", np.ones((2, 1, 8, 8)))
    before = table(run, tmp_path / "new.npy")
    assert len(before) == 2
    here = tmp_path / "here"
    here.mkdir()
    shutil.move(tmp_path / "own.py", here)
    for module in [name for name in sys.modules if name.startswith("_fedtrain_own_")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(TaskError, match=rf"own task is not here: got own.py:Own; expected own.py in {tmp_path} or"):
        predictions(run, tmp_path / "new.npy")
    monkeypatch.chdir(here)
    assert table(run, tmp_path / "new.npy") == before


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("x.flatten(1)[:, :3]", r"do not suit the target: got shape \(2, 3\); expected \(2, 10\)"),
        ("x.flatten(1)[:, :10] * float('nan')", "no finite number for row 1"),
        ("1 / 0", "applying the model failed at .*own.py, line .*ZeroDivisionError"),
    ],
)
def test_a_model_that_gives_something_else_is_named(tmp_path: Path, digits: Path, forward: str, message: str) -> None:
    run = shutil.copytree(digits, tmp_path / "run")
    (tmp_path / "own.py").write_text(
        OWN + f"\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.fc1 = nn.Linear(64, 10)\n    def forward(self, x):\n        return {forward}\n"
        "Own.model = lambda self: Net()\n"
    )
    text = (run / "experiment.toml").read_text()
    (run / "experiment.toml").write_text(text.replace('name = "logistic"', f'name = "{tmp_path}/own.py:Own"'))
    np.save(tmp_path / "new.npy", np.zeros((2, 1, 8, 8)))
    with pytest.raises(InputError, match=message):
        predictions(run, tmp_path / "new.npy")


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: edit(run / "manifest.json", '"complete"', '"interrupted"'),
            "no final model yet: got status interr.*it goes on where it was$",
        ),
        (
            lambda run: edit(run / "manifest.json", '"complete"', '"failed"'),
            "got status failed.*it goes on where it was, once what it failed of is mended",
        ),
        (lambda run: (run / "model.safetensors").unlink(), "model.safetensors is missing, damaged or changed"),
        (lambda run: (run / "model.safetensors").write_bytes(b"other"), "is missing, damaged or changed: got SHA-256"),
        (lambda run: (run / "preparation.json").unlink(), "preparation.json is missing, damaged"),
        (lambda run: edit(run / "preparation.json", '"float32"', '"float16"'), "preparation.json is missing, damaged"),
        (lambda run: edit(run / "experiment.toml", '"logistic"', '"mlp"'), "the task's code has changed"),
        (lambda run: (run / "manifest.json").unlink(), "not a run's folder"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(
    tmp_path: Path, digits: Path, damage: Callable[[Path], object], message: str
) -> None:
    run = shutil.copytree(digits, tmp_path / "run")
    damage(run)
    np.save(tmp_path / "new.npy", np.zeros((1, 1, 8, 8)))
    with pytest.raises(RunFolderError, match=message):
        predictions(run, tmp_path / "new.npy")


def test_the_command_writes_a_file_whole_or_not_at_all(
    digits: Path, tmp_path: Path, fedtrain: Callable[..., Any]
) -> None:
    np.save(tmp_path / "new.npy", np.zeros((2, 1, 8, 8)))
    printed = fedtrain("predict", digits, tmp_path / "new.npy").out
    assert printed.startswith("row,prediction,p(0),")
    assert fedtrain("predict", digits, tmp_path / "new.npy", "--out", tmp_path / "p.csv").out == ""
    assert (tmp_path / "p.csv").read_text() == printed
    result = fedtrain("predict", digits, tmp_path / "new.npy", "--out", tmp_path / "nowhere/p.csv")
    assert (result.code, result.out) == (2, "")
    assert "cannot write" in result.err
    result = fedtrain("predict", digits, tmp_path / "nowhere.csv", "--out", tmp_path / "p.csv")
    assert (result.code, result.out) == (2, "")
    assert "no such input" in result.err
    assert (tmp_path / "p.csv").read_text() == printed


def test_large_inputs_go_through_in_batches(digits: Path, tmp_path: Path) -> None:
    run = shutil.copytree(digits, tmp_path / "run")
    edit(run / "experiment.toml", "batch_size = 250", "batch_size = 3")
    np.save(tmp_path / "new.npy", np.linspace(0, 1, 8 * 64).reshape(8, 1, 8, 8))
    columns = [f"p({digit})" for digit in range(10)]
    whole, parts = (floats(table(folder, tmp_path / "new.npy"), *columns) for folder in (digits, run))
    torch.testing.assert_close(parts, whole)


def test_predictions_need_inputs_of_the_trained_kind(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match=r"does not take such an input: got new\.csv; expected an image"):
        predictions(digits, tmp_path / "new.csv")
