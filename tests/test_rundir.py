import contextlib
import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fedtrain import disk
from fedtrain.disk import atomic_write
from fedtrain.errors import RunError, RunFolderError
from fedtrain.records import RoundRecord
from fedtrain.rundir import Checkpoint, RunFolder

STATE = {"lr": 0.5, "control": {"w": torch.arange(3.0), "deep": {"n": 2, "t": torch.tensor(1)}}, "empty": {}}


def checkpoint(number: int) -> Checkpoint:
    params = {"w": torch.full((2, 2), float(number)), "scale": torch.tensor(1.5), "none": torch.zeros(0)}
    return Checkpoint(number, params, STATE)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    return folder


def never(text: str) -> None:
    raise AssertionError(text)


def test_checkpoint_round_trip_with_nested_state(folder: RunFolder) -> None:
    folder.write_checkpoint(checkpoint(3))
    read = folder.latest_checkpoint(never)
    assert read is not None
    assert read.round_number == 3
    assert {name: t.tolist() for name, t in read.params.items()} == {"w": [[3, 3], [3, 3]], "scale": 1.5, "none": []}
    assert read.state["lr"] == 0.5
    assert read.state["control"]["w"].tolist() == [0, 1, 2]
    assert read.state["control"]["deep"]["t"].dtype == torch.int64
    assert read.state["control"]["deep"]["n"] == 2
    assert read.state["empty"] == {}


def test_the_last_two_checkpoints_are_kept(folder: RunFolder) -> None:
    for number in (1, 9, 10, 11):
        folder.write_checkpoint(checkpoint(number))
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == [
        "round-0000010.safetensors",
        "round-0000011.safetensors",
    ]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "metadata"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(folder: RunFolder, damage: str) -> None:
    folder.write_checkpoint(checkpoint(1))
    folder.write_checkpoint(checkpoint(2))
    newest = folder.checkpoints / "round-0000002.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        content = content[:-5]
    elif damage == "one bit":
        content[-3] ^= 4
    elif damage == "metadata":
        content = content.replace(b'round_number\\": 2', b'round_number\\": 7')
        assert b'round_number\\": 7' in content
    else:
        content.clear()
    newest.write_bytes(content)
    told: list[str] = []
    read = folder.latest_checkpoint(told.append)
    assert read is not None
    assert read.round_number == 1
    assert "round-0000002.safetensors is damaged" in told[0]


def test_after_two_damaged_checkpoints_the_new_ones_are_kept(folder: RunFolder) -> None:
    for number in (10, 20):
        folder.write_checkpoint(checkpoint(number))
    for path in folder.checkpoints.iterdir():
        path.write_bytes(b"")
    told: list[str] = []
    assert folder.latest_checkpoint(told.append) is None
    assert len(told) == 2
    assert folder.oldest_checkpoint_round() == 0
    folder.write_checkpoint(checkpoint(5))
    read = folder.latest_checkpoint(never)
    assert read is not None
    assert read.round_number == 5


def test_no_checkpoint_is_no_checkpoint(folder: RunFolder) -> None:
    assert folder.latest_checkpoint(never) is None


def test_records_round_trip_and_a_half_written_line_is_left_out(folder: RunFolder) -> None:
    diverged = RoundRecord(round_number=1, train={"loss": float("nan")}, central={"loss": float("inf")})
    folder.append(RoundRecord(round_number=0))
    folder.append(diverged)
    with folder.rounds.open("a") as lines:
        lines.write('{"round_number": 2, "partici')
    read = folder.read_rounds()
    assert [record.round_number for record in read] == [0, 1]
    assert read[1].central == {"loss": float("inf")}
    assert read[1].train["loss"] != read[1].train["loss"]
    folder.drop_rounds_after(0)
    assert [record.round_number for record in folder.read_rounds()] == [0]
    folder.append(RoundRecord(round_number=1))
    assert [record.round_number for record in folder.read_rounds()] == [0, 1]


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half(file) -> None:
        file.write(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        atomic_write(path, half)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path, torn = tmp_path / "file", []
    contents = [bytes([number]) * 100_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(50):
            atomic_write(
                path, lambda file: [file.write(content[at : at + 1000]) for at in range(0, len(content), 1000)]
            )
            torn.extend([1] if path.read_bytes() not in contents else [])

    (tmp_path / ".file.tmp").write_bytes(b"left by a kill" * 100_000)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, contents))
    assert not torn
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_once_its_file_has_its_name_leaves_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, begun = tmp_path / "file", tmp_path / ".file.tmp"

    def fail(finished: Path, target: Path) -> None:
        finished.replace(target)
        begun.write_bytes(b"of another writer")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "put_in_place", fail)
    with pytest.raises(OSError, match="Input/output"):
        atomic_write(path, lambda file: file.write(b"new"))
    assert (path.read_bytes(), begun.read_bytes()) == (b"new", b"of another writer")


@pytest.mark.parametrize(("number", "writes"), [(errno.ENOSYS, True), (errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, writes: bool
) -> None:
    def refuse(_file: object, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with contextlib.nullcontext() if writes else pytest.raises(OSError, match="Input/output"):
        atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").exists() == writes


def test_a_full_disk_is_one_clear_error(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*No space left.*Free some space.*it resumes"):
        folder.write_checkpoint(checkpoint(1))


def test_a_folder_serves_one_process_at_a_time(folder: RunFolder) -> None:
    with folder.locked():
        code = (
            "import sys; from pathlib import Path; from fedtrain.rundir import RunFolder\n"
            "with RunFolder(Path(sys.argv[1])).locked(): pass"
        )
        other = subprocess.run([sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True)
    assert other.returncode == 1
    assert "another process is running in this folder" in other.stderr


def test_a_read_only_place_is_an_input_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(RunFolderError, match=r"cannot be written.*Choose another one with --out"),
        RunFolder(file / "run").locked(),
    ):
        pass


def test_model_loads_with_plain_torch_and_is_deterministic(folder: RunFolder) -> None:
    from safetensors.torch import load_file

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight  # tied: both names are there
    digest = folder.write_model(model.state_dict())
    again = folder.write_model(model.state_dict())
    assert digest == again
    fresh = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    fresh.load_state_dict(load_file(folder.model))
    assert torch.equal(fresh[1].weight, model[0].weight)


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run's folder"):
        RunFolder.open(tmp_path)


def test_foreign_files_are_seen_but_not_the_remains_of_an_early_kill(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked():
        pass
    (tmp_path / ".manifest.json.tmp").touch()
    assert not folder.is_foreign()
    (tmp_path / "thesis.tex").touch()
    assert folder.is_foreign()
