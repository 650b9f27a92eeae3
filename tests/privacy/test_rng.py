import copy
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtrain.errors import RunError
from fedtrain.privacy import rng
from fedtrain.privacy.rng import NoiseSource

stats = pytest.importorskip("scipy.stats")

P = 1e-6  # the chance of each statistical test to fail when nothing is wrong
N = 400_000


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return NoiseSource().gaussian((N,), std=1.0, dtype=torch.float64)


def uncorrelated(a: torch.Tensor, b: torch.Tensor) -> bool:
    return abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) * math.sqrt(len(a)) < stats.norm.isf(P / 2)


def test_the_standard_deviation_is_the_one_asked_for() -> None:
    noise = NoiseSource().gaussian((N,), std=3.0).double()
    low, high = stats.chi2.ppf([P / 2, 1 - P / 2], N)
    assert low <= float((noise / 3.0).square().sum()) <= high


def test_numbers_are_normal_in_the_middle_and_in_the_tails(sample: torch.Tensor) -> None:
    assert stats.kstest(sample.numpy(), "norm").pvalue > P
    edges = np.array([-math.inf, -4, -3, -2, -1, 0, 1, 2, 3, 4, math.inf])
    counts, _ = np.histogram(sample.numpy(), edges)
    assert stats.chisquare(counts, N * np.diff(stats.norm.cdf(edges))).pvalue > P


