import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.errors import RunError
from fedtrain.rundir import RunFolder

SHORT = ("--set", "rounds=1")


@pytest.fixture
def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time of drawing."""
    from fedtrain.cli import sweep

    monkeypatch.setattr(sweep, "write_report", lambda folder: folder.report.touch())


def manifests(out: Path) -> dict[str, float]:
    """Run -> when its manifest was last written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/manifest.json")}


def test_a_grid_is_run_compared_and_not_run_again(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    command = ("sweep", tiny, *SHORT, "--set", "training.optimizer.lr=0.1,0.5", "--out", out)
    result = fedtrain(*command)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("1/2  training.optimizer.lr=0.1, seed 3: accuracy ")
    assert lines[1].startswith("2/2  training.optimizer.lr=0.5, seed 3: accuracy ")
    assert "2 runs in 2 groups, by accuracy on the central test set." in lines
    assert lines[-1] == f"Page: {out / 'compare.html'}"
    done = manifests(out)
    assert len(done) == 2
    assert all((out / name / "report.html").exists() for name in done)
    again = fedtrain(*command)
    assert (again.code, again.out) == (0, result.out)
    assert manifests(out) == done


def test_faults_of_any_value_are_found_before_the_first_run(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for values, message in (
        ("training.optimizer.lr=0.1,-1", "training.optimizer.lr: got -1"),
        ("task.name=mlp,mpl", "with task.name=mpl: there is no such built-in task: got mpl"),
        ("clients.deadline=1.0", "with as in the file: clients.deadline needs clients.duration"),
    ):
        result = fedtrain("sweep", tiny, *SHORT, "--set", values, "--out", out)
        assert result.code == 2
        assert message in result.err
        assert not out.exists()


@pytest.mark.usefixtures("no_reports")
def test_a_run_that_fails_is_named_and_the_others_go_on(
    fedtrain: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtrain.cli import sweep

    simulate = sweep.simulate

    def sometimes(experiment, *arguments):
        if experiment.seed == 3:
            raise RunError("no quorum")
        return simulate(experiment, *arguments)

    out = tmp_path / "out"
    command = ("sweep", tiny, *SHORT, "--seeds", 2, "--json", "--out", out)
    monkeypatch.setattr(sweep, "simulate", sometimes)
    result = fedtrain(*command)
    assert result.code == 1
    assert "1 of 2 runs failed; the others are complete" in result.err
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [(event["status"], event["text"][:17]) for event in events[:2]] == [
        ("failed", "FAILED: no quorum"),
        ("complete", events[1]["text"][:17]),
    ]
    assert len(events[-1]["groups"][0]["runs"]) == 1
    monkeypatch.setattr(sweep, "simulate", simulate)
    again = fedtrain(*command)
    assert again.code == 0
    assert len(json.loads(again.out.splitlines()[-1])["groups"][0]["runs"]) == 2


def test_an_interrupt_stops_it_and_the_same_command_goes_on(
    fedtrain: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtrain.cli import sweep

    out = tmp_path / "out"

    def interrupted(folder: RunFolder) -> None:
        raise KeyboardInterrupt

    command = ("sweep", tiny, *SHORT, "--seeds", 2, "--out", out, "--quiet")
    monkeypatch.setattr(sweep, "write_report", interrupted)
    result = fedtrain(*command)
    assert result.code == 130
    assert "the sweep was interrupted" in result.err
    (first,) = manifests(out).items()
    monkeypatch.setattr(sweep, "write_report", lambda folder: folder.report.touch())
    assert fedtrain(*command).out == f"{out / 'compare.html'}\n"
    assert len(manifests(out)) == 2
    assert first in manifests(out).items()


def test_a_dry_run_lists_the_runs_and_makes_nothing(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fedtrain("sweep", tiny, "--set", "strategy.name=fedavg,fedprox", "--out", out, "--dry-run")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "2 runs:"
    assert lines[2].startswith(f"  {out}/fedprox-seed3-")
    assert lines[2].endswith("  strategy.name=fedprox  (new)")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--range", "rounds=1:2"), "a grid has no such option: got --range"),
        (("--maximize", "accuracy"), "a grid has no such option: got --maximize"),
        (("--optuna", 2, "--range", "rounds=1:2"), "a study needs one metric"),
        (("--optuna", 2, "--minimize", "a", "--maximize", "b", "--range", "rounds=1:2"), "a study needs one metric"),
        (("--optuna", 2, "--minimize", "loss"), "a study needs something to vary"),
        (("--quiet", "--json"), "--quiet and --json are two ways to print a sweep"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    fedtrain: Callable, tiny: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = fedtrain("sweep", tiny, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"fedtrain: {message}")


@pytest.mark.usefixtures("no_reports")
def test_a_study_runs_what_optuna_suggests(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    out = tmp_path / "out"
    command = ["sweep", tiny, *SHORT, "--optuna", 2, "--range", "training.optimizer.lr=0.01:1:log", "--out", out]
    result = fedtrain(*command, "--maximize", "f1")
    assert result.code == 2
    assert "the runs do not measure this: got f1" in result.err
    other = tmp_path / "other"
    command[-1] = other
    result = fedtrain(*command, "--maximize", "accuracy", "--json")
    assert result.code == 0
    groups = json.loads(result.out.splitlines()[-1])["groups"]
    assert len(groups) == 2
    assert groups[0]["final"]["mean"] >= groups[1]["final"]["mean"]
    done = manifests(other)
    assert fedtrain(*command, "--maximize", "accuracy", "--json").code == 0
    assert manifests(other) == done


def test_a_run_that_restored_its_best_model_counts_by_that_model(
    fedtrain: Callable, tiny: Path, tmp_path: Path
) -> None:
    from fedtrain.cli.running import view_of
    from fedtrain.cli.sweep import _of_result

    out = tmp_path / "run"
    stopping = "training.early_stopping={patience=1, min_delta=9.0}"
    assert fedtrain("simulate", tiny, "--set", stopping, "--out", out).code == 0
    first, last = RunFolder(out).read_rounds()
    found = _of_result(view_of(RunFolder(out)))
    assert found[-1] == first.central != last.central
    assert last.clients in found, "in the last round the clients have measured the result"
