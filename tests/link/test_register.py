import contextlib
import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtrain.errors import RunError
from fedtrain.link.register import Issued, Register, Revocations, read_register, write_register

NOW = datetime(2030, 1, 1, tzinfo=UTC)
REGISTER = Register(
    issued=[
        Issued(name="north", kind="client", serial="a1", not_after=NOW),
        Issued(name="south", kind="client", serial="a2", not_after=NOW, revoked_at=NOW - timedelta(days=1)),
        Issued(name="fedtrain server", kind="server", serial="a3", not_after=NOW),
    ],
    hosts=["train.example.org"],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_register(tmp_path / "register.json", REGISTER)
    return tmp_path / "register.json"


def test_it_comes_back(path: Path) -> None:
    assert read_register(path) == REGISTER


@given(data=st.data())
def test_what_was_changed_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut anywhere, or with any character changed: refused, or read as it was (layout alone)."""
    path = tmp_path_factory.getbasetemp() / "changed.json"
    write_register(path, REGISTER)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 2))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(RunError):
        assert read_register(path) == REGISTER


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", "[" * 100_000, '{"sha256": "", "register": {}}', "3"])
def test_what_is_no_register(content: str, path: Path) -> None:
    path.write_text(content)
    with pytest.raises(RunError, match="cannot be trusted"):
        read_register(path)


def test_a_change_by_hand_is_refused(path: Path) -> None:
    document = json.loads(path.read_text())
    document["register"]["issued"][1]["revoked_at"] = None
    path.write_text(json.dumps(document))
    with pytest.raises(RunError, match="its checksum does not match"):
        read_register(path)


def test_only_what_is_listed_and_not_revoked_is_in_force(path: Path) -> None:
    revocations = Revocations(path)
    assert [revocations.is_revoked(serial) for serial in (0xA1, 0xA2, 0xA3, 0xA4)] == [False, True, True, True]


def test_a_change_is_seen_at_once(path: Path) -> None:
    revocations = Revocations(path)
    assert not revocations.is_revoked(0xA1)
    changed = REGISTER.model_copy(deep=True)
    changed.issued[0].revoked_at = NOW
    write_register(path, changed)
    assert revocations.is_revoked(0xA1)
    write_register(path, REGISTER)
    assert not revocations.is_revoked(0xA1)


def test_an_unchanged_file_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revocations = Revocations(path)
    revocations.is_revoked(0xA1)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert not revocations.is_revoked(0xA1)


def test_it_fails_closed_and_recovers(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    revocations, whole = Revocations(path), path.read_bytes()
    assert not revocations.is_revoked(0xA1)
    for damage in (path.unlink, lambda: path.write_bytes(whole[:-40])):
        with caplog.at_level(logging.ERROR, "fedtrain.link"):
            caplog.clear()
            damage()
            assert revocations.is_revoked(0xA1)
            assert revocations.is_revoked(0xA1)
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith("Every client is refused: the authority's register")
    path.write_bytes(whole)
    assert not revocations.is_revoked(0xA1)


def test_one_that_was_never_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Revocations(tmp_path / "register.json").is_revoked(0xA1)
    assert len(caplog.messages) == 1
