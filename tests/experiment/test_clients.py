"""The faults of `[clients.duration]` for devices, as a user reads them."""

import re
from pathlib import Path

import pytest

from fedtrain.errors import ExperimentError
from fedtrain.experiment import load, to_toml
from fedtrain.experiment.clients import DevicesDuration, PeriodicAvailability

TEXT = '[data]\nname = "digits"\nclients = 5\n[clients.duration]\n'


def faults(folder: Path, text: str) -> list[str]:
    file = folder / "devices.toml"
    file.write_text(TEXT + text)
    with pytest.raises(ExperimentError) as raised:
        load(file)
    return [str(fault) for fault in raised.value.faults]


DEVICES, FILE = 'kind = "devices"\n', 'kind = "device-file"\n'
PLACE = "clients.duration"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (DEVICES + "step_seconds = 0.0", 'step_seconds: got 0.0; expected a number greater than 0, or "measured"'),
        (
            DEVICES + 'step_seconds = "file"',
            'step_seconds: got "file"; expected a number greater than 0, or "measured"',
        ),
        (DEVICES + "bandwidth_up = 0.0", "bandwidth_up: got 0.0; expected a number greater than 0"),
        (DEVICES + "latency = -1.0", "latency: got -1.0; expected a number of at least 0"),
        (DEVICES + "dropout = 1.0", "dropout: got 1.0; expected a number of at least 0 and below 1"),
        (DEVICES + "slowness_sigma = -0.1", "slowness_sigma: got -0.1; expected a number of at least 0"),
        (DEVICES + 'file = "a.csv"', "file: got an unknown key; .*file goes with kind = device-file"),
        (FILE, "file: got nothing; expected a string"),
        (FILE + 'file = "a.csv"\nbandwidth_up = 1.0', "bandwidth_up: got an unknown key; .*goes with kind = devices"),
        (DEVICES + "availability = { share = 0.0 }", "availability.share: got 0.0; expected a number from 0.001 to 1"),
        (DEVICES + "availability = { period = 0.5 }", "availability.period: got 0.5; expected a number of at least 1"),
        (DEVICES + 'availability = { kind = "file" }', "availability.file: got nothing; expected a string"),
        (
            DEVICES + 'availability = { kind = "dayly" }',
            'availability.kind: got "?dayly"?; expected one of: periodic, file',
        ),
    ],
)
def test_a_fault_of_devices_is_told(tmp_path: Path, text: str, told: str) -> None:
    (fault,) = faults(tmp_path, text)
    assert fault.startswith(PLACE)
    assert re.search(told.replace(".", r"\.").replace(r"\.*", ".*"), fault), fault


def test_devices_survive_being_written_out(tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text(TEXT + DEVICES + "availability = { share = 0.3 }")
    duration = load(file).clients.duration
    assert duration == DevicesDuration(kind="devices", availability=PeriodicAvailability(share=0.3))
    file.write_text(to_toml(load(file)))
    assert load(file).clients.duration == duration
