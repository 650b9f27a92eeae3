"""One run over flwr's own processes; about half a minute, most of it flwr's waiting and starting."""

from pathlib import Path

import pytest

from fedtrain.cli.progress import RunObserver
from fedtrain.experiment import load
from fedtrain.fleet.run import Fleet, run_on_flower
from fedtrain.records import RoundRecord
from fedtrain.simulations.run import Places, simulate

pytest.importorskip("sklearn")


class Watching(RunObserver):
    def __init__(self) -> None:
        self.events: list[object] = []

    def round_started(self, round_number: int, clients: int) -> None:
        self.events.append(("started", round_number, clients))

    def client_finished(self, round_number: int) -> None:
        self.events.append(("client", round_number))

    def round_finished(self, record: RoundRecord) -> None:
        self.events.append(("finished", record.round_number))


def measured(record: RoundRecord) -> dict[str, object]:
    return record.model_dump(include={"participants", "quarantined", "train", "central", "clients", "update_norm"})


def test_a_superlink_and_two_supernodes_train_the_bytes_of_the_simulation(tiny: Path, tmp_path: Path) -> None:
    experiment = load(tiny, ("data.clients=2", "clients.per_round=2", "rounds=1", 'strategy.name="scaffold"'))
    observer = Watching()
    here = simulate(experiment, Places(tiny.parent, tmp_path / "here", None), RunObserver())
    there = run_on_flower(experiment, Places(tiny.parent, tmp_path / "there", None), observer, Fleet())

    assert there.model.read_bytes() == here.model.read_bytes()
    assert [measured(record) for record in there.read_rounds()] == [measured(record) for record in here.read_rounds()]
    assert observer.events == [("finished", 0), ("started", 1, 2), ("client", 1), ("client", 1), ("finished", 1)]
    assert there.read_manifest().status == "complete"
    assert {path.name for path in there.path.iterdir()} == {path.name for path in here.path.iterdir()}
