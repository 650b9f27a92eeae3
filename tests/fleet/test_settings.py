from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from fedtrain.errors import InputError
from fedtrain.experiment.load import to_toml
from fedtrain.experiment.sections import Experiment
from fedtrain.fleet.processes import node_config
from fedtrain.fleet.settings import NodeSettings, RunSettings

EXPERIMENT = Experiment.model_validate({"data": {"name": "digits", "clients": 2}, "privacy": None, "seed": 2**62})
NAMES = ["a", "b"]


def test_an_experiment_travels_as_it_is() -> None:
    settings = RunSettings(experiment=to_toml(EXPERIMENT), base="/b", out="/o", patience=5)
    arrived = RunSettings.of(settings.config())
    assert arrived == settings
    assert arrived.read_experiment() == EXPERIMENT


def test_what_flwr_adds_to_a_config_is_passed_over() -> None:
    assert NodeSettings.of({"client-id": "a", "num-partitions": 3}).client_id == "a"


@pytest.mark.parametrize("mark", ["../../home", "a" * 31, "A" * 32, f"{'a' * 32}\n"])
def test_no_server_names_a_folder_on_a_node(mark: str) -> None:
    with pytest.raises(InputError, match="mark is wrong"):
        RunSettings.of({"experiment": "", "base": "", "out": "", "mark": mark})


@pytest.mark.parametrize("text", ["", "rounds = 'many'", "not TOML"])
def test_an_experiment_of_another_version_says_so(text: str) -> None:
    with pytest.raises(InputError, match="same version of fedtrain on all machines"):
        RunSettings(experiment=text, base="", out="").read_experiment()


@pytest.mark.parametrize(
    ("config", "name"),
    [({"client-id": "b"}, "b"), ({"partition-id": 1}, "b"), ({"client-id": "a", "partition-id": 1}, "a")],
)
def test_a_node_serves_the_client_that_its_config_names(config: dict[str, str | int], name: str) -> None:
    assert NodeSettings.of(config).name_among(NAMES) == name


@pytest.mark.parametrize("config", [{}, {"client-id": "c"}, {"client-id": "c", "partition-id": 0}, {"partition-id": 2}])
def test_a_node_without_a_client_is_refused(config: dict[str, str | int]) -> None:
    with pytest.raises(InputError, match=r"client-id or partition-id in its --node-config"):
        NodeSettings.of(config).name_among(NAMES)


@pytest.mark.parametrize("config", [{"partition-id": -1}, {"client-id": 3}, {"device": "tpu"}])
def test_wrong_values_are_named(config: dict[str, str | int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(config))} is wrong in the config of flwr: got "):
        NodeSettings.of(config)


def test_what_clients_keep_lies_in_flwrs_home_unless_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert NodeSettings.of({}).states == str(tmp_path / "fedtrain")
    assert NodeSettings.of({"states": "/elsewhere"}).states == "/elsewhere"


def test_flwr_reads_a_node_config_as_it_was_meant() -> None:
    meant = {"partition-id": 1, "base": 'a folder/with "quotes" = \\ and x=1', "flag": True, "share": 0.5}
    assert parse_config_args([node_config(meant)]) == meant


@pytest.mark.parametrize("path", ["it's", "two\nlines"])
def test_what_flwr_cannot_read_is_refused(path: str) -> None:
    with pytest.raises(InputError, match="flwr cannot be given this path"):
        node_config({"base": path})
