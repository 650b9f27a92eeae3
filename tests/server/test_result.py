"""Which model is the result: early stopping, averages over rounds, and the learning rate on a plateau."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fedtrain import flower, wire
from fedtrain.cli.progress import RunObserver
from fedtrain.cli.running import summary, view_of
from fedtrain.compression.exchange import Exchange
from fedtrain.errors import InputError, InterruptedRunError, RunError
from fedtrain.experiment.sections import Experiment
from fedtrain.experiment.stopping import EmaAveraging, SwaAveraging
from fedtrain.params import Params, exchanged, snapshot
from fedtrain.records import RoundRecord
from fedtrain.report.compare import compare
from fedtrain.report.view import Facts
from fedtrain.rundir import Checkpoint, RunFolder
from fedtrain.server.cohort import Cohort
from fedtrain.server.mail import Mail
from fedtrain.server.prices import ByteBudget, Prices
from fedtrain.server.result import Plateau, Watch, averaged, check_watched
from fedtrain.server.rounds import Server
from fedtrain.simulations.grid import InProcess, SimulationGrid
from fedtrain.strategies.adapter import AlgorithmRunner
from fedtrain.strategies.fedavg import fedavg

VALUES = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan]), min_size=1, max_size=30)


def watched(values: Sequence[float], patience: int, metric: str) -> tuple[Watch, int]:
    """Watch until patience is used up; how many values were seen."""
    watch = Watch(metric)
    for number, value in enumerate(values):
        watch = watch.after(number, value)
        if watch.waited == patience:
            return watch, number + 1
    return watch, len(values)


@given(values=VALUES, patience=st.integers(1, 5), metric=st.sampled_from(["loss", "accuracy"]))
def test_the_best_is_what_hindsight_finds_among_the_values_seen(
    values: list[float], patience: int, metric: str
) -> None:
    watch, seen = watched(values, patience, metric)
    finite = [(value, number) for number, value in enumerate(values[:seen]) if math.isfinite(value)]
    if not finite:
        assert watch.best is None
        return
    sign = -1 if metric == "accuracy" else 1
    best = min(finite, key=lambda found: (sign * found[0], found[1]))
    assert (watch.best, watch.round_number) == best
    assert watch.waited == seen - 1 - best[1] <= patience


def test_a_gain_of_no_more_than_min_delta_does_not_count() -> None:
    watch = Watch("accuracy", min_delta=0.25)
    for number, value in enumerate([0.5, 0.75, 0.7, 0.875]):
        watch = watch.after(number, value)
    assert (watch.best, watch.round_number, watch.waited) == (0.875, 3, 0)
    assert watch.after(4, 1.0).waited == 1


@given(values=VALUES, patience=st.integers(1, 4), least=st.sampled_from([0.0, 0.03]))
def test_the_factor_on_a_plateau_is_that_of_torch(values: list[float], patience: int, least: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=0.0, min_lr=least, eps=0.0
    )
    ours = Plateau(patience, 0.5, least, Watch("loss"))
    for number, value in enumerate(values):
        torchs.step(value)
        ours = ours.after(number, value)
        assert ours.factor == optimizer.param_groups[0]["lr"]


def test_the_factor_never_falls_so_low_that_updates_vanish() -> None:
    plateau = Plateau(1, 0.1, 0.0, Watch("loss"))
    for number in range(100):
        plateau = plateau.after(number, 1.0)
    assert plateau.factor == 1e-6


@pytest.mark.parametrize(
    ("section", "torchs"),
    [
        (EmaAveraging(name="ema", decay=0.75, start_round=3), {"multi_avg_fn": get_ema_multi_avg_fn(0.75)}),
        (SwaAveraging(name="swa", start_round=3), {}),
    ],
)
def test_averages_are_those_of_torch_with_buffers(section: Any, torchs: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    reference = AveragedModel(model, use_buffers=True, **torchs)
    average: Params = {}
    rng = torch.Generator().manual_seed(1)
    for number in range(3, 9):
        with torch.no_grad():
            for t in exchanged(model).values():
                t.copy_(torch.rand(t.shape, generator=rng))
        reference.update_parameters(model)
        average = averaged(section, average, snapshot(exchanged(model)), number)
        expected = exchanged(reference.module)
        assert average.keys() == expected.keys() > {"1.running_var"}
        for name, t in average.items():
            torch.testing.assert_close(t, expected[name])


def test_an_average_of_halves_is_kept_in_float32() -> None:
    half = {"w": torch.tensor([1.0], dtype=torch.float16)}
    section = EmaAveraging(name="ema", decay=0.9999)
    average = averaged(section, averaged(section, {}, half, 1), {"w": half["w"] * 2}, 2)
    assert average["w"].item() == pytest.approx(1.0001, abs=1e-6)  # float16 would stay at 1


# ----- in the round loop: one client adds its factor of the learning rate to w in each round

NAMES = ("a", "b")


@dataclass
class Trial(RunObserver):
    """A server whose model is w = 10 + the sum of the factors so far; its losses by w are given.

    With `stop_at` it is interrupted when it measures for the so many-th time.
    """

    path: Path
    losses: Mapping[float, float]
    sections: Mapping[str, Any]
    notices: list[str] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)  # that client a was sent
    trained_from: list[float] = field(default_factory=list)  # by client a
    measured: list[float] = field(default_factory=list)  # by client a
    stop_at: int = 0
    calls: int = 0

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def central(self, params: Params) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return {"loss": self.losses.get(round(float(params["w"]), 6), 9.0)}

    def server(self) -> Server:
        flower.enter_run(1)
        folder = RunFolder(self.path)
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        data = {"name": "digits", "clients": 2, "test": 0.2}
        experiment = Experiment.model_validate({"data": data, "run": {"checkpoint_seconds": 0.0}, **self.sections})
        self.runner = AlgorithmRunner(fedavg().algorithm, START)
        cohort = Cohort(experiment, np.array([1, 1]), None)
        prices = Prices(experiment, Exchange(experiment.compression, START, (), 0), {}, {}, ["loss"])
        mail = Mail(prices, self.runner, cohort, folder, lambda node: NAMES[node - 1])
        grid = SimulationGrid(InProcess(self._app(), NAMES), 2)
        budget = ByteBudget.of(experiment.compression, folder.read_rounds())
        return Server(experiment, self.runner, cohort, grid, folder, self.central, self, mail, byte_budget=budget)

    def run(self) -> tuple[float, Server]:
        """Run from where it was."""
        server = self.server()
        start = server.folder.latest_checkpoint(self.notice) or Checkpoint(0, START, self.runner.state)
        if server.folder.rounds.exists():
            server.folder.drop_rounds_after(start.round_number or -1)
        return float(server.run(start)["w"]), server

    def records(self) -> list[RoundRecord]:
        """What does not depend on the clock."""
        clock = {"seconds_train": 0.0, "seconds_evaluate": 0.0, "finished_at": ""}
        return [record.model_copy(update=clock) for record in RunFolder(self.path).read_rounds()]

    def _app(self) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            name, instruction = str(context.node_config["client-id"]), wire.instruction(message)
            if name == "a":
                self.factors.append(instruction.lr_factor)
                self.trained_from.append(float(instruction.params["w"]))
            delta = {"w": torch.tensor([instruction.lr_factor])}
            update = wire.Update(name, instruction.round_number, delta, 1, {"loss": 1.0})
            return Message(wire.update_content(update), reply_to=message)

        @app.evaluate()
        def measure(message: Message, context: Context) -> Message:
            name, instruction = str(context.node_config["client-id"]), wire.instruction(message)
            assert instruction.lr_factor == 1.0
            w = float(instruction.params["w"])
            self.measured += [w] if name == "a" else []
            return Message(
                wire.measurement_content(wire.Measurement(name, 1, {"loss": self.losses.get(w, 9.0)})), reply_to=message
            )

        return app


START = {"w": torch.tensor([10.0])}
LOSSES = {10: 5.0, 11: 3.0, 12: 4.0, 13: 2.0, 14: 2.5, 15: 2.0, 16: 1.0}  # best of those seen: 13


def trial(path: Path, losses: Mapping[float, float] = LOSSES, **sections: Any) -> Trial:
    return Trial(path / "run", losses, {"rounds": 8, **sections})


STOPPING = {"early_stopping": {"patience": 2}}


def test_the_run_ends_without_a_better_value_and_its_best_model_is_the_result(tmp_path: Path) -> None:
    run = trial(tmp_path, training=STOPPING)
    w, server = run.run()
    assert w == 13.0
    why = "loss on the central test set got no better in 2 evaluations; the best is of round 3"
    assert (server.result.round_number, server.result.ended) == (3, why)
    assert run.notices == [f"the run ends after round 5: {why}"]
    records = run.records()
    assert [record.round_number for record in records] == [0, 1, 2, 3, 4, 5]
    assert [record.result_round for record in records] == [None] * 5 + [3]
    assert records[-1].central == {"loss": 2.0}  # of the round's own model
    assert run.measured == [13.0]  # by the clients, once, and of the result
    assert records[-1].clients == {"loss": 2.0}


def test_a_run_through_all_rounds_restores_its_best_model_too(tmp_path: Path) -> None:
    w, server = trial(tmp_path, rounds=5, training={"early_stopping": {"patience": 9}}).run()
    assert (w, server.result.round_number, server.result.ended) == (13.0, 3, "")


def test_the_untrained_model_may_be_the_best(tmp_path: Path) -> None:
    w, server = trial(tmp_path, {}, training=STOPPING).run()
    assert (w, server.result.round_number) == (10.0, 0)


def test_without_a_finite_value_the_last_model_is_the_result(tmp_path: Path) -> None:
    run = trial(tmp_path, dict.fromkeys(range(10, 20), math.nan), training=STOPPING)
    w, server = run.run()
    assert (w, server.result.round_number) == (11.0, 1)  # the untrained model counts
    assert server.result.ended.endswith("in 2 evaluations; no value was finite")


def test_clients_are_watched_and_the_central_test_then_measures_the_result(tmp_path: Path) -> None:
    run = trial(
        tmp_path,
        {12: 4.0, 14: 2.5, 16: 3.0},
        training={"early_stopping": {"on": "clients", "patience": 1}},
        evaluation={"clients_every": 2, "central_every": 0},
    )
    w, server = run.run()
    assert (w, server.result.round_number) == (14.0, 4)
    assert run.measured == [12.0, 14.0, 16.0]
    assert [record.central for record in run.records()] == [{}] * 6 + [{"loss": 2.5}]


def test_nothing_is_kept_where_nothing_is_asked_for(tmp_path: Path) -> None:
    run = trial(tmp_path, rounds=3)
    w, server = run.run()
    assert w == 13.0
    assert (server.result.round_number, server.result.memory()) == (3, {})
    assert run.records()[-1].result_round is None


@pytest.mark.parametrize("stop_at", range(1, 7))
def test_an_interrupted_run_has_the_same_result_and_the_same_records(tmp_path: Path, stop_at: int) -> None:
    training = {**STOPPING, "average": {"decay": 0.5, "start_round": 2}}
    # Averages: 12, 12.5, 13.25, 14.125, ...
    losses = {10: 9.5, 11: 3.0, 12: 2.0, 12.5: 1.0, 13.25: 2.0, 14.125: 2.0}
    whole, halved = trial(tmp_path / "whole", losses, training=training), trial(tmp_path, losses, training=training)
    expected, server = whole.run()
    assert (expected, server.result.round_number) == (12.5, 3)
    halved.stop_at = stop_at
    with pytest.raises(InterruptedRunError):
        halved.run()
    again, server = halved.run()
    assert (again, server.result.round_number) == (12.5, 3)
    assert halved.records() == whole.records()
    assert server.result.ended == "loss on the central test set got no better in 2 evaluations; the best is of round 3"


def test_a_run_that_has_ended_trains_no_more_when_it_is_taken_up_again(tmp_path: Path) -> None:
    run = trial(tmp_path, training=STOPPING)
    run.run()
    before = len(run.factors)
    w, server = run.run()  # as after a kill before the model was written
    assert (w, server.result.round_number) == (13.0, 3)
    assert len(run.factors) == before
    assert "got no better in 2 evaluations" in server.result.ended


def test_the_average_is_measured_and_is_the_result_and_clients_train_from_the_raw_model(tmp_path: Path) -> None:
    average = {"name": "swa", "start_round": 2}
    losses = {10: 0.0, 11: 1.0, 12: 2.0, 12.5: 2.5, 13: 3.0}
    run = trial(tmp_path, losses, rounds=4, training={"average": average}, evaluation={"clients_every": 1})
    w, server = run.run()
    assert w == 13.0  # of 12, 13 and 14
    assert server.result.round_number == 4
    assert [record.central["loss"] for record in run.records()] == [0.0, 1.0, 2.0, 2.5, 3.0]
    assert run.measured == [11.0, 12.0, 12.5, 13.0]
    assert run.trained_from == [10.0, 11.0, 12.0, 13.0]


def test_on_a_plateau_clients_are_sent_a_smaller_factor(tmp_path: Path) -> None:
    plateau = {"name": "plateau", "patience": 1, "gamma": 0.5, "warmup_rounds": 2}
    run = trial(tmp_path, {10: 1.0}, rounds=6, training={"schedule": plateau})
    run.run()
    # All values after the first are worse: a fall after each two of them.
    assert run.factors == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert [record.lr_factor for record in run.records()[1:]] == [0.5, 1.0, 0.5, 0.5, 0.25, 0.25]  # with the warm-up
    halved = trial(tmp_path / "halved", {10: 1.0}, rounds=6, training={"schedule": plateau})
    halved.stop_at = 5
    with pytest.raises(InterruptedRunError):
        halved.run()
    halved.run()
    assert halved.records() == run.records()


def test_a_byte_budget_has_room_for_the_evaluation_that_ends_the_run(tmp_path: Path) -> None:
    whole = trial(tmp_path / "whole", training=STOPPING)
    whole.run()
    weights = [record.bytes_up + record.bytes_down for record in whole.records()]
    assert weights[5] > weights[4]
    run = trial(tmp_path, training=STOPPING, compression={"max_bytes": sum(weights) - 1})
    w, server = run.run()
    assert len(run.records()) == 5  # the last round did not fit
    assert (w, "max_bytes" in server.result.ended) == (13.0, True)


# ----- what is refused

WATCHING = Experiment.model_validate(
    {"data": {"name": "digits", "clients": 2}, "training": {"early_stopping": {"metric": "accurcy"}}}
)


def test_a_metric_that_is_not_measured_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(InputError, match=r"not measured on the central test set.*accurcy.*Did you mean accuracy\?"):
        check_watched(WATCHING, ["loss", "accuracy"], [1])


def test_a_target_that_is_not_measured_is_refused() -> None:
    goal = {"target_metric": "acuracy", "target_value": 0.9}
    experiment = Experiment.model_validate({"data": {"name": "digits", "clients": 2}, "evaluation": goal})
    with pytest.raises(InputError, match=r"target_metric is not measured: got acuracy.*Did you mean accuracy\?"):
        check_watched(experiment, ["loss", "accuracy"], [1])
    check_watched(experiment, ["loss", "acuracy"], [1])


def test_a_central_test_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"training\.early_stopping watches the central test set.*data\.central_test"):
        check_watched(WATCHING, ["accurcy"], None)
    with pytest.raises(InputError, match=r"in which direction.*accurcy.*mode"):
        check_watched(WATCHING, ["accurcy"], [1])


def instruction(**more: Any) -> wire.Instruction:
    flower.enter_run(1)
    content = wire.instruction_content(flower.array_record(START), 1, **more)
    return wire.instruction(Message(content, 1, "train"))


def test_a_mode_says_in_which_direction_an_own_metric_gets_better() -> None:
    section = WATCHING.training.early_stopping
    assert section is not None
    training = WATCHING.training.model_copy(update={"early_stopping": section.model_copy(update={"mode": "max"})})
    check_watched(WATCHING.model_copy(update={"training": training}), ["accurcy"], [1])
    assert Watch("own", "max").after(1, 1.0).after(2, 2.0).round_number == 2
    assert Watch("own", "min").after(1, 1.0).after(2, 2.0).round_number == 1
    assert Watch("accuracy_digit").after(1, 1.0).after(2, 2.0).round_number == 2


def test_an_instruction_without_a_factor_leaves_the_rate_as_it_is() -> None:
    assert instruction().lr_factor == 1.0
    assert instruction(lr_factor=0.25).lr_factor == 0.25


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, 1, "half"])
def test_a_client_refuses_a_factor_that_is_no_finite_positive_number(factor: Any) -> None:
    with pytest.raises(RunError, match="'lr-factor' is wrong"):
        instruction(lr_factor=factor)


# ----- with real clients


@pytest.mark.parametrize("on", ["central", "clients"])
def test_reports_and_comparisons_go_by_the_model_that_is_the_result(
    tiny: Path, simulated: Callable[..., tuple[Path, list[str]]], on: str
) -> None:
    """In the last round, what is watched was measured on that round's model, and the other part on the result."""
    stopping = f"training.early_stopping={{on='{on}', patience=1, min_delta=9.0}}"
    folder, _ = simulated(tiny, "run", stopping, "evaluation.clients_every=1", "rounds=3")
    view = view_of(RunFolder(folder))
    best, last = view.manifest.result_round, view.records[-1]
    assert best is not None
    assert best < last.round_number
    watched = next(record for record in view.records if record.round_number == best)
    central, clients = (watched.central, last.clients) if on == "central" else (last.central, watched.clients)
    facts = Facts.of(view)
    assert (facts.final, facts.clients_mean) == (central["accuracy"], clients["accuracy"])
    final = compare({"run": view}).groups[0].final
    assert final is not None
    assert final.mean == central["accuracy"]
    assert getattr(watched, on)["loss"] != getattr(last, on)["loss"]


