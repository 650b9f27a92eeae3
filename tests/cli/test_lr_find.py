import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from fedtrain.cli.lr_find import lr_find
from fedtrain.errors import InputError, MissingExtraError

SHORT = ("--from", "1e-3", "--to", "10", "--steps", "20")


@pytest.fixture
def find(tiny: Path) -> Callable[..., Result]:
    """The command on the small experiment, as it stands in the app."""
    app = typer.Typer()
    app.command()(lr_find)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(tiny), *map(str, arguments)], catch_exceptions=False)

    return run


def test_it_shows_the_curve_and_suggests_a_rate(find: Callable[..., Result], tiny: Path) -> None:
    shown = find(*SHORT).output.splitlines()
    assert shown[0].startswith("tiny: sgd on client-")
    assert shown[2].split() == ["rate", "loss"]
    assert shown[3].split()[0] == "1.00e-03"
    assert set(shown[3].split()[2]) == {"#"}
    assert any(line.startswith("Try training.optimizer.lr = ") for line in shown)
    assert list(tiny.parent.iterdir()) == [tiny], "nothing is written"


def test_json_has_all_numbers(find: Callable[..., Result]) -> None:
    found = json.loads(find(*SHORT, "--clients", 2, "--json").output)
    assert len(found["clients"]) == 2
    assert len(found["rates"]) == len(found["losses"]) == len(found["smoothed"])
    assert found["steepest"] in found["rates"]
    assert found["least"] in found["rates"]


def test_it_draws_and_writes_a_table(find: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown = find(*SHORT, "--out", tmp_path / "lr.svg").output
    assert shown.endswith(f"Picture: {tmp_path}/lr.svg\nNumbers: {tmp_path}/lr.csv\n")
    assert "falls fastest: " in (tmp_path / "lr.svg").read_text()
    with (tmp_path / "lr.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["rate"]) == 1e-3
    assert rows[0].keys() == {"rate", "loss", "smoothed"}


def test_without_matplotlib_text_and_table_are_there(
    find: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fedtrain\[report\]'"):
        find(*SHORT, "--out", tmp_path / "lr.svg")
    assert (tmp_path / "lr.csv").exists()


@pytest.mark.parametrize(
    ("out", "message"), [("lr.html", r"expected a name that ends in \.png"), ("no/lr.svg", "folder")]
)
def test_a_picture_that_cannot_be_written_is_refused_before(out: str, message: str, find, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        find(*SHORT, "--out", tmp_path / out)


def test_options_that_do_not_fit_are_refused(find: Callable[..., Result]) -> None:
    with pytest.raises(InputError, match="no such option: got alpah"):
        find(*SHORT, "--set", 'training.optimizer={name="rmsprop", options={alpah=1}}')
