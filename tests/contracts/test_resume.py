"""State of every strategy and of every client survives an interruption, equal to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtrain.cli.progress import RunObserver
from fedtrain.errors import InterruptedRunError
from fedtrain.experiment import load
from fedtrain.records import RoundRecord
from fedtrain.simulations.run import Places, simulate
from fedtrain.strategies.registry import STRATEGIES

pytest.importorskip("sklearn")

SLOW = 'clients.duration={kind="lognormal", sigma=1.0}'
CASES = {name: (f"strategy.name={name}",) for name in STRATEGIES} | {
    "fedopt": ("strategy.name=fedopt", "strategy.optimizer=Adam", "strategy.options={lr=0.01}"),
    "krum": ("strategy.name=krum", "strategy.byzantine=0"),
    "multi-krum": ("strategy.name=multi-krum", "strategy.byzantine=0"),
    "bulyan": ("strategy.name=bulyan", "strategy.byzantine=0"),
    "fedbuff": ("strategy={name='fedbuff', buffer_size=2, max_in_flight=4}", "clients={}", SLOW),
    "flwr's FedAdam": ("strategy.name=flwr.serverapp.strategy:FedAdam",),
    "private head": ('personalization={private=["fc2.*"], fine_tune_epochs=1}',),
    "power of choice": ("clients.sampling=power-of-choice",),
    "partial work": ("clients.deadline=1.0", "clients.late=partial", SLOW),
}


class Interrupting(RunObserver):
    """Ctrl-C in the middle of a round."""

    def __init__(self, at: int) -> None:
        self.at = at

    def client_finished(self, round_number: int) -> None:
        if round_number == self.at:
            raise KeyboardInterrupt


def run(file: Path, folder: Path, overrides: tuple[str, ...], observer: RunObserver | None = None) -> None:
    simulate(load(file, overrides), Places(file.parent, folder, None), observer or RunObserver())


def files(folder: Path) -> dict[str, bytes]:
    """The model, and what clients know after the last round."""
    last = {path.parent.name: path for path in sorted(folder.glob("clients/*/*"))}
    return {"model": (folder / "model.safetensors").read_bytes()} | {n: p.read_bytes() for n, p in last.items()}


def records(folder: Path) -> list[dict[str, object]]:
    """What the rounds were like, but for the clock on the wall."""
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    clock = {"seconds_train", "seconds_evaluate", "finished_at"}
    return [RoundRecord.model_validate_json(line).model_dump(exclude=clock) for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_in_the_same_bytes(case: str, tiny: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(tiny, whole, CASES[case])
    with pytest.raises(InterruptedRunError):
        run(tiny, resumed, CASES[case], Interrupting(3))
    run(tiny, resumed, CASES[case])
    assert files(resumed) == files(whole)
    assert records(resumed) == records(whole)


@pytest.mark.parametrize("case", ["scaffold", "private head"])
def test_a_damaged_newest_checkpoint_finds_the_clients_state_of_the_one_before(
    case: str, tiny: Path, tmp_path: Path, simulated: Callable[..., tuple[Path, list[str]]]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(tiny, whole, CASES[case])
    with pytest.raises(InterruptedRunError):
        run(tiny, resumed, CASES[case], Interrupting(4))
    newest = max((resumed / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-9])
    run(tiny, resumed, CASES[case])
    assert files(resumed) == files(whole)


@pytest.mark.parametrize("case", ["scaffold", "ditto", "fedbuff", "private head"])
def test_workers_and_one_process_agree(case: str, tiny: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    run(tiny, one, CASES[case])
    run(tiny, many, (*CASES[case], "run.workers=2"))
    assert files(many) == files(one)
    assert records(many) == records(one)
