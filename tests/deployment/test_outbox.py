"""Finished updates on disk: found by what was asked, kept through damage, dropped when nobody can ask again."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import MessageType, RecordDict

from fedtrain import flower
from fedtrain.deployment.outbox import Outbox
from fedtrain.errors import RunError
from fedtrain.link.frames import Packed, pack


def task(group: str = "3", checksum: str = "aa") -> Any:
    return SimpleNamespace(kind=MessageType.TRAIN, group=group, checksum=checksum)


def packed(value: float) -> Packed:
    return pack(RecordDict({"arrays": flower.array_record({"w": torch.full((5,), value)})}))


def test_an_update_is_found_by_round_and_parameters(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    assert outbox.find(task()) is None
    outbox.keep(task(), packed(1.0))
    found = Outbox(tmp_path / "outbox").find(task())
    assert found is not None
    assert (found.header, found.checksum) == (packed(1.0).header, packed(1.0).checksum)
    assert outbox.find(task(checksum="ab")) is None  # other parameters: another instruction
    assert outbox.find(task(group="4")) is None


def test_a_damaged_update_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outbox = Outbox(tmp_path)
    outbox.keep(task(), packed(1.0))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert outbox.find(task()) is None
    assert "made anew" in caplog.text


def test_rounds_that_the_server_has_left_behind_are_dropped(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for group in ("8", "9", "10"):
        outbox.keep(task(group), packed(1.0))
    outbox.drop(9)
    assert [outbox.find(task(group)) is not None for group in ("8", "9", "10")] == [False, False, True]


def test_a_run_that_is_over_leaves_no_updates(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.clear()
    for group in ("8", "10"):
        outbox.keep(task(group), packed(1.0))
    outbox.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot be kept .*No space left"):
        Outbox(tmp_path).keep(task(), packed(1.0))
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".update"]
