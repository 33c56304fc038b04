"""The order of rows: exact shares in every prefix, permutations, windows that need no length, the same for ever."""

from collections import Counter
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longfire.data.order import FIRST_WINDOW_SEQUENCES, Order, mix, permute

seeds = st.integers(0, 2**63 - 1)
shares = st.lists(st.floats(0.001, 1), min_size=1, max_size=9).map(tuple)


@settings(deadline=None)
@given(shares, seeds, st.integers(1, 3000))
def test_every_prefix_holds_its_share_of_each_source(shares, seed, n):
    source, k = mix(np.arange(n), shares, seed)
    bound = max(ceil(log2(len(shares))), 0) + n * len(shares) * 2**-32
    for number, share in enumerate(shares):
        mine = source == number
        counts = np.cumsum(mine)
        assert (k[mine] == np.arange(counts[-1])).all(), "numbers of a source are not 0, 1, 2 ..."
        assert np.abs(counts - np.arange(1, n + 1) * share / sum(shares)).max() <= bound


@settings(deadline=None)
@given(shares, seeds, st.integers(0, 2**45), st.lists(st.integers(0, 999), min_size=1))
def test_mix_is_a_function_of_the_number_alone(shares, seed, start, chosen):
    source, k = mix(np.arange(start, start + 1000), shares, seed)
    one_by_one = [mix(np.array([start + i]), shares, seed) for i in chosen]
    assert [(s[0], j[0]) for s, j in one_by_one] == [(source[i], k[i]) for i in chosen]


@pytest.mark.parametrize("n", [2**33 + 1, 10**12])
def test_mix_far_out(n):
    """Shares hold where n * share needs more than 64 bits: against Python's own integers."""
    shares = (0.6, 0.15, 0.15, 0.014, 0.058, 0.028)  # the six sources
    source, k = mix(np.arange(n, n + 64), shares, 7)
    for s, j in zip(source.tolist(), k.tolist()):
        assert abs(j - n * shares[s]) < 64 + 3 + n * 3 * 2**-33


@settings(deadline=None)
@given(st.integers(1, 3000), seeds)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_far_out():
    index = np.random.default_rng(0).integers(0, 10**12, 1000)
    found = permute(index, 10**12, 5)
    assert found.max() < 10**12 and len(np.unique(found)) == len(np.unique(index))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_permutations_of_few_rows_are_all_as_likely(size):
    """Over many keys each of the size! orders comes up equally often (chi squared, five sigma)."""
    keys = np.arange(20000)
    orders = np.stack([permute(np.full(len(keys), i), size, keys) for i in range(size)], axis=1)
    counts = np.array(list(Counter(map(tuple, orders.tolist())).values()))
    kinds = np.prod(np.arange(1, size + 1))
    assert len(counts) == kinds
    expected = len(keys) / kinds
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < kinds + 5 * np.sqrt(2 * kinds)


def test_permutations_mix_many_rows():
    """Where a row goes, and what follows it, look uniform: 100 bins of 100,000 rows, five sigma."""
    size, bins = 100_000, 100
    found = permute(np.arange(size), size, 3).astype(np.int64)
    for values in (found[: size // 10], np.diff(found) % size):
        counts = np.bincount(values * bins // size, minlength=bins)
        expected = len(values) / bins
        assert ((counts - expected) ** 2 / expected).sum() < bins + 5 * np.sqrt(2 * bins)


orders = st.builds(Order, st.sampled_from(["none", "window", "global"]), st.integers(1, 400), seeds)


@settings(deadline=None)
@given(orders, st.integers(1, 1500), st.integers(0, 3))
def test_each_epoch_visits_each_row_once(order, rows, source):
    epoch, row = order.sequences(np.arange(3 * rows), rows, source)
    assert (epoch == np.repeat([0, 1, 2], rows)).all()
    for number in range(3):
        assert sorted(row[epoch == number].tolist()) == list(range(rows))


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 1500), seeds, st.data())
def test_a_growing_source_gives_the_rows_of_the_finished_one(window, rows, seed, data):
    order = Order("window", window, seed)
    k = data.draw(st.integers(0, rows - 1))
    needed = order.sequences_needed(k)
    finished = order.sequences(np.array([k]), rows, 0)
    assert finished[1][0] < needed
    assert needed - k <= max(window, FIRST_WINDOW_SEQUENCES)
    for there in {needed, needed + 1, (needed + rows) // 2, rows - 1} & set(range(needed, rows)):
        assert order.sequences(np.array([k]), there, 0) == finished


def test_windows_begin_small_and_grow():
    order = Order("window", 16384, 0)
    assert [order.sequences_needed(k) for k in (0, 63, 64, 128, 16383, 16384, 40000)] == [
        64,
        64,
        128,
        256,
        16384,
        32768,
        49152,
    ]


def test_epochs_and_sources_and_seeds_differ():
    rows = {
        (seed, source, epoch): tuple(
            Order("global", 1, seed).sequences(np.arange(50) + 50 * epoch, 50, source)[1].tolist()
        )
        for seed in (0, 1)
        for source in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(rows.values())) == 8


def test_the_order_never_changes():
    """If this fails, runs of an older version no longer see the rows that they would have seen: do not, or say it loudly."""
    source, k = mix(np.arange(12), (0.5, 0.3, 0.2), 42)
    assert list(zip(source.tolist(), k.tolist())) == GOLDEN["mix"]
    for shuffle in ("global", "window"):
        assert (
            Order(shuffle, 100, 42).sequences(np.arange(995, 1005), 1000, 1)[1].tolist()
            == GOLDEN[shuffle]
        )


GOLDEN = {
    "mix": [
        (2, 0),
        (0, 0),
        (1, 0),
        (0, 1),
        (2, 1),
        (0, 2),
        (1, 1),
        (0, 3),
        (1, 2),
        (0, 4),
        (2, 2),
        (0, 5),
    ],
    "global": [964, 718, 721, 501, 503, 876, 867, 782, 891, 454],
    "window": [930, 940, 961, 938, 983, 74, 20, 43, 72, 54],
}
