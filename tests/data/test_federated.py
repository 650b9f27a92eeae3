from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtrain.data.base import Dataset, DataSpec
from fedtrain.data.federated import PartitionedData, _with_classes, build
from fedtrain.data.partition import RowFacts, make_partition
from fedtrain.errors import DataError
from fedtrain.experiment.sections import DataSection
from fedtrain.seeds import generator

NAN = float("nan")


def spread(dataset: Dataset, seed: int = 0, **fields: Any) -> PartitionedData:
    """A data set of its own over clients, as `build` does it."""
    section = DataSection(name="own:loader", **({"clients": 2} | fields))
    index = None if dataset.client_index is None else dataset.client_index.numpy()
    rows = RowFacts(len(dataset.targets), dataset.labels(), dataset.spec.num_classes, None, dataset.client_names, index)
    partition = make_partition(section.partition, section.clients, rows, generator(seed, "partition"))
    return PartitionedData(dataset, partition, section, seed)


def table(inputs: list[list[float]], clients: list[int]) -> Dataset:
    """Rows of two clients, "a" and "b", of alternating classes."""
    rows = torch.tensor(inputs)
    spec = DataSpec((rows.shape[1],), "class", 2)
    names = ("a", "b")
    return Dataset("own", spec, rows, torch.arange(len(rows)) % 2, None, None, names, torch.tensor(clients))


NATURAL: dict[str, Any] = {"partition": {"kind": "natural"}, "clients": None}
TWO = table([[1.0, NAN], [3.0, NAN], [10.0, 4.0], [NAN, 8.0]], [0, 0, 1, 1])


def digits(seed: int = 0, **fields: Any) -> PartitionedData:
    return build(DataSection(**({"name": "digits", "clients": 10} | fields)), None, Path(), seed)


def test_every_row_is_on_one_client_once_and_splits_are_stratified() -> None:
    data = digits(test=0.2, validation=0.1)
    clients = [data.client(client_id) for client_id in data.client_ids()]
    parts = [part for client in clients for part in (client.train, client.validation, client.test)]
    assert sorted(map(tuple, torch.cat([part.inputs for part in parts]).flatten(1).tolist())) == sorted(
        map(tuple, data.dataset.inputs.flatten(1).tolist())
    )
    assert [len(client.train) for client in clients] == data.sizes().tolist()
    assert [len(client.test) for client in clients] == [36] * 10
    whole = torch.bincount(torch.cat([getattr(clients[0], part).targets for part in ("train", "validation", "test")]))
    held_out = torch.bincount(clients[0].test.targets, minlength=10)
    assert (held_out - 0.2 * whole).abs().max() < 1


def test_a_client_depends_on_seed_and_name_alone() -> None:
    first, second, other = digits(test=0.2), digits(test=0.2), digits(test=0.2, seed=1)
    second.client("client-3")
    for name in ("client-0", "client-9"):
        assert torch.equal(first.client(name).test.inputs, second.client(name).test.inputs)
    assert not torch.equal(first.client("client-0").train.inputs, other.client("client-0").train.inputs)


def test_the_split_of_a_natural_client_follows_the_seed() -> None:
    dataset = table([[float(value)] for value in range(40)], [0] * 20 + [1] * 20)
    first, other = (spread(dataset, seed, test=0.5, **NATURAL).client("a").test.inputs for seed in (0, 1))
    assert not torch.equal(first, other)