def test_clients_train_at_the_factor(tiny: Path, simulated: Callable[..., tuple[Path, list[str]]]) -> None:
    plateau = 'training.schedule={name="plateau", metric="accuracy", patience=1, gamma=1e-2}'
    folder, _ = simulated(tiny, "run", "training.optimizer.lr=1e-5", plateau)
    records = RunFolder(folder).read_rounds()[1:]
    assert [record.lr_factor for record in records] == [1.0, 1.0, 1e-2, 1e-2]
    assert 0 < records[2].update_norm < 0.1 * records[1].update_norm


def test_the_summary_says_why_the_run_ended_and_which_model_is_its_result(
    tiny: Path, simulated: Callable[..., tuple[Path, list[str]]]
) -> None:
    stopping = "training.early_stopping={patience=1, min_delta=9.0}"
    folder, notices = simulated(tiny, "stopped", stopping)
    said = summary(RunFolder(folder))
    why = "loss on the central test set got no better in 1 evaluation; the best is of round 0"
    assert f"The run ended after round 1 of 4: {why}." in said
    assert "The result is the model of round 0, and not of round 1, the last." in said
    assert any(text.startswith("Central accuracy: ") and "after round 0" in text for text in said)
    assert notices == [f"the run ends after round 1: {why}"]
    assert simulated(tiny, "stopped", stopping) == (folder, [])  # it is complete
    averaging = 'training.average={name="swa", start_round=2}'
    folder, _ = simulated(tiny, "averaged", averaging)
    assert "The result is the mean of the models of rounds 2 to 4." in summary(RunFolder(folder))


def test_what_is_not_measured_is_refused_before_anything_is_written(tiny: Path, tmp_path: Path, simulated: Any) -> None:
    with pytest.raises(InputError, match=r"not measured on the central test set.*There is: loss, accuracy"):
        simulated(tiny, "run", 'training.early_stopping.metric="x"')
    assert not (tmp_path / "run" / "manifest.json").exists()
