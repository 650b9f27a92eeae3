import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.cli.crossval import _refuse_nothing
from fedtrain.errors import RunError
from fedtrain.rundir import RunFolder

pytest.importorskip("sklearn")

SHORT = ("--set", "rounds=1", "--set", "data.clients=3", "--set", "clients.per_round=3")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time of drawing."""
    from fedtrain.cli import sweep

    monkeypatch.setattr(sweep, "write_report", lambda folder: folder.report.touch())


def runs(out: Path) -> dict[Path, float]:
    """Run's folder -> when its manifest was last written."""
    return {path.parent: path.stat().st_mtime_ns for path in sorted(out.glob("*/manifest.json"))}


def measured(out: Path, metric: str) -> list[float]:
    return [RunFolder(path).read_rounds()[-1].clients[metric] for path in runs(out)]


def test_folds_are_run_summed_up_and_not_run_again(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("crossval", tiny, "--folds", 2, *SHORT, "--out", out, "--quiet")
    result = fedtrain(*command)
    assert (result.code, result.err) == (0, "")
    done = runs(out)
    assert len(done) == 2
    lines = result.out.splitlines()
    assert "mean and sample deviation of 2 runs over the folds" in " ".join(result.out.split())
    (row,) = (line.split() for line in lines if line.split()[0] == "accuracy")
    values = measured(out, "accuracy")
    assert row[1:4] == [f"{statistics.fmean(values):.1%}", "±", f"{statistics.stdev(values):.1%}"]
    assert row[4:] == ["(from", f"{min(values):.1%}", "to", f"{max(values):.1%})"]
    again = fedtrain(*command)
    assert (again.code, again.out) == (0, result.out)
    assert runs(out) == done


def test_leaving_each_client_out_scales_it_by_its_own_rows(fedtrain: Callable, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        'rounds=1\n[data]\nname="breast-cancer"\nclients=3\nscaling="client"\n[training]\nlocal_steps=2\n'
        '[run]\nworkers=0\ndevice="cpu"\n'
    )
    result = fedtrain("crossval", file, "--leave-one-out", "--out", tmp_path / "out", "--quiet")
    assert (result.code, result.err) == (0, "")
    assert "of 3 runs over the clients" in " ".join(result.out.split())
    assert all(map(math.isfinite, measured(tmp_path / "out", "loss")))


def test_nothing_measured_is_an_error_and_no_empty_table() -> None:
    some = [{"loss": 1.0}, {}]
    _refuse_nothing({"lr = 1": some})
    with pytest.raises(RunError, match="nothing was measured on the held-out examples: got lr = 2; lr = 3"):
        _refuse_nothing({"lr = 1": some, "lr = 2": [{}, {}], "lr = 3": [{}]})


def test_a_lost_fold_alone_is_run_again(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    command = ("crossval", tiny, "--folds", 2, *SHORT, "--out", out, "--quiet")
    result = fedtrain(*command)
    (lost, _), kept = runs(out).items()
    shutil.rmtree(lost)
    assert fedtrain(*command).out == result.out
    assert kept in runs(out).items()
    assert len(runs(out)) == 2


def test_each_row_is_held_out_once(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fedtrain("crossval", tiny, *SHORT, "--out", out, "--quiet").code == 0
    sizes = [
        sum(one["num_examples"] for one in RunFolder(path).read_rounds()[-1].per_client.values()) for path in runs(out)
    ]
    assert len(sizes) == 5
    assert sum(sizes) == 1797 - round(1797 * 0.2)


def test_each_client_is_left_out_once_and_json_tells(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fedtrain("crossval", tiny, "--leave-one-out", *SHORT, "--out", out, "--json")
    assert (result.code, result.err) == (0, "")
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [event["status"] for event in events if event.get("event") == "run"] == ["complete"] * 3
    last = events[-1]
    assert (last["event"], last["by"]) == ("crossval", "clients")
    assert sorted(last["clients"]["accuracy"]) == pytest.approx(sorted(measured(out, "accuracy")))
    assert all(map(math.isfinite, last["clients"]["loss"]))
    held = [RunFolder(path).read_rounds() for path in runs(out)]
    left = [next(iter(records[-1].per_client)) for records in held]
    assert sorted(left) == ["client-0", "client-1", "client-2"]
    assert all(one not in records[1].participants for one, records in zip(left, held, strict=True))


def test_combinations_and_seeds_are_validated_each(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("crossval", tiny, "--folds", 2, "--seeds", 2, *SHORT, "--set", "training.optimizer.lr=0.1,0.5")
    result = fedtrain(*command, "--out", out, "--json")
    assert result.code == 0
    found = [event for event in map(json.loads, result.out.splitlines()) if event.get("event") == "crossval"]
    assert [len(one["clients"]["accuracy"]) for one in found] == [4, 4]
    assert [one["label"].split(", ")[-1] for one in found] == [
        "training.optimizer.lr=0.1",
        "training.optimizer.lr=0.5",
    ]


def test_a_dry_run_lists_the_folds_and_makes_nothing(fedtrain: Callable, tiny: Path, tmp_path: Path) -> None:
    result = fedtrain("crossval", tiny, "--folds", 3, *SHORT, "--out", tmp_path / "out", "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == "3 runs:"
    assert result.out.count("(new)") == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--folds", 3, "--leave-one-out"), "--folds and --leave-one-out contradict each other"),
        (("--quiet", "--json"), "--quiet and --json are two ways"),
        (("--folds", 1), "Invalid value for '--folds'"),
        (("--set", "training.optimizer.lr=-1"), "training.optimizer.lr: got -1"),
        (("--folds", 3, "--set", "data.test=0.1"), "sets this itself: got --set data.test. Leave it out"),
        (
            ("--set", "privacy={noise_multiplier=1.0, delta=1e-3}", "--set", "data.test=0.0"),
            "privacy does not let out",
        ),
        (("--leave-one-out", "--set", "data.clients=1", "--set", "clients={}"), "got 1 clients; expected 2 to 200"),
        (("--leave-one-out", "--set", "data.clients=201"), "got 201 clients; expected 2 to 200"),
    ],
)
def test_what_cannot_be_validated_is_exit_code_2(
    fedtrain: Callable, tiny: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = fedtrain("crossval", tiny, *arguments, "--out", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()
