import socket
from pathlib import Path

import pytest

from fedtrain.errors import RunError
from fedtrain.fleet import processes
from fedtrain.fleet.processes import LocalFleet


def test_a_superlink_that_cannot_start_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(processes, "_free_port", lambda: taken.getsockname()[1])
        with (
            LocalFleet(tmp_path, []) as fleet,
            pytest.raises(RunError, match=r"the superlink died: got .*Its log: ") as it,
        ):
            fleet.wait_until(lambda: False)
    assert str(tmp_path / "superlink.log") in str(it.value)
    assert "address already in use" in (tmp_path / "superlink.log").read_text()


def test_without_flwrs_commands_the_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RunError, match=r"the superlink cannot be started: got .*No such file"):
        LocalFleet(tmp_path, [])
