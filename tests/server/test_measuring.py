"""Measurements of clients put together, through the app, the wire and the gate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord
from sklearn import metrics as sk

from fedtrain import flower, wire
from fedtrain.data.base import Examples
from fedtrain.data.federated import PartitionedData, build
from fedtrain.errors import InputError
from fedtrain.experiment import load
from fedtrain.experiment.sections import Experiment
from fedtrain.params import Params, exchanged
from fedtrain.records import RoundRecord
from fedtrain.server.gate import measurement_objection
from fedtrain.server.measuring import CentralTest
from fedtrain.simulations.outlook import outlook
from fedtrain.tasks.adapted import experiment_task
from fedtrain.training.attacks import make_attack
from fedtrain.training.loop import build_model
from fedtrain.training.metrics.pooled import NONE, common_scaling, make_metrics

Simulated = Callable[..., tuple[Path, list[str]]]
ALL = '["balanced-accuracy", "f1-macro", "recall-weighted", "auroc", "perplexity", "confusion-matrix"]'
OVERRIDES = (f"evaluation.metrics={ALL}", "evaluation.clients_every=2", "evaluation.score_bins=100")


def loaded(file: Path, *overrides: str) -> tuple[Experiment, PartitionedData, Any]:
    experiment = load(file, overrides)
    data = build(experiment.data, None, file.parent, experiment.seed)
    return experiment, data, experiment_task(experiment, data.spec, file.parent)


def records(folder: Path) -> list[RoundRecord]:
    return [RoundRecord.model_validate_json(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def final_model(folder: Path, experiment: Experiment, task: Any) -> torch.nn.Module:
    from safetensors.torch import load_file

    model = build_model(task, experiment.seed)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def test_metrics_over_clients_are_those_of_their_examples_together(tiny: Path, simulated: Simulated) -> None:
    folder, notices = simulated(tiny, "run", *OVERRIDES)
    assert not notices
    experiment, data, task = loaded(tiny, *OVERRIDES)
    model, last = final_model(folder, experiment, task), records(folder)[-1]
    tests = {name: data.client(name).test for name in data.client_ids()}
    y = torch.cat([examples.targets for examples in tests.values()]).numpy()
    with torch.no_grad():
        outputs = {name: model(examples.inputs) for name, examples in tests.items()}
    p = torch.cat(list(outputs.values())).double().softmax(1).numpy()
    said = p.argmax(1)
    found = last.clients
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, said), abs=1e-6)
    assert found["balanced-accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, said), abs=1e-6)
    assert found["f1-macro"] == pytest.approx(sk.f1_score(y, said, average="macro"), abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(sk.log_loss(y, p, labels=range(10))), abs=1e-5)
    area = sk.roc_auc_score(y, p, multi_class="ovr")
    assert abs(found["auroc"] - area) <= found["auroc-bound"] + 1e-9
    for name, examples in tests.items():
        own = sk.recall_score(examples.targets, outputs[name].argmax(1), average="weighted", zero_division=0)
        assert last.per_client[name]["recall-weighted"] == pytest.approx(own, abs=1e-6)
    means = sum(len(t) * last.per_client[name]["f1-macro"] for name, t in tests.items()) / len(y)
    assert abs(means - found["f1-macro"]) > 0.01  # a mean of means is another number


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("personalization.fine_tune_epochs=1",),
        ("strategy={name='ditto', mu=0.1}",),
        ("run.workers=1", 'compression.up=["int8"]'),
    ],
)
def test_bytes_of_sums_are_foreseen(tiny: Path, simulated: Simulated, more: tuple[str, ...]) -> None:
    experiment, data, task = loaded(tiny, *OVERRIDES, *more)
    plan = outlook(experiment, tiny.parent, data, data.sizes(), task)
    folder, _ = simulated(tiny, "run", *OVERRIDES, *more)
    measured = records(folder)[1:]
    assert [(r.bytes_up, r.bytes_down) for r in measured] == list(plan.rounds)
    assert plan.sure == "exact"
    if "strategy" in "".join(more) or "personal" in "".join(more):
        assert "personal_f1-macro" in measured[-1].clients


def test_what_is_for_predictions_is_refused_where_the_task_makes_none(tiny: Path) -> None:
    kmeans = ["task.name=kmeans", "task.options={}"]
    experiment, data, task = loaded(tiny, *kmeans, 'evaluation.metrics=["accuracy"]')
    with pytest.raises(InputError, match=r"evaluation\.metrics is for predictions of the target, which task 'kmeans'"):
        CentralTest(experiment, task, data, torch.device("cpu"), None)
    vae = ["task.name=vae", "task.options={}"]
    with pytest.raises(InputError, match=r"training\.loss is for predictions of the target, which task 'vae'"):
        loaded(tiny, *vae, 'training.loss={name="cross-entropy"}')


def test_the_central_test_is_measured_alike(tiny: Path) -> None:
    experiment, data, task = loaded(tiny, *OVERRIDES, "evaluation.attack={epsilon=0.2}")
    examples = data.central_test()
    central = CentralTest(experiment, task, data, torch.device("cpu"), examples)
    params: Params = dict(build_model(task, 5).named_parameters())
    found = central.measure({name: t.detach() for name, t in params.items()})
    assert {*central.names} - {*found} == set()
    confusion = torch.tensor(central.confusion())
    assert confusion.sum() == len(examples)
    assert confusion.trace() / len(examples) == pytest.approx(found["accuracy"])
    assert found["adversarial-accuracy"] < found["accuracy"]
    for none in (None, Examples(examples.inputs[:0], examples.targets[:0])):
        nobody = CentralTest(experiment, task, data, torch.device("cpu"), none)
        assert (nobody.measure(params), nobody.confusion()) == ({}, [])


def test_a_measurement_is_of_all_batches_and_of_one_model(tiny: Path) -> None:
    """In batches, and after another model: the same as by hand, and each batch has random starts of its own."""
    attack = "evaluation.attack={name='pgd', epsilon=0.3, steps=1, step_size=0.001}"
    experiment, data, task = loaded(tiny, *OVERRIDES, attack, "evaluation.batch_size=7")
    examples, device = data.central_test(), torch.device("cpu")
    central = CentralTest(experiment, task, data, device, examples)
    central.measure(exchanged(build_model(task, 6)))
    model = build_model(task, 5).eval()
    found = central.measure(exchanged(model))
    made = make_attack(experiment.evaluation.attack, data.spec, common_scaling(data), experiment.seed)
    assert made is not None
    losses, right, withstood = [], 0, 0
    for first in range(0, len(examples), 7):
        batch = Examples(examples.inputs[first : first + 7], examples.targets[first : first + 7])
        changed = made.change(model, task, batch, first)
        with torch.no_grad():
            losses.append(task.loss(model(batch.inputs), batch.targets))
            right += int((model(batch.inputs).argmax(1) == batch.targets).sum())
            withstood += int((model(changed).argmax(1) == batch.targets).sum())
    assert found["loss"] == pytest.approx(torch.cat(losses).double().mean().item())
    assert found["accuracy"] == right / len(examples)
    assert found["adversarial-accuracy"] == withstood / len(examples)
    assert torch.tensor(central.confusion()).sum() == len(examples)


def test_a_metric_that_does_not_suit_is_refused_before_anything_is_written(tiny: Path, simulated: Simulated) -> None:
    with pytest.raises(InputError, match=r"evaluation\.metrics is not for targets that are 10 classes: got rmse"):
        simulated(tiny, "run", 'evaluation.metrics=["rmse"]')
    assert not (tiny.parent / "run" / "rounds.jsonl").exists()


def test_sums_come_through_the_wire_and_the_gate(tiny: Path) -> None:
    experiment, data, _ = loaded(tiny, 'evaluation.metrics=["accuracy"]')
    pooled = make_metrics(experiment.evaluation, data.spec, common_scaling(data))
    sums = {"confusion": torch.eye(10, dtype=torch.float64)}
    sent = wire.Measurement("a", 10, {"loss": 1.0}, sums)
    got = wire.measurement(wire.measurement_content(sent))
    assert torch.equal(got.sums["confusion"], sums["confusion"])
    assert measurement_objection(got, "a", pooled) is None
    assert measurement_objection(got, "a", NONE) == "its sums are confusion; expected none"
    assert "do not count" in (measurement_objection(wire.Measurement("a", 9, {}, sums), "a", pooled) or "")
    bare = wire.measurement_content(wire.Measurement("a", 9, {}))
    assert "sums" not in bare
    assert "expected confusion" in (measurement_objection(wire.measurement(bare), "a", pooled) or "")


def test_damaged_sums_are_one_error() -> None:
    content = wire.measurement_content(wire.Measurement("a", 1, {}))
    content["sums"] = ArrayRecord({"confusion": Array("float64", (1,), "numpy.ndarray", b"none")})
    with pytest.raises(flower.RunError, match="arrays cannot be read"):
        wire.measurement(content)


def test_a_client_whose_sums_are_wrong_is_told_of_and_left_out(
    tiny: Path, simulated: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = wire.measurement_content

    def poisoned(value: wire.Measurement) -> Any:
        if value.client_id == "client-1":
            value = wire.Measurement("client-1", value.num_examples, value.metrics, {"confusion": torch.ones(10, 10)})
        return honest(value)

    monkeypatch.setattr("fedtrain.wire.measurement_content", poisoned)
    folder, notices = simulated(tiny, "run", 'evaluation.metrics=["confusion-matrix"]')
    assert notices == [
        "round 4: evaluation of client-1 not used: sums confusion are torch.float32 (10, 10); expected float64 (10, 10)"
    ]
    line = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert sorted(line["per_client"]) == [f"client-{i}" for i in (0, 2, 3, 4, 5)]
