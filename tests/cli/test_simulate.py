import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain import __version__
from fedtrain.experiment import identity, load


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """File -> its hash and when it was last written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in files
    }


@pytest.fixture
def finished(fedtrain: Callable, tiny: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of `tiny`, with its report: made once, and copied."""
    original = tmp_path_factory.getbasetemp() / "finished"
    if not original.exists():
        assert fedtrain("simulate", tiny, "--out", original, "--quiet").code == 0
    return shutil.copytree(original, tmp_path / "finished")


def test_a_pipe_gets_plain_lines(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fedtrain("simulate", tiny, "--out", out)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == f"run {out}"
    assert re.fullmatch(r"round 0/4  test loss \d\.\d{4}  test accuracy \d\.\d{4}  \d+\.\d\d s", lines[1])
    for number in range(1, 4):
        assert re.fullmatch(
            rf"round {number}/4  train loss \S+  test loss \S+  test accuracy \S+  3 clients  \d\d\.\d kB  \S+ s",
            lines[1 + number],
        )
    assert "clients' accuracy" in lines[5]  # evaluated on the clients at the end, if never before
    assert lines[6].startswith("Trained mlp (610 parameters) on digits")
    assert lines[-2:] == [f"Results: {out}", f"Report:  {out / 'report.html'}"]
    files = {"experiment.toml", "manifest.json", "data.json", "rounds.jsonl", "model.safetensors", "report.html"}
    assert files < set(contents(out))


def test_quiet_prints_the_reports_path_alone(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    result = fedtrain("simulate", tiny, "--out", tmp_path / "out", "--quiet", "--set", "rounds=1")
    assert (result.code, result.out, result.err) == (0, f"{tmp_path / 'out' / 'report.html'}\n", "")


def test_json_is_one_event_per_line(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("simulate", tiny, "--out", out, "--json", "--set", "rounds=2")
    events = [json.loads(line) for line in fedtrain(*arguments).out.splitlines()]
    assert [event["event"] for event in events] == ["start", "round", "round", "round", "complete"]
    assert [event["round_number"] for event in events[1:4]] == [0, 1, 2]
    complete = {"event": "complete", "run": str(out), "report": str(out / "report.html"), "already": False}
    assert events[-1] == complete
    again = [json.loads(line) for line in fedtrain(*arguments).out.splitlines()]
    assert again[-1] == complete | {"already": True}


def test_a_run_whose_reader_is_gone_is_interrupted_and_goes_on(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedtrain", "simulate", tiny, "--out", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("run ")
        process.stdout.close()  # as `| head -1` does
        assert (process.stderr.read(), process.wait()) == ("", 1)
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    assert fedtrain("simulate", tiny, "--out", out, "--quiet").code == 0


def test_code_that_ends_the_program_is_named(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    tiny.with_name("own.py").write_text(
        "import sys\nfrom fedtrain.tasks.dense import Logistic\n\n"
        "class Own(Logistic):\n    def model(self):\n        sys.exit(0)\n"
    )
    result = fedtrain("simulate", tiny, "--out", tmp_path / "out", "--set", 'task={name="own.py:Own"}')
    assert (result.code, result.err) == (2, "fedtrain: the experiment's own code ended the program: got sys.exit(0)\n")
    assert not (tmp_path / "out").exists()


def test_a_complete_run_is_left_as_it_is(fedtrain: Callable, tiny: Path, finished: Path) -> None:
    before = contents(finished)
    result = fedtrain("simulate", tiny, "--out", finished)
    assert result.code == 0
    assert "This run is complete; nothing to do." in result.out
    assert contents(finished) == before


def test_a_lost_report_is_written_again(fedtrain: Callable, tiny: Path, finished: Path) -> None:
    before = contents(finished)
    (finished / "report.html").unlink()
    assert fedtrain("simulate", tiny, "--out", finished, "--quiet").code == 0
    assert contents(finished).keys() == before.keys()


def test_the_run_section_and_the_name_are_no_other_experiment(fedtrain: Callable, tiny: Path, finished: Path) -> None:
    result = fedtrain("simulate", tiny, "--out", finished, "--set", "run.threads=2", "--set", "name=other")
    assert result.code == 0
    assert "This run is complete" in result.out


def test_a_run_of_another_experiment_is_refused(fedtrain: Callable, tiny: Path, finished: Path) -> None:
    before = contents(finished)
    result = fedtrain("simulate", tiny, "--out", finished, "--set", "seed=4")
    assert result.code == 2
    assert "this folder holds a run of a different experiment, with other values of seed: got" in result.err
    assert "nothing was changed" in result.err
    assert contents(finished) == before


def test_a_folder_with_other_files_is_refused(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "out" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("dear")
    result = fedtrain("simulate", tiny, "--out", thesis.parent)
    assert result.code == 2
    assert "this folder holds other files" in result.err
    assert contents(thesis.parent).keys() == {"thesis.tex"}


def test_a_run_goes_to_its_name_and_hash(
    fedtrain: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["rounds=1", "training.optimizer.lr=0.2"]
    result = fedtrain("simulate", tiny.name, "--quiet", *(part for change in changes for part in ("--set", change)))
    folder = Path("runs") / f"tiny-{identity(load(tiny, changes))[:8]}"
    assert result.out == f"{folder / 'report.html'}\n"
    assert load(folder / "experiment.toml").training.optimizer.lr == 0.2


def test_report_writes_it_anew(fedtrain: Callable, finished: Path) -> None:
    before = contents(finished)
    (finished / "report.html").unlink()
    result = fedtrain("report", finished)
    assert result.code == 0
    assert result.out.splitlines()[-1] == f"Report: {finished / 'report.html'}"
    assert contents(finished)["report.html"][0] == before["report.html"][0]


def test_report_needs_a_run(fedtrain: Callable, tmp_path: Path) -> None:
    result = fedtrain("report", tmp_path)
    assert result.code == 2
    assert "this is not a run's folder" in result.err


def test_version(fedtrain: Callable) -> None:
    assert fedtrain("--version").out == f"fedtrain {__version__}\n"


@pytest.mark.parametrize("arguments", [["bogus"], ["simulate"], ["simulate", "--bogus"], ["data", "bogus"]])
def test_a_wrong_command_line_is_exit_code_2(fedtrain: Callable, arguments: list[str]) -> None:
    result = fedtrain(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage:" in result.err


def test_workers_begin_to_import_before_the_command_imports_torch(tiny: Path, tmp_path: Path) -> None:
    code = f"""
import os, sys
from fedtrain.simulations import forkserver
forkserver.start_importing = lambda experiment: os._exit("torch" in sys.modules)
sys.argv = ["fedtrain", "simulate", {str(tiny)!r}]
from fedtrain.cli import main
main()
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
