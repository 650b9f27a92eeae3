import importlib
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.cli.config_utils import get_fab_config
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedtrain.errors import InputError, RunError
from fedtrain.fleet.control import Control, stub_fab
from fedtrain.fleet.settings import RunSettings


def test_a_fab_is_a_pointer_and_a_config() -> None:
    settings = RunSettings(experiment='[data]\nname = "digits"', base="/b", out="/o", patience=2)
    fab = stub_fab(settings.config())
    assert len(fab) < 1000
    app = get_fab_config(fab)["tool"]["flwr"]["app"]
    assert RunSettings.of(app["config"]) == settings
    kinds = {"serverapp": ServerApp, "clientapp": ClientApp}
    for component, reference in app["components"].items():
        module, _, name = reference.partition(":")
        assert isinstance(getattr(importlib.import_module(module), name), kinds.pop(component))
    assert not kinds


@pytest.fixture
def nowhere() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_without_a_superlink_the_address_is_named(nowhere: str) -> None:
    with Control(nowhere, None, plain=True) as control:
        assert not control.is_up()
        with pytest.raises(InputError, match=f"no SuperLink answers: got {nowhere}: "):
            control.start({})


def test_a_superlink_that_goes_is_waited_for_and_then_given_up(nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with Control(nowhere, None, plain=True) as control:
        with pytest.raises(RunError, match=r"does not answer any more.*the same command goes on"):
            list(control.log(1))
        with pytest.raises(RunError, match="does not answer any more"):
            control.outcome(1)
        control.stop(1)  # nothing to do
    assert len(waits) == 5


def test_a_log_goes_on_where_it_broke_off(nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def stream(request: Any) -> Iterator[SimpleNamespace]:
        pieces = [(1.0, "a"), (2.0, "b"), (3.0, "c")]
        for at, text in [(at, text) for at, text in pieces if at > request.after_timestamp][:2]:
            yield SimpleNamespace(latest_timestamp=at, log_output=text)
        if request.after_timestamp < 2:
            raise httpx.ReadError("broken off")

    with Control(nowhere, None, plain=True) as control:
        monkeypatch.setattr(control._client, "StreamLogs", stream)
        assert list(control.log(1)) == ["a", "b", "c"]
