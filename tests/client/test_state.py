import errno
from pathlib import Path

import pytest
import torch

from fedtrain.client.state import ClientState
from fedtrain.errors import RunError


def version(number: int) -> dict[str, object]:
    return {"rule": {"c": torch.tensor([float(number)])}, "count": number}


@pytest.fixture
def states(tmp_path: Path) -> ClientState:
    return ClientState(tmp_path / "clients")


def kept(states: ClientState, before: int, client: str = "a") -> object:
    return states.load(client, before).get("count")


def test_a_client_finds_what_it_kept_last(states: ClientState) -> None:
    assert states.load("a", 5) == {}
    states.save("a", 2, version(2), 0)
    states.save("a", 4, version(4), 0)
    assert kept(states, 5) == 4
    assert states.load("a", 5)["rule"]["c"].tolist() == [4.0]
    assert kept(states, 5, "b") is None


def test_a_server_that_went_back_finds_the_state_it_left_behind(states: ClientState) -> None:
    for number in (1, 2, 3, 5):
        states.save("a", number, version(number), kept_round=2)
    assert [kept(states, before) for before in (3, 4, 5)] == [2, 3, 3]
    states.save("a", 3, {**version(3), "count": 33}, kept_round=2)  # the same round once more
    assert kept(states, 9) == 33  # what came after it is no more


def test_versions_that_nobody_can_ask_for_are_forgotten(states: ClientState, tmp_path: Path) -> None:
    for number in range(1, 8):
        states.save("a", number, version(number), kept_round=max(0, number - 3))
    files = sorted(path.name for path in (tmp_path / "clients" / "a").iterdir())
    assert files == [f"round-000000{number}.safetensors" for number in (4, 5, 6, 7)]


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", ".", "..", "x" * 500, "Zürich 1", "\x1b[31m"])
def test_a_name_stays_within_the_folder(states: ClientState, tmp_path: Path, name: str) -> None:
    states.save(name, 1, version(1), 0)
    assert kept(states, 2, name) == 1
    (place,) = (tmp_path / "clients").iterdir()
    assert place.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]


def test_no_state_writes_nothing(states: ClientState, tmp_path: Path) -> None:
    states.save("a", 1, {}, 0)
    assert not (tmp_path / "clients").exists()


def test_a_damaged_state_is_told_rather_than_forgotten(states: ClientState, tmp_path: Path) -> None:
    states.save("a", 1, version(1), 0)
    (file,) = (tmp_path / "clients" / "a").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"round-0000001\.safetensors is damaged"):
        states.load("a", 2)


def test_a_rule_that_keeps_what_cannot_be_kept_is_told(states: ClientState) -> None:
    with pytest.raises(RunError, match=r"cannot be kept: state\['rule'\]\['seen'\]"):
        states.save("a", 1, {"rule": {"seen": {1, 2}}}, 0)


def test_a_full_disk_is_told(states: ClientState, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedtrain.client.state.write_state", full)
    with pytest.raises(RunError, match=r"cannot be written .No space left"):
        states.save("a", 1, version(1), 0)
