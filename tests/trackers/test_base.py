from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedtrain.experiment.sections import Experiment
from fedtrain.records import RoundRecord
from fedtrain.trackers.base import Memory, TrackedRun, scalars

EXPERIMENT = Experiment.model_validate({"name": "x", "data": {"name": "digits", "clients": 3}})


def record(**changes: Any) -> RoundRecord:
    values: dict[str, Any] = {"round_number": 4, "participants": ["ann", "bob"], "num_examples": 30, "bytes_up": 7}
    return RoundRecord.model_validate(values | changes)


def test_a_record_becomes_flat_numbers() -> None:
    found = scalars(
        record(
            train={"loss": 0.5},
            central={"accuracy": 0.9},
            clients={"accuracy": 0.8, "personal_accuracy": 0.85},
            quarantined={"eve": "NaN"},
            drift={"ann": (0.5, 1.0), "bob": (0.25, 3.0)},
            diversity=0.75,
            virtual_seconds=3.0,
            client_seconds=8.0,
        )
    )
    assert found == {
        "train/loss": 0.5,
        "central/accuracy": 0.9,
        "clients/accuracy": 0.8,
        "clients/personal_accuracy": 0.85,
        "bytes/up": 7,
        "bytes/down": 0,
        "round/participants": 2,
        "round/quarantined": 1,
        "round/set_aside": 0,
        "round/ended": 0,
        "round/late": 0,
        "round/staleness": 0.0,
        "round/lr_factor": 1.0,
        "round/examples": 30,
        "update/norm": 0.0,
        "update/diversity": 0.75,
        "update/cosine": 0.375,
        "update/norm_ratio": 2.0,
        "seconds/train": 0.0,
        "seconds/evaluate": 0.0,
        "seconds/virtual": 3.0,
        "seconds/clients": 8.0,
        "seconds/wasted": 0.0,
    }


def test_the_untrained_model_has_what_was_measured_and_no_more() -> None:
    found = scalars(RoundRecord(round_number=0, central={"loss": 2.3}, epsilon=0.0))
    assert found == {"central/loss": 2.3, "privacy/epsilon": 0.0, "seconds/evaluate": 0.0}


def test_no_client_is_named_and_no_single_clients_number_goes_out() -> None:
    found = scalars(
        record(
            per_client={"secret-hospital": {"accuracy": 0.123, "num_examples": 9}},
            client_bytes={"secret-hospital": (123, 456)},
            quarantined={"secret-hospital": "NaN"},
            late=["secret-hospital"],
        )
    )
    assert "secret" not in json.dumps(found)
    assert not {0.123, 123, 456} & set(found.values())


def test_hostile_names_become_tags_that_stay_apart() -> None:
    names = ["a/../b", "a b", "a_b", "..", "", "x\x1b[2J", "é", "y" * 100, "y" * 101, "\ud800"]
    tags = [tag.removeprefix("clients/") for tag in scalars(record(clients=dict.fromkeys(names, 1.0)))]
    tags = tags[: len(names)]
    assert len(set(tags)) == len(names)
    assert all(tag and len(tag) < 70 and tag[0] != "." for tag in tags)
    assert not [tag for tag in tags if set(tag) & set("/ \x1b[")]
    assert {"a_b", "é"} < set(tags)


def test_memory_is_found_again_and_keeps_trackers_apart(tmp_path: Path) -> None:
    run = TrackedRun(EXPERIMENT, tmp_path)
    first, other = Memory(run, "wandb"), Memory(run, "mlflow")
    assert (first.run_id, first.last_round) == ("", -1)
    first.run_id, first.last_round, other.run_id = "w", 5, "m"
    first.save()
    other.save()
    again = [Memory(run, name) for name in ("wandb", "mlflow")]
    assert [(memory.run_id, memory.last_round) for memory in again] == [("w", 5), ("m", -1)]


def test_where_clients_are_protected_nothing_is_told_of_who_took_part() -> None:
    document = EXPERIMENT.model_dump(exclude_none=True) | {
        "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
        "clients": {"sampling": "poisson"},
    }
    privacy = Experiment.model_validate(document).privacy
    found = scalars(record(epsilon=1.5, central={"accuracy": 0.9}, seconds_train=2.0, late=["eve"]), privacy)
    assert set(found) == {"central/accuracy", "privacy/epsilon", "seconds/evaluate", "round/lr_factor", "update/norm"}
