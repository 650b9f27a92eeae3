import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import fedtrain.link.enrolment
from fedtrain.cli import client
from fedtrain.link.identity import Identity


def test_a_certificate_is_renewed_when_it_is_due_also_without_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, renewed = [], threading.Event()

    def load(folder: Path) -> SimpleNamespace:
        looked.append(folder)
        return SimpleNamespace(renew_due=lambda: len(looked) == 2)

    def renew(folder: Path, server: str) -> None:
        assert (folder, server) == (Path("identity"), "there:1")
        monkeypatch.setattr(client, "_RENEWAL_SECONDS", 3600.0)
        renewed.set()

    monkeypatch.setattr(client, "_RENEWAL_SECONDS", 0.01)
    monkeypatch.setattr(Identity, "load", load)
    monkeypatch.setattr(fedtrain.link.enrolment, "renew", renew)
    threading.Thread(target=client._stay_valid, args=(Path("identity"), "there:1"), daemon=True).start()
    assert renewed.wait(30)
    assert len(looked) == 2
