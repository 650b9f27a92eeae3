import json
import math
from typing import Any

import pytest
import torch

from fedtrain.experiment.gate import GateSection
from fedtrain.server.gate import Gate, looks_diverged, measurement_objection
from fedtrain.wire import Measurement, Update

MODEL = {"w": torch.tensor([3.0, 4.0, 0.0]), "s": torch.tensor(0.0)}  # norm 5, 4 entries: a scale of 5 + sqrt(4) = 7
VECTORS = {"c": torch.zeros(2)}


def gate(extra: dict[str, torch.Tensor] | None = None, **section: Any) -> Gate:
    return Gate(GateSection(**section), MODEL, extra or {})


def judge(gate: Gate, norm: float = 1.0, examples: int = 10, *, client: str = "a", **extra: torch.Tensor) -> str:
    delta = {"w": torch.tensor([0.0, norm, 0.0]), "s": torch.tensor(0.0)}
    return gate.objection(Update(client, 4, delta, examples, {"loss": 0.5}, extra), client, 4) or ""


def c(norm: float) -> torch.Tensor:
    return torch.tensor([norm, 0.0])


def test_the_size_of_an_update_against_the_model() -> None:
    assert judge(gate(), 699.0) == ""
    assert judge(gate(), 701.0) == (
        "the update's L2 norm is out of all proportion: got 701; expected at most 700 (gate.norm_factor)"
    )
    assert judge(gate(norm_factor=0), 701.0) == ""


def test_numbers_without_bounds_look_as_if_training_diverged() -> None:
    assert looks_diverged(judge(gate(), 701.0))
    assert looks_diverged(judge(gate(), math.nan))
    worse = Update("a", 4, {"w": torch.ones(3), "s": torch.tensor(0.0)}, 10, {"loss": math.nan}, {})
    assert looks_diverged(gate().objection(worse, "a", 4) or "")
    judged = gate(max_examples=50_000)
    assert [judge(judged) for _ in range(5)] == [""] * 5
    too_many = judge(judged, examples=20_001)
    assert "out of all proportion" in too_many
    assert not looks_diverged(too_many)


def test_the_size_of_an_update_against_the_median_of_the_accepted_ones() -> None:
    judged = gate(norm_factor=10)
    for norm in (1.0, 2.0, 3.0, 300.0):
        assert judge(judged, norm) == ""
    assert judge(judged, 600.0) == ""  # the fifth: four are too few for a median
    assert judge(judged, 30.1) != ""  # 10 times the median of 1, 2, 3, 300, 600
    assert judge(judged, 29.9) == ""  # the refused one did not count
    assert judge(gate(norm_factor=10), 600.0) == ""


def test_only_the_last_hundred_count() -> None:
    judged = gate(norm_factor=10)
    for norm in [10.0] * 100 + [1.0] * 51:
        assert judge(judged, norm) == ""
    assert judge(judged, 10.1) != ""


def test_examples_against_the_mean_of_the_accepted_ones() -> None:
    judged = gate(max_examples=50_000)
    assert "from 1 to 50000" in judge(judged, examples=50_001)
    for examples in (10, 10, 20, 30, 30):
        assert judge(judged, examples=examples) == ""
    assert judge(judged, examples=20_001) == (
        "num_examples is out of all proportion to other clients': "
        "got 20001; expected at most 20000 (gate.examples_factor)"
    )
    assert judged.memory()["offences"] == {"a": 1}  # for the first; a very large client may be honest
    assert judge(judged, examples=20_000) == ""
    assert judge(gate(examples_factor=0), examples=1) == ""


def test_examples_and_norms_that_span_a_factor_of_a_hundred_are_honest() -> None:
    judged = gate()
    assert [judge(judged, size / 100, size) for size in [1] * 20 + [10] * 10 + [100]] == [""] * 31


def test_extra_tensors_have_a_size_of_their_own() -> None:
    judged = gate(VECTORS, norm_factor=10)
    assert "extra tensors' L2 norm" in judge(judged, c=c(1e30))
    assert [judge(judged, c=c(value)) for value in (0.0, 0.0, 0.0, 5.0, 50_000.0)] == [""] * 5
    assert judge(judged, c=c(1000.0)) == ""  # a median of 0 is none
    assert judge(judged, c=c(5.0)) == ""
    assert "extra tensors' L2 norm" in judge(judged, c=c(51.0))  # the median of 0, 0, 0, 5, 5, 1000, 50000 is 5