def test_neighbours_and_pairs_of_one_block_are_uncorrelated(sample: torch.Tensor) -> None:
    for distance in (1, 2, rng._BLOCK // 2, rng._BLOCK):  # half a block apart are a pair's cosine and sine
        assert uncorrelated(sample[distance:], sample[:-distance])
        assert uncorrelated(sample[distance:].square(), sample[:-distance].square())


def test_the_tail_reaches_as_far_as_the_words_do() -> None:
    source = NoiseSource()
    source._draw = lambda count: np.full(count, 0, dtype=np.uint64)  # type: ignore[method-assign]
    assert float(source.gaussian((), 1.0, torch.float64)) == pytest.approx(math.sqrt(2 * 64 * math.log(2)))
    source = NoiseSource()
    source._draw = lambda count: np.full(count, 1 << 63, dtype=np.uint64)  # type: ignore[method-assign]
    assert float(source.gaussian((), 1.0, torch.float64)) == 0


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2 * rng._BLOCK + 1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    noise = NoiseSource().gaussian(shape, 1.0, dtype)
    assert (noise.shape, noise.dtype) == (shape, dtype)
    assert noise.isfinite().all()


def test_no_number_is_given_out_twice() -> None:
    source = NoiseSource()
    parts = [source.gaussian((n,), 1.0, torch.float64) for n in (1, 7, rng._BLOCK, 3, 2 * rng._BLOCK, 5)]
    assert len(torch.cat(parts).unique()) == sum(map(len, parts))


def test_noise_is_added_in_float64_and_rounded_once() -> None:
    values = torch.linspace(-1, 1, 1000).reshape(10, 100).T  # not contiguous
    noised = NoiseSource(seed=1).add_noise(values, 0.3)
    noise = NoiseSource(seed=1).gaussian(values.shape, 0.3, torch.float64)
    assert torch.equal(noised, (values.double() + noise).float())
    assert torch.equal(values, torch.linspace(-1, 1, 1000).reshape(10, 100).T)


def test_no_noise_changes_nothing() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(NoiseSource().add_noise(values, 0.0), values)


def test_sources_share_nothing_with_seeds_or_with_each_other() -> None:
    noises = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        noises.append(NoiseSource().gaussian((N,), 1.0))
    assert uncorrelated(*noises)
    assert not NoiseSource().seeded


def test_a_seed_repeats_everything_and_says_so() -> None:
    one, same, other = NoiseSource(seed=3), NoiseSource(seed=3), NoiseSource(seed=4)
    assert one.seeded
    assert torch.equal(one.poisson_mask(1000, 0.5), same.poisson_mask(1000, 0.5))
    first = one.gaussian((N,), 1.0)
    assert torch.equal(first, same.gaussian((N,), 1.0))
    assert uncorrelated(first, other.gaussian((N,), 1.0))


FORK = """
import os, pickle, sys
import torch
from fedtrain.privacy.rng import NoiseSource

source = NoiseSource()
source.gaussian((3,), 1.0)  # leaves a block half used, which the child inherits
child = os.fork()
drawn = source.gaussian((1000,), 1.0, torch.float64).tolist(), source.poisson_mask(64, 0.5).tolist()
with open(sys.argv[1 if child else 2], "wb") as file:
    pickle.dump(drawn, file)
if child:
    os.waitpid(child, 0)
"""


def test_a_forked_child_draws_from_a_key_of_its_own(tmp_path: Path) -> None:
    # In a process with one thread: whoever forks beside torch's pool of threads may wait for ever in the child.
    files = [tmp_path / "parent", tmp_path / "child"]
    subprocess.run(
        [sys.executable, "-c", FORK, *map(str, files)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )
    (noise, mask), (other_noise, other_mask) = (pickle.loads(file.read_bytes()) for file in files)
    assert not set(noise) & set(other_noise)
    assert mask != other_mask


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_cannot_be_copied(clone: object) -> None:
    with pytest.raises(TypeError, match="same noise twice"):
        clone(NoiseSource())  # type: ignore[operator]


def test_threads_never_get_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.getpid()
    monkeypatch.setattr(rng.os, "getpid", lambda: time.sleep(1e-6) or pid)  # lets others run in the middle of a draw
    source, drawn = NoiseSource(), []
    threads = [
        threading.Thread(target=lambda: drawn.extend(source.gaussian((500,), 1.0, torch.float64) for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(torch.cat(drawn).unique()) == 4 * 50 * 500


def test_the_next_stream_begins_before_the_counter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # RFC 8439: 32 bits of counter, 64 bytes per block.
    assert rng._STREAM <= 64 << 32
    monkeypatch.setattr(rng, "_STREAM", 64)
    source = NoiseSource(seed=1)
    drawn = [tuple(source._draw(8).tolist()) for _ in range(100)]
    assert len(set(drawn)) == 100
    assert source._nonce == 100


def test_each_example_has_a_coin_of_its_own() -> None:
    source, n, rate, tosses = NoiseSource(), 300, 0.05, 2000
    masks = torch.stack([source.poisson_mask(n, rate) for _ in range(tosses)])
    assert masks.dtype == torch.bool
    taken = int(masks.sum())
    assert stats.binomtest(taken, n * tosses, rate).pvalue > P
    # The sizes of batches vary as a binomial's do; a fixed size would have no variance.
    sizes = masks.sum(dim=1).double()
    low, high = stats.chi2.ppf([P / 2, 1 - P / 2], tosses - 1)
    assert low * 0.98 <= float(sizes.var()) * (tosses - 1) / (n * rate * (1 - rate)) <= high * 1.02
    # And each example is taken as often as any other.
    per_example = masks.sum(dim=0).double()
    low, high = stats.chi2.ppf([P / 2, 1 - P / 2], n)
    spread = float((per_example - tosses * rate).square().sum()) / (tosses * rate * (1 - rate))
    assert low * 0.95 <= spread <= high * 1.05


def test_poisson_rates_at_the_edges() -> None:
    source = NoiseSource()
    assert not source.poisson_mask(1000, 0.0).any()
    assert source.poisson_mask(1000, 1.0).all()
    assert source.poisson_mask(0, 0.5).shape == (0,)
    n = 3 * rng._BLOCK + 5
    assert stats.binomtest(int(source.poisson_mask(n, 0.5).sum()), n, 0.5).pvalue > P


def test_bad_arguments_are_refused() -> None:
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(RunError, match="standard deviation"):
            NoiseSource().gaussian((3,), std)
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(RunError, match="sample rate"):
            NoiseSource().poisson_mask(3, rate)


def test_key_stream_is_chacha20() -> None:
    # RFC 8439, appendix A.1, test vector 1: key, nonce and counter are 0.
    source = NoiseSource()
    source._rekey(bytes(32))
    words = source._draw(4).astype("<u8").tobytes()
    assert words.hex() == "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
