import gzip
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedtrain.data.heterogeneity import label_counts, measure
from fedtrain.data.names import NumberedNames
from fedtrain.data.partition import Partition, RowFacts, make_partition
from fedtrain.errors import DataError
from fedtrain.experiment.partitions import PartitionSection

SECTIONS = TypeAdapter(PartitionSection)
KINDS = [
    {"kind": "iid"},
    {"kind": "dirichlet", "alpha": 0.1},
    {"kind": "shards"},
    {"kind": "labels", "labels_per_client": 2},
    {"kind": "quantity", "alpha": 0.5},
    {"kind": "sizes", "profile": "linear"},
    {"kind": "sizes", "profile": "square"},
    {"kind": "sizes", "profile": "exponential"},
    {"kind": "feature-noise"},
    {"kind": "label-quantity", "label_alpha": 0.3, "size_alpha": 0.5},
]
NEED_CLASSES = ("dirichlet", "shards", "labels", "label-quantity")


def kind_name(section: dict[str, object]) -> str:
    return "-".join(str(section[key]) for key in ("kind", "profile") if key in section)


def facts(labels: np.ndarray, num_classes: int = 10) -> RowFacts:
    return RowFacts(len(labels), labels.astype(np.int64), num_classes, None, (), None)


def natural(client_index: list[int], names: tuple[str, ...]) -> RowFacts:
    return RowFacts(len(client_index), None, 0, None, names, np.array(client_index))


def partition(section: dict[str, object], clients: int | None, rows: RowFacts, seed: int = 0) -> Partition:
    return make_partition(SECTIONS.validate_python(section), clients, rows, np.random.default_rng(seed))


def digits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 10, rows)


def fashion_labels(data_root) -> np.ndarray:
    with gzip.open(data_root / "fashion-mnist" / "train-labels-idx1-ubyte.gz") as file:
        return np.frombuffer(file.read()[8:], dtype=np.uint8).astype(np.int64)