def test_without_splits_nothing_is_held_out() -> None:
    client = digits().client("client-0")
    assert (len(client.train), len(client.validation), len(client.test)) == (179, 0, 0)
    assert client.test.inputs.shape == (0, 1, 8, 8)
    assert digits().central_test().inputs.shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("scaling", "a", "b"),
    [
        ("none", [[1, 0], [3, 0]], [[10, 4], [10, 8]]),
        ("client", [[-1, 0], [1, 0]], [[0, -1], [0, 1]]),
        # Over all values that are there: mean 14/3 and deviation of (1, 3, 10); mean 6 and deviation 2 of (4, 8).
        ("pooled", [[-0.9502, 0], [-0.4319, 0]], [[1.3822, -1], [1.3822, 1]]),
        ({"mean": [1, 4], "std": [2, 4]}, [[0, 0], [1, 0]], [[4.5, 0], [4.5, 1]]),
    ],
)
def test_scaling_and_missing_values(scaling: Any, a: list[list[float]], b: list[list[float]]) -> None:
    data = spread(TWO, scaling=scaling, **NATURAL)
    for name, expected in (("a", a), ("b", b)):
        torch.testing.assert_close(data.client(name).train.inputs, torch.tensor(expected).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scaling", ["client", "pooled"])
def test_scaling_is_fitted_to_training_rows_only(scaling: str) -> None:
    rows = [[float(value)] for value in range(40)]
    data = spread(table(rows, [0] * 20 + [1] * 20), scaling=scaling, test=0.5, **NATURAL)
    train = [data.client(name).train.inputs for name in ("a", "b")]
    for fitted in train if scaling == "client" else [torch.cat(train)]:
        torch.testing.assert_close(fitted.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
        torch.testing.assert_close(fitted.std(correction=0), torch.tensor(1.0))
    assert abs(float(data.client("a").test.inputs.mean())) > 1e-3


@pytest.mark.parametrize("missing", ["mean", "median", "zero"])
def test_a_client_that_never_trains_is_scaled_by_its_own_rows(missing: str) -> None:
    two = table([[1.0, NAN], [3.0, NAN], [10.0, 4.0], [NAN, 8.0], [30.0, 6.0]], [0, 0, 1, 1, 1])
    data = spread(two, scaling="client", missing=missing, held_out=["b"], **NATURAL)
    inputs = data.client("b").test.inputs
    assert inputs.isfinite().all()
    torch.testing.assert_close(inputs.mean(0)[1], torch.tensor(0.0))
    assert inputs[1, 0] == {"mean": 0.0, "median": 0.0}.get(missing, inputs[1, 0])


def test_incomplete_rows_may_be_dropped_before_they_are_spread(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,z,y\n1,,a\n2,5,b\n3,6,a\n")
    section = DataSection(path="t.csv", target="y", clients=1, missing="drop")
    assert build(section, None, tmp_path, 0).client("client-0").train.inputs.tolist() == [[2, 5], [3, 6]]
    (tmp_path / "t.csv").write_text("x,z,y\n1,,a\n2,,b\n")
    with pytest.raises(DataError, match=r"every row of t\.csv has a missing feature"):
        build(section, None, tmp_path, 0)


def test_pixels_are_scaled_when_gathered() -> None:
    images = torch.tensor([[[[0, 255]]]] * 4, dtype=torch.uint8)
    spec = DataSpec((1, 1, 2), "class", 2)
    dataset = Dataset("own", spec, images, torch.tensor([0, 1, 0, 1]), pixel_mean=0.5, pixel_std=0.25)
    data = spread(dataset)
    assert data.client("client-0").train.inputs[0].tolist() == [[[-2.0, 2.0]]]
    assert data.preprocess(images[:1]).tolist() == [[[[-2.0, 2.0]]]]
    assert spread(dataset, scaling={"mean": [0], "std": [1]}).preprocess(images[:1]).tolist() == [[[[0.0, 1.0]]]]
    with pytest.raises(DataError, match=r"data\.scaling is for features"):
        spread(dataset, scaling="pooled")


def test_feature_noise_grows_with_the_client_and_is_seeded() -> None:
    dataset = Dataset("own", DataSpec((50,), "class", 2), torch.zeros(400, 50), torch.arange(400) % 2)
    data = spread(dataset, clients=4, partition={"kind": "feature-noise", "sigma": 0.4})
    noise = [data.client(name).train.inputs for name in data.client_ids()]
    assert [float(part.var()) for part in noise] == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=0.1)
    assert torch.equal(data.client("client-0").train.inputs, noise[0])


def test_the_central_test_set_is_the_sources_own() -> None:
    data = build(DataSection(name="fcube", clients=4, partition={"kind": "fcube"}), None, Path(), 0)
    assert len(data.central_test()) == 1000
    assert data.sizes().sum() == 4000


def test_the_central_test_set_is_set_apart_before_partitioning() -> None:
    data = digits(central_test=0.25)
    assert data.dataset.test_targets is not None
    test = data.central_test()
    assert (len(test), data.sizes().sum()) == (449, 1348)
    everything = torch.bincount(torch.cat([data.dataset.targets, data.dataset.test_targets]))
    assert (torch.bincount(test.targets) - everything * 449 / 1797).abs().max() < 1


def test_natural_clients_keep_their_rows_when_some_are_set_apart(tmp_path: Path) -> None:
    rows = "".join(f"{10 * client + i},{'ab'[client]},{i % 2}\n" for client in (0, 1) for i in range(10))
    (tmp_path / "t.csv").write_text("x,who,y\n" + rows)
    section = DataSection(
        path="t.csv", target="y", client_column="who", central_test=0.3, partition={"kind": "natural"}
    )
    data = build(section, None, tmp_path, 0)
    for name, least in (("a", 0), ("b", 10)):
        values = data.client(name).train.inputs
        assert least <= values.min() <= values.max() < least + 10
    assert (len(data.central_test()), data.sizes().sum()) == (6, 14)


def test_else_the_central_test_set_is_what_the_clients_hold_out() -> None:
    data = digits(test=0.2)
    tests = [data.client(client_id).test for client_id in data.client_ids()]
    assert torch.equal(data.central_test().inputs, torch.cat([test.inputs for test in tests]))


def test_preprocess_applies_what_training_applied() -> None:
    pooled = spread(TWO, scaling="pooled", **NATURAL)
    torch.testing.assert_close(pooled.preprocess(torch.tensor([[NAN, 8.0]])), torch.tensor([[0.0, 1.0]]))
    client = spread(TWO, scaling="client", **NATURAL)
    assert client.preprocess(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).tolist() == [[-1, 0], [1, 0]]
    with pytest.raises(DataError, match=r"got torch.float32 of shape \(1, 3\); expected torch.float32 of shape"):
        client.preprocess(torch.zeros(1, 3))


def test_the_fingerprint_follows_rows_and_partition() -> None:
    assert digits().fingerprint() == digits(scaling="pooled").fingerprint()
    assert len({digits().fingerprint(), digits(seed=1).fingerprint(), digits(clients=9).fingerprint()}) == 3


def test_it_survives_pickling() -> None:
    data = digits(test=0.2, scaling="client")
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.client("client-4").train.inputs, data.client("client-4").train.inputs)
    assert copy.fingerprint() == data.fingerprint()


def test_a_hundred_thousand_clients_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset("own", DataSpec((2,), "class", 2), torch.zeros(200_000, 2), torch.arange(200_000) % 2)
    monkeypatch.setattr(PartitionedData, "_split", None)  # construction and sizes look at no client by itself
    data = spread(dataset, clients=100_000, test=0.5)
    assert data.client_ids()[99_999] == "client-99999"
    assert np.array_equal(data.sizes(), np.ones(100_000))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match=r"more clients than examples: got data.clients = 2000; expected at most 1797"):
        digits(clients=2000)
    with pytest.raises(DataError, match="no such client: got client-10"):
        digits().client("client-10")
    tokens = Dataset("own", DataSpec((2,), "tokens", 5), torch.ones(4, 2).long(), torch.ones(4, 2).long())
    with pytest.raises(DataError, match=r"feature-noise.*tokens"):
        spread(tokens, partition={"kind": "feature-noise"})
    with pytest.raises(DataError, match=r"data\.scaling is for features"):
        spread(tokens, scaling="client")


