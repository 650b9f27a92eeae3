from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
from pathlib import Path

import pytest

from fedtrain.errors import DataError, TaskError
from fedtrain.importing import load_object, raised

OWN = """
from dataclasses import dataclass

@dataclass
class Own:
    size: int = 3
"""


@pytest.fixture(autouse=True)
def _search_path_is_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def failure(reference: str, base: Path) -> str:
    with pytest.raises(TaskError) as caught:
        load_object(reference, base, TaskError)
    return str(caught.value)


def test_an_installed_module():
    assert load_object("fedtrain.errors:TaskError", Path(), DataError) is TaskError


def test_a_module_of_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "nearby_module.py").write_text("VALUE = 7")
    monkeypatch.chdir(tmp_path)
    assert load_object("nearby_module:VALUE", Path("/"), DataError) == 7


def test_a_file_here_cannot_replace_an_installed_package(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("rgb_to_hsv = 'shadowed'")
    monkeypatch.chdir(tmp_path)
    assert load_object("colorsys:rgb_to_hsv", tmp_path, DataError) != "shadowed"


def test_a_file_is_relative_to_the_experiment_and_loaded_once(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = load_object("own.py:Own", tmp_path, TaskError)
    assert own().size == 3
    assert load_object(f"{tmp_path / 'own.py'}:Own", Path("/"), TaskError) is own
    assert pickle.loads(pickle.dumps(own(5))) == own(5)


def test_files_of_one_name_do_not_clash(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "own.py").write_text(f"VALUE = {number}")
    assert [load_object(f"{number}/own.py:VALUE", tmp_path, TaskError) for number in (1, 2)] == [1, 2]


def test_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "layers_beside.py").write_text("WIDTH = 9")
    (tmp_path / "own.py").write_text("from layers_beside import WIDTH")
    assert load_object("own.py:WIDTH", tmp_path, TaskError) == 9


def test_a_spawned_worker_loads_the_same(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = load_object("own.py:Own", tmp_path, TaskError)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(load_object, ("own.py:Own", tmp_path, TaskError))
        assert pool.apply(repr, (own(4),)) == "Own(size=4)"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\ndef f(:\n    pass", "own.py, line 2: SyntaxError: invalid syntax"),
        ("import json\njson.loads('{')", "own.py, line 2: JSONDecodeError: Expecting property name"),
        ("import not_installed", "own.py, line 1: ModuleNotFoundError: No module named 'not_installed'"),
        ("raise SystemExit(3)", "own.py, line 1: SystemExit: 3"),
        ("raise ValueError('first\\nsecond')", "ValueError: first second"),
        ("class Onw: ...", "own.py defines no 'Own': got own.py:Own. Did you mean Onw?"),
    ],
)
def test_a_faulty_file_is_one_line(tmp_path, code, message):
    (tmp_path / "own.py").write_text(code)
    text = failure("own.py:Own", tmp_path)
    assert message in text
    assert "\n" not in text


def test_a_corrected_file_loads_after_a_failure(tmp_path):
    (tmp_path / "own.py").write_text("Own = 1 / 0  # a longer line, so that no cached bytecode fits")
    failure("own.py:Own", tmp_path)
    (tmp_path / "own.py").write_text("Own = 1")
    assert load_object("own.py:Own", tmp_path, TaskError) == 1


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("missing.py:Own", "there is no such Python file: got {base}/missing.py. Paths are relative"),
        ("no_such_package.module:Own", "there is no module 'no_such_package': got no_such_package.module"),
        ("fedtrain.no_such_module:Own", "there is no module 'fedtrain.no_such_module'"),
        ("own.py", 'got own.py; expected "package.module:Name" or "file.py:Name"'),
        ("own.py:", "names no class or function"),
        (":Own", "names no class or function"),
    ],
)
def test_a_wrong_reference(tmp_path, reference, message):
    assert message.format(base=tmp_path)[:60] in failure(reference, tmp_path)


def test_the_users_line_is_for_the_user_to_correct(tmp_path):
    (tmp_path / "own.py").write_text("def own():\n    raise ValueError('too small.')")
    with pytest.raises(ValueError, match="too small") as caught:
        load_object("own.py:own", tmp_path, TaskError)()
    told = str(raised("trying it", caught.value, TaskError))
    assert told.endswith("own.py, line 2: ValueError: too small. Correct that line and start again")


def test_a_librarys_line_is_not():
    with pytest.raises(ValueError, match="Expecting value") as caught:
        json.loads("[")
    assert caught.value.__traceback__ is not None
    error = caught.value.with_traceback(caught.value.__traceback__.tb_next)
    assert "That is a library's line: look at what it is given" in str(raised("trying it", error, TaskError))
