from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtrain.statefile import UnsavableStateError, copy_state, read_state, write_state

STATE = {
    "w": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "deep": OrderedDict({"n": 2, "half": torch.ones(2, dtype=torch.bfloat16), "empty": {}}),
    "history": [1, 0.1, None, "text", True, [float("inf")], {"loss": 0.5}],
}


def content(value: Any) -> Any:
    """Everything, to compare with ==; 1, 1.0 and True apart."""
    if isinstance(value, dict):
        return [(name, content(inner)) for name, inner in value.items()]
    if isinstance(value, list):
        return [content(item) for item in value]
    return (value.dtype, value.stride(), value.tolist()) if isinstance(value, torch.Tensor) else (type(value), value)


def test_a_copy_is_what_a_file_would_give_back(tmp_path: Path) -> None:
    write_state(tmp_path / "state", STATE)
    copied, read = copy_state(STATE), read_state(tmp_path / "state")
    assert content(copied) == content(read)
    assert content(copied)[0][1] == (torch.float32, (2, 1), [[0, 3], [1, 4], [2, 5]])
    assert copied["history"] == STATE["history"]
    assert type(copied["deep"]) is dict


def test_a_number_of_numpy_becomes_pythons_at_once_and_not_only_in_a_resumed_run() -> None:
    assert content(copy_state({"n": np.float64(0.1)})) == [("n", (float, 0.1))]


def test_a_copy_shares_nothing() -> None:
    tensor, numbers = torch.zeros(2), [1]
    copied = copy_state({"deep": {"t": tensor, "again": tensor}, "numbers": numbers})
    copied["deep"]["t"].add_(1)
    copied["numbers"].append(2)
    assert (tensor.tolist(), copied["deep"]["again"].tolist(), numbers) == ([0, 0], [0, 0], [1])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"m": [1, torch.ones(1)]}, "state['m'][1] is of type torch.Tensor; a state maps names to tensors, numbers,"),
        ({"m": [{"w": torch.ones(1)}]}, "state['m'][0]['w'] is of type torch.Tensor"),
        ({"m": np.float32(1)}, "state['m'] is of type numpy.float32"),
        ({"deep": {"m": np.ones(1)}}, "state['deep']['m'] is of type numpy.ndarray"),
        ({"m": (1, 2)}, "state['m'] is of type tuple"),  # it would come back as a list
        ({"m": {1, 2}}, "state['m'] is of type set"),
        ({"m": b"bytes"}, "state['m'] is of type bytes"),
        ({"deep": {3: 1.0}}, "state['deep'] has a name of type int: 3"),
        ({"deep": [{3: 1.0}]}, "state['deep'][0] has a name of type int: 3"),
        ({"m": torch.ones(1, dtype=torch.complex128)}, "state['m'] is a tensor of torch.complex128"),
        ({"m": torch.eye(2).to_sparse()}, "state['m'] is a tensor of torch.float32 and torch.sparse_coo"),
        ([1], "state is of type list"),
        (None, "state is of type NoneType"),
    ],
)
def test_what_would_not_come_back_as_it_was_is_refused_with_its_place(tmp_path: Path, state: Any, message: str) -> None:
    for act in (copy_state, lambda refused: write_state(tmp_path / "state", refused)):
        with pytest.raises(UnsavableStateError) as caught:
            act(state)
        assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
