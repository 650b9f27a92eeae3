"""What needs to know how long clients take."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.cli.progress import RunObserver
from fedtrain.errors import InputError
from fedtrain.experiment import load
from fedtrain.simulations.run import Backend, Places, simulate

TEXT = '[data]\nname = "digits"\nclients = 4\n'


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("clients={per_round=2, over_selection=1.5}", "clients.over_selection"),
        ("clients.deadline=3", "clients.deadline"),
        ('strategy={name="fedbuff", buffer_size=2}', "an asynchronous strategy"),
    ],
)
def test_a_simulation_needs_durations(tmp_path: Path, simulated: Callable, override: str, what: str) -> None:
    file = tmp_path / "timeless.toml"
    file.write_text(TEXT)
    with pytest.raises(InputError, match=f"{what} needs clients.duration: how long clients take"):
        simulated(file, "out", override)
    assert not (tmp_path / "out").exists()


def test_under_privacy_clients_are_not_asked_at_any_time(tmp_path: Path) -> None:
    file = tmp_path / "private.toml"
    file.write_text(TEXT + '[strategy]\nname = "fedbuff"\nbuffer_size = 2\n[privacy]\nepsilon = 8\ndelta = 1e-5\n')
    with pytest.raises(InputError, match="how often an asynchronous server asks a client is not known"):
        simulate(
            load(file), Places(tmp_path, tmp_path / "out", None), RunObserver(), Backend(NotImplemented, live=True)
        )
