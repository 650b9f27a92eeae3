from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtrain.cli.progress import RunObserver
from fedtrain.errors import InputError, InterruptedRunError, RunError, RunFolderError
from fedtrain.experiment import load
from fedtrain.experiment.sections import Experiment
from fedtrain.fleet import run as ours
from fedtrain.fleet.control import Outcome
from fedtrain.fleet.run import Fleet, run_on_flower
from fedtrain.link.authority import Authority
from fedtrain.simulations.run import Places, simulate

pytest.importorskip("sklearn")
SMALL = ("data.clients=2", "clients.per_round=2", "rounds=1")


COMPLETED = Outcome("completed", "")


class Notices(RunObserver):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)


class FakeControl:
    """A Control API whose run says and ends as it is told."""

    def __init__(self, log: list[str] | BaseException, outcome: Outcome = COMPLETED) -> None:
        self._log, self._outcome = log, outcome
        self.configs: list[dict[str, Any]] = []
        self.stopped: list[int] = []

    def __enter__(self) -> "FakeControl":
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, config: dict[str, Any]) -> int:
        self.configs.append(config)
        return 5

    def log(self, run_id: int) -> list[str]:
        if isinstance(self._log, BaseException):
            raise self._log
        return self._log

    def outcome(self, run_id: int) -> Outcome:
        return self._outcome

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)


@pytest.fixture
def places(tiny: Path, tmp_path: Path) -> Places:
    return Places(base=tiny.parent, out=tmp_path / "run", data_root=None)


@pytest.fixture
def experiment(tiny: Path) -> Experiment:
    return load(tiny, SMALL)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, places: Places, experiment: Experiment) -> Any:
    """Run on a fleet at an address, whose Control API is given."""

    def run(control: FakeControl) -> list[str]:
        monkeypatch.setattr(ours, "_control", lambda fleet, address: control)
        observer = Notices()
        run_on_flower(experiment, places, observer, Fleet(address="there:1"))
        return observer.texts

    return run


def test_a_run_elsewhere_says_where_its_folder_is(on: Any, places: Places) -> None:
    assert on(FakeControl([])) == [f"the run is complete; its folder is on the machine of the SuperLink: {places.out}"]


def test_what_clients_keep_is_found_again_after_a_restart(on: Any) -> None:
    first, second = FakeControl(KeyboardInterrupt()), FakeControl([])
    with pytest.raises(InterruptedRunError, match="Run the same command again"):
        on(first)
    assert first.stopped == [5]
    on(second)
    (one,), (other,) = first.configs, second.configs
    assert len(one["mark"]) == 32
    assert one == other


@pytest.mark.parametrize(
    ("log", "outcome", "kind", "text"),
    [
        (['fedtrain-event ["failed", true, "no such data"]\n'], Outcome("failed", ""), InputError, "^no such data$"),
        (['fedtrain-event ["failed", false, "quorum"]\n'], Outcome("failed", ""), RunError, "^quorum$"),
        ([], Outcome("failed", "ServerApp failed"), RunError, "the run failed on the SuperLink: got ServerApp failed"),
        ([], Outcome("stopped", ""), InterruptedRunError, "stopped on the SuperLink"),
        ([], Outcome("", ""), RunError, "the run failed on the SuperLink"),
    ],
)
def test_why_a_run_ended_is_told(on: Any, log: list[str], outcome: Outcome, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        on(FakeControl(log, outcome))


def test_a_complete_run_is_not_run_again(experiment: Experiment, places: Places) -> None:
    simulate(experiment, places, RunObserver())
    nobody = Fleet(address="127.0.0.1:1")
    assert run_on_flower(experiment, places, RunObserver(), nobody).read_manifest().status == "complete"
    with pytest.raises(RunFolderError, match="a different experiment"):
        run_on_flower(experiment.model_copy(update={"seed": 9}), places, RunObserver(), nobody)


def test_clients_with_ledgers_are_refused(tiny: Path, places: Places) -> None:
    pytest.importorskip("opacus")
    private = ('privacy={ unit = "sample", epsilon = 8.0, delta = 1e-3, max_grad_norm = 1.0 }', "data.test=0.0")
    with pytest.raises(InputError, match="clients that keep ledgers"):
        run_on_flower(load(tiny, (*SMALL, *private)), places, RunObserver(), Fleet())


def test_a_crowd_is_refused_on_one_machine(tiny: Path, places: Places) -> None:
    with pytest.raises(InputError, match="got 17 clients; expected at most 16"):
        run_on_flower(load(tiny, ("data.clients=17",)), places, RunObserver(), Fleet())
    assert not places.out.exists()


@pytest.mark.parametrize(
    ("address", "insecure", "scheme"),
    [
        ("127.0.0.1:9", False, "http"),
        ("localhost:9", False, "http"),
        ("[::1]:9", False, "http"),
        ("10.0.0.1:9", False, "https"),
        ("127.0.0.1.example.org:9", False, "https"),
        ("10.0.0.1:9", True, "http"),
    ],
)
def test_beyond_loopback_there_is_tls_unless_said_otherwise(address: str, insecure: bool, scheme: str) -> None:
    with ours._control(Fleet(address=address, insecure=insecure), address) as control:
        assert control._client._base_url == f"{scheme}://{address}"


def test_an_authority_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    fleet = Fleet(address="10.0.0.1:9", authority=tmp_path / "ca.pem")
    with pytest.raises(InputError, match=r"authority's certificate cannot be read: got .*No such file"):
        ours._control(fleet, "10.0.0.1:9")
    (tmp_path / "ca.pem").write_text("none")
    with pytest.raises(InputError, match="authority's certificate cannot be read"):
        ours._control(fleet, "10.0.0.1:9")
    with pytest.raises(InputError, match=r"cannot be read: got .*No such file"):
        ours._control(replace(fleet, authority=tmp_path), "10.0.0.1:9")
    with pytest.raises(InputError, match="Give one of the two"):
        ours._control(replace(fleet, insecure=True), "10.0.0.1:9")


def test_an_authority_is_also_named_by_its_folder(tmp_path: Path) -> None:
    Authority.init(tmp_path / "ca")
    with ours._control(Fleet(address="127.0.0.1:9", authority=tmp_path / "ca"), "127.0.0.1:9") as control:
        assert control._client._base_url == "https://127.0.0.1:9"