def test_single_extra_numbers_have_no_size() -> None:
    judged = gate({"loss": torch.tensor(0.0)})
    losses = (1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 1e9)
    assert [judge(judged, loss=torch.tensor(loss)) for loss in losses] == [""] * 6


def test_values_whose_square_is_no_float_are_refused_too() -> None:
    wide = {"w": torch.zeros(2, dtype=torch.float64)}
    update = Update("a", 4, {"w": torch.tensor([1e200, 0.0], dtype=torch.float64)}, 10, {"loss": 0.5})
    assert "immense" in str(Gate(GateSection(), wide, {}).objection(update, "a", 4))


def test_a_model_without_tensors_has_no_zero_update() -> None:
    assert Gate(GateSection(), {}, {}).objection(Update("a", 4, {}, 10, {"loss": 0.5}), "a", 4) is None


def test_offences_add_up_until_a_client_is_set_aside() -> None:
    judged = gate(max_offences=2)
    assert judge(judged, math.nan, client="a")
    assert judge(judged, client="b") == ""
    assert judged.set_aside == set()
    assert judged.refuse("a", "cannot\nbe " + "x" * 400) == "cannot\N{REPLACEMENT CHARACTER}be " + "x" * 289 + "…"
    assert judged.set_aside == {"a"}


def test_nobody_is_set_aside_without_a_limit() -> None:
    judged = gate(max_offences=0)
    judged.refuse("a", "why")
    assert judged.set_aside == set()


def test_the_algorithms_objection_comes_last_and_leaves_no_trace_but_the_offence() -> None:
    asked: list[str] = []

    def also(update: Update) -> str | None:
        asked.append(update.client_id)
        return "its loss is a lie" if update.client_id == "b" else None

    judged = Gate(GateSection(), MODEL, {}, also=also)
    assert judge(judged, 1.0, client="a") == ""
    assert judge(judged, 2.0, client="b") == "its loss is a lie"
    assert "NaN" in judge(judged, math.nan, client="c")
    assert asked == ["a", "b"]
    assert judged.memory()["norms"] == [1.0]
    assert judged.memory()["offences"] == {"b": 1, "c": 1}


def test_a_gate_made_from_memory_goes_on_alike() -> None:
    first = gate(VECTORS, norm_factor=10, max_offences=1)
    for norm in (0.1, 0.2, 0.3, math.inf, 0.7, 0.9):
        judge(first, norm, examples=int(norm * 10) if norm < 1 else 1, c=c(norm))
    memory = json.loads(json.dumps(first.memory()))
    larger = {name: t + 100 for name, t in MODEL.items()}  # the parameters have moved on
    second = Gate(GateSection(norm_factor=10, max_offences=1), larger, VECTORS, memory)
    assert second.memory() == first.memory()
    assert second.set_aside == {"a"}
    for norm in (1.0, 3.1, 800.0, 0.5):
        assert judge(second, norm, c=c(norm)) == judge(first, norm, c=c(norm))
    assert second.memory() == first.memory()


@pytest.mark.parametrize(
    ("why", "client", "examples", "metrics"),
    [
        ("another client", "b", 1, {}),
        ("num_examples", "a", -1, {}),
        ("num_examples", "a", True, {}),
        ("num_examples", "a", 10**12, {}),
        ("101 metrics", "a", 1, {str(i): 0.0 for i in range(101)}),
        ("printable name", "a", 1, {"x" * 101: 0.0}),
        ("printable name", "a", 1, {"\x1b[31m": 0.0}),
        ("accuracy is not a number", "a", 1, {"loss": math.inf, "accuracy": math.nan}),
        ("", "a", 0, {"loss": math.inf}),
    ],
)
def test_measurements(why: str, client: str, examples: int, metrics: dict[str, float]) -> None:
    reason = measurement_objection(Measurement(client, examples, metrics), "a") or ""
    assert why in reason
    assert reason.isprintable()
    assert bool(reason) == bool(why)