@pytest.mark.parametrize("section", KINDS, ids=kind_name)
class TestEveryKind:
    @settings(max_examples=25, deadline=None)
    @given(clients=st.integers(5, 40), spare=st.integers(0, 300), least=st.integers(1, 5), seed=st.integers(0, 99))
    def test_uses_every_row_once_and_leaves_no_client_too_small(self, section, clients, spare, least, seed):
        rows = facts(digits(clients * least + clients + spare, seed))
        made = partition(section | {"min_examples": least}, clients, rows, seed)
        assert sorted(made.indices.tolist()) == list(range(rows.num_rows))
        assert made.sizes().min() >= least
        assert len(made.names) == clients == len(made.offsets) - 1

    def test_is_a_function_of_the_seed(self, section):
        rows = facts(digits(600))
        first, again, other = (partition(section, 20, rows, seed).indices for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_spreads_60000_rows_over_10000_clients_in_half_a_second(self, section):
        rows = facts(digits(60_000))
        start = time.process_time()
        partition(section, 10_000, rows)
        assert time.process_time() - start < 0.5

    def test_says_the_arithmetic_when_examples_run_out(self, section):
        with pytest.raises(DataError, match=r"got 12 examples; expected at least 5 clients x min_examples 3 = 15"):
            partition(section | {"min_examples": 3}, 5, facts(np.arange(12) % 2, 2))

    def test_takes_numbers_for_targets_unless_it_spreads_classes(self, section):
        rows = RowFacts(50, None, 0, None, (), None)
        if section["kind"] in NEED_CLASSES:
            with pytest.raises(DataError, match=r'needs targets that are classes.*"iid", "quantity"'):
                partition(section, 5, rows)
        else:
            assert partition(section, 5, rows).sizes().sum() == 50


class TestIid:
    def test_sizes_differ_by_at_most_one(self):
        assert sorted(partition({"kind": "iid"}, 3, facts(digits(11))).sizes()) == [3, 4, 4]

    def test_shuffles_rows(self):
        made = partition({"kind": "iid"}, 2, facts(np.repeat([0, 1], 500)))
        assert label_counts(made, np.repeat([0, 1], 500), 2).min() > 200


class TestDirichlet:
    @pytest.mark.parametrize("alpha", [1e-6, 1e6])
    def test_takes_the_ends_of_the_range(self, alpha):
        made = partition({"kind": "dirichlet", "alpha": alpha, "min_examples": 1}, 20, facts(digits(4000)))
        counts = label_counts(made, digits(4000), 10)
        held = (counts > 0).sum(axis=0)
        # Concentrated, a class is on one client, save single rows given in repair; flat, it is on all of them.
        assert (held <= 12).all() if alpha < 1 else (held == 20).all()

    def test_rounding_favours_no_client(self):
        # 0.6 of a row per client and class: with clients in one order for all classes, the same 40 % would get nothing.
        labels = np.repeat(np.arange(10), 600)
        sizes = partition({"kind": "dirichlet", "alpha": 1e6, "min_examples": 1}, 1000, facts(labels)).sizes()
        assert 1.2 < sizes.std() < 1.8  # binomial(10, 0.6): 1.55

    @pytest.mark.real_data
    @pytest.mark.parametrize(
        ("alpha", "expected"), [(0.1, (1.41, 0.651, 0.498)), (0.5, (0.90, 0.418, 0.230)), (10, (0.24, 0.101, 0.015))]
    )
    def test_reaches_the_known_distances_on_fashion_mnist(self, data_root, alpha, expected):
        labels = fashion_labels(data_root)
        found = []
        for seed in range(5):
            made = partition({"kind": "dirichlet", "alpha": alpha}, 100, facts(labels), seed)
            measured = measure(label_counts(made, labels, 10), made.sizes())
            found.append((measured.l1, measured.hellinger, measured.jensen_shannon))
        assert np.mean(found, axis=0) == pytest.approx(expected, rel=0.1)


class TestShards:
    def test_deals_as_many_shards_to_each_client(self):
        labels = np.repeat(np.arange(10), 60)
        made = partition({"kind": "shards", "shards_per_client": 2}, 10, facts(labels))
        counts = label_counts(made, labels, 10)
        # 20 shards of 30 rows, two for each label: a shard holds one label.
        assert (made.sizes() == 60).all()
        assert set(counts.ravel().tolist()) <= {0, 30, 60}

    def test_refuses_more_shards_than_examples(self):
        with pytest.raises(DataError, match=r"got 10 clients x 3 shards = 30; expected at most 29"):
            partition({"kind": "shards", "shards_per_client": 3}, 10, facts(digits(29)))


class TestLabels:
    @pytest.mark.parametrize(("clients", "k"), [(10, 1), (10, 2), (100, 3), (4, 3), (3, 4), (2, 10)])
    def test_gives_k_labels_to_each_client_and_each_label_to_some_client(self, clients, k):
        labels = np.repeat(np.arange(10), 200)
        counts = label_counts(partition({"kind": "labels", "labels_per_client": k}, clients, facts(labels)), labels, 10)
        assert ((counts > 0).sum(axis=1) == k).all()
        assert (counts.sum(axis=0) == 200).all()

    def test_splits_a_label_evenly_over_its_holders(self):
        labels = np.repeat(np.arange(10), 200)
        counts = label_counts(partition({"kind": "labels", "labels_per_client": 3}, 7, facts(labels)), labels, 10)
        for held in counts.T:
            assert held.max() - held[held > 0].min() <= 1

    def test_leaves_labels_out_only_where_the_slots_are_too_few(self):
        labels = np.repeat(np.arange(10), 20)
        made = partition({"kind": "labels", "labels_per_client": 2}, 3, facts(labels))
        assert len(made.indices) == 6 * 20
        assert len(np.unique(labels[made.indices])) == 6

    def test_refuses_more_labels_than_there_are(self):
        with pytest.raises(DataError, match=r"got 11; expected at most 10"):
            partition({"kind": "labels", "labels_per_client": 11}, 5, facts(digits(500)))


class TestSizes:
    def test_quantity_is_more_even_with_larger_alpha(self):
        uneven, even = (partition({"kind": "quantity", "alpha": a}, 50, facts(digits(5000))).sizes() for a in (0.5, 50))
        assert uneven.std() > 3 * even.std()

    @pytest.mark.parametrize(
        ("profile", "expected"),
        [("linear", [10, 20, 30, 40]), ("square", [3, 14, 30, 53]), ("exponential", [3, 9, 24, 64])],
    )
    def test_grow_by_the_rule(self, profile, expected):
        # 100 rows; shares i / 10, i^2 / 30 and e^i / 84.79, cut at the rounded cumulative share.
        made = partition({"kind": "sizes", "profile": profile, "min_examples": 1}, 4, facts(digits(100)))
        assert made.sizes().tolist() == expected


class TestNatural:
    def test_keeps_clients_and_leaves_small_ones_out(self):
        rows = natural([2, 0, 2, 1, 0, 2], ("ward a", "ward b", "ward c"))
        made = partition({"kind": "natural", "min_examples": 2}, None, rows)
        assert made.names == ("ward a", "ward c")
        assert [made.rows(position).tolist() for position in range(2)] == [[1, 4], [0, 2, 5]]
        assert made.left_out == {"ward b": 1}

    def test_refuses_data_without_names(self):
        with pytest.raises(DataError, match=r"these rows have no names\. Set data\.client_column"):
            partition({"kind": "natural"}, None, facts(digits(10)))

    def test_refuses_to_leave_everyone_out(self):
        with pytest.raises(DataError, match=r"got 2 clients, the largest with 2 examples.*min_examples = 3"):
            partition({"kind": "natural", "min_examples": 3}, None, natural([0, 1, 1], ("a", "b")))


class TestFeatureNoise:
    def test_variance_grows_to_sigma(self):
        made = partition({"kind": "feature-noise", "sigma": 0.2}, 4, facts(digits(40)))
        assert made.noise_variance == pytest.approx([0.05, 0.1, 0.15, 0.2])
        assert (made.sizes() == 10).all()

    def test_other_kinds_have_none(self):
        assert partition({"kind": "iid"}, 4, facts(digits(40))).noise_variance is None


class TestFcube:
    def test_gives_an_octant_and_its_mirror(self):
        points = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float32)
        rows = RowFacts(8, (points[:, 0] > 0).astype(np.int64), 2, points, (), None)
        made = partition({"kind": "fcube", "min_examples": 2}, 4, rows)
        for position in range(4):
            one, mirror = points[made.rows(position)]
            assert np.array_equal(one, -mirror)

    def test_refuses_other_features(self):
        with pytest.raises(DataError, match=r"got 4 clients, features of shape \(2,\).*shape \(3,\)"):
            partition({"kind": "fcube"}, 4, RowFacts(8, None, 0, np.ones((8, 2), np.float32), (), None))