def test_classes_are_numbered_as_given() -> None:
    spec = DataSpec((1,), "class", 2, class_names=("no", "yes"))
    dataset = Dataset("d", spec, torch.zeros(3, 1), torch.tensor([0, 1, 1]))
    wider = _with_classes(dataset, ("unknown", "yes", "no"))
    assert (wider.spec.num_classes, wider.spec.class_names) == (3, ("unknown", "yes", "no"))
    assert wider.targets.tolist() == [2, 1, 1]
    with pytest.raises(DataError, match="does not name: got no"):
        _with_classes(dataset, ("yes", "unknown"))
    with pytest.raises(DataError, match="targets that are classes"):
        _with_classes(Dataset("d", DataSpec((1,), "number"), torch.zeros(3, 1), torch.zeros(3)), ("a",))


def test_folds_are_disjoint_stratified_and_cover_all_rows() -> None:
    parts = [digits(fold={"number": number, "of": 5}) for number in range(1, 6)]
    for client_id in parts[0].client_ids():
        tests = [data.client(client_id).test for data in parts]
        whole = parts[0].client(client_id)
        everything = torch.cat([whole.train.inputs, whole.test.inputs])
        together = torch.cat([test.inputs for test in tests])
        assert sorted(together.flatten(1).tolist()) == sorted(everything.flatten(1).tolist())
        counts = torch.stack([torch.bincount(test.targets, minlength=10) for test in tests])
        assert (counts.max(0).values - counts.min(0).values).max() <= 1
        assert [len(data.client(client_id).train) for data in parts] == [len(everything) - len(test) for test in tests]
    assert all(data.sizes().sum() + sum(len(data.client(i).test) for i in data.client_ids()) == 1797 for data in parts)


def test_a_fold_of_more_parts_than_examples_is_refused() -> None:
    sizes = {name: len(digits().client(name).train) for name in digits().client_ids()}
    most = max(sizes.values())
    digits(fold={"number": most, "of": most})
    with pytest.raises(DataError, match=f"more parts than any client that trains.*at most {most}"):
        digits(fold={"number": 1, "of": most + 1})
    with pytest.raises(DataError, match="more parts"):
        digits(fold={"number": 1, "of": most}, held_out=[i for i, size in sizes.items() if size == most])


def test_a_client_that_is_held_out_never_trains_and_is_all_test() -> None:
    whole, data = digits(), digits(held_out=["client-3"], validation=0.2)
    assert data.sizes()[data.held_out()].tolist() == [0]
    assert len(data.client("client-3").test) == len(whole.client("client-3").train)
    assert not len(data.client("client-4").test)
    with pytest.raises(DataError, match="no such client"):
        digits(held_out=["client-77"])
    with pytest.raises(DataError, match="leaves no client"):
        digits(held_out=list(whole.client_ids()))