class TestLabelQuantity:
    def made(self, label_alpha, size_alpha, labels):
        section = {"kind": "label-quantity", "label_alpha": label_alpha, "size_alpha": size_alpha, "min_examples": 1}
        found = partition(section, 50, facts(labels))
        return measure(label_counts(found, labels, 10), found.sizes())

    def test_each_alpha_moves_its_own_skew(self):
        labels = np.repeat(np.arange(10), 500)
        mixed, uneven = self.made(0.1, 1e6, labels), self.made(1e6, 0.3, labels)
        assert mixed.l1 > 1
        assert mixed.size_gini < 0.05
        assert uneven.l1 < 0.1
        assert uneven.size_gini > 0.5

    def test_takes_the_smallest_alphas_and_an_absent_class(self):
        assert self.made(1e-6, 1e-6, np.repeat([0, 2], 500)).labels_per_client >= 1


class TestRepair:
    def test_levels_the_largest_and_keeps_their_mix(self):
        # e^1 : e^2 : e^3 of 24 rows is 2, 6, 16; to bring the first to 6, the last gives 4 and comes down to 12.
        labels = np.arange(24) % 2
        plain, repaired = (
            partition({"kind": "sizes", "profile": "exponential", "min_examples": least}, 3, facts(labels), 5)
            for least in (1, 6)
        )
        assert plain.sizes().tolist() == [2, 6, 16]
        assert repaired.sizes().tolist() == [6, 6, 12]
        assert np.array_equal(plain.rows(1), repaired.rows(1))
        # Of 16 rows, 4 are given: every fourth.
        assert np.array_equal(np.setdiff1d(plain.rows(2), repaired.rows(2)), plain.rows(2)[3::4])

    def test_first_of_the_largest_keep_one_more_where_the_level_is_uneven(self):
        # Client i has label i, so sizes are 9, 9, 0; to give 3, both come down to 7, and one row of the 4 is too many.
        labels = np.repeat([0, 1], 9)
        made = partition({"kind": "labels", "labels_per_client": 1, "min_examples": 3}, 3, facts(labels, 3))
        assert made.sizes().tolist() == [8, 7, 3]


class TestNames:
    @pytest.mark.parametrize("clients", [1, 10, 11, 100_000])
    def test_looks_up_every_name(self, clients):
        names = NumberedNames(clients)
        for position in {0, clients // 2, clients - 1}:
            assert names.index(names[position]) == position
        assert names[-1] == names[clients - 1] == f"client-{clients - 1}"
        assert len(set(names[:11])) == min(clients, 11)

    def test_pads_with_zeros(self):
        assert NumberedNames(10_000)[17] == "client-0017"

    @pytest.mark.parametrize("name", ["client-17", "client-10000", "client-\u0660017", "client-+017", "0017", "", 17])
    def test_refuses_other_names(self, name):
        names = NumberedNames(10_000)
        assert name not in names
        with pytest.raises(ValueError, match="not one of 10000"):
            names.index(name)

    def test_has_an_end(self):
        with pytest.raises(IndexError):
            NumberedNames(3)[3]
