"""Which row of which source is number i of the run: a pure function of (seed, shares, sizes, i),
with no state to save.

    mix:         number i of the run  -> (source, number k among the rows of that source)
    Order.rows:  number k of a source -> (epoch, row)

Both work on arrays of numbers and cost the same for any of them. The mixture is not drawn but
counted: every prefix of n rows holds n * share rows of each source, give or take a few (`mix`
states the bound); since all rows have the same number of tokens, shares of rows are shares of
tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

FIRST_WINDOW_ROWS = (
    64  # training behind a growing store can begin when so many rows exist (`_windows`)
)
FEISTEL_ROUNDS = 6
LOW = np.uint64(0xFFFFFFFF)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A mixing bijection of uint64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators")."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*numbers: int | np.ndarray) -> np.ndarray:
    """One uint64 from several numbers (seed, purpose, source, epoch ...), which broadcast."""
    mixed = np.zeros(1, np.uint64)
    for number in numbers:
        mixed = splitmix64(mixed ^ np.asarray(number).astype(np.uint64))
    return mixed


def permute(index: np.ndarray, size: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where the permutation of range(size) that belongs to a key sends `index`; uint64 (N,), all
    broadcast.

    A Feistel network permutes the smallest power of four that holds `size` (at least 64); an index
    that lands outside is sent on until it is inside, on average fewer than 4 times (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    index, size, keys = np.broadcast_arrays(
        *(np.atleast_1d(a).astype(np.uint64) for a in (index, size, keys))
    )
    assert (index < size).all(), "index outside of the permutation"
    half = _half_bits(size)
    round_keys = [splitmix64(keys + np.uint64(turn)) for turn in range(FEISTEL_ROUNDS)]
    found = _feistel(index, half, round_keys)
    while (outside := np.flatnonzero(found >= size)).size:
        found[outside] = _feistel(found[outside], half[outside], [k[outside] for k in round_keys])
    return found


def _half_bits(size: np.ndarray) -> np.ndarray:
    """h such that 4**h is the smallest power of four that holds range(size); at least 3: on fewer
    bits some orders of few rows would be likelier than others."""
    half = np.full(size.shape, 3, np.uint64)
    while (small := (half < np.uint64(32)) & ((size - np.uint64(1)) >> (half + half) > 0)).any():
        half += small
    return half


def _feistel(index: np.ndarray, half: np.ndarray, round_keys: list[np.ndarray]) -> np.ndarray:
    left, right = index >> half, index & ((np.uint64(1) << half) - np.uint64(1))
    for round_key in round_keys:
        left, right = right, left ^ (splitmix64(right ^ round_key) >> (np.uint64(64) - half))
    return (left << half) | right


def mix(index: np.ndarray, shares: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, k) of each number of the run: it is number k among the rows of that source. int64
    (N,).

    A balanced tree of two-way splits: of its first n numbers a split sends floor(n * share + phase)
    to the left, the phase given by the seed. So among the first n numbers of the run the count of a
    source differs from n * share by less than ceil(log2(sources)) rows: each level adds less than
    one (and 2**-33 n, since shares are rounded to 2**-32).

    Three quarters and one quarter, phase 0:     i  0 1 2 3 4 5 6 7
                                            source  1 0 0 0 1 0 0 0
                                                 k  0 0 1 2 1 3 4 5
    """
    index = np.asarray(index, np.uint64)
    if len(shares) == 1:
        return np.zeros(index.shape, np.int64), index.astype(np.int64)
    middle = len(shares) // 2
    part = np.uint64(round(sum(shares[:middle]) / sum(shares) * 2**32))
    phase = key(seed, 1, len(shares))[0] & LOW
    before = _count(index, part, phase)
    left = _count(index + np.uint64(1), part, phase) > before
    source, k = np.empty(index.shape, np.int64), np.empty(index.shape, np.int64)
    source[left], k[left] = mix(before[left], shares[:middle], seed)
    source[~left], k[~left] = mix((index - before)[~left], shares[middle:], seed)
    source[~left] += middle
    return source, k


def _count(n: np.ndarray, part: np.uint64, phase: np.uint64) -> np.ndarray:
    """floor((n * part + phase) / 2**32) exactly, though n * part may need more than 64 bits."""
    return (n >> np.uint64(32)) * part + (((n & LOW) * part + phase) >> np.uint64(32))


@dataclass(frozen=True)
class Order:
    """The order of the rows of each source.

    "none": as they lie. "global": each epoch a permutation of all rows, whose number must be known.
    "window": each epoch a permutation inside windows of `window_rows`: a store can be read while it
    grows, and gives the same rows in the same order then and when it is finished.
    """

    shuffle: Literal["global", "window", "none"]
    window_rows: int
    seed: int

    def rows_needed(self, k: int) -> int | None:
        """How many rows of a growing source must exist before number k of its order is known; None:
        all."""
        if self.shuffle == "global":
            return None
        if self.shuffle == "none":
            return k + 1
        return int(_windows(np.array([k]), np.array([0]), self.window_rows)[1][0])

    def rows(self, k: np.ndarray, rows: int, source: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row) int64 (N,) of numbers k of a source that has `rows` rows; an epoch visits
        each row once."""
        epoch, place = np.divmod(np.asarray(k, np.int64), rows)
        if self.shuffle == "none":
            return epoch, place
        if self.shuffle == "global":
            start, stop = np.zeros_like(place), np.full_like(place, rows)
        else:
            start, stop = _windows(place, epoch, self.window_rows)
        keys = key(self.seed, 2, source, epoch, start)
        return epoch, start + permute(place - start, np.minimum(stop, rows) - start, keys).astype(
            np.int64
        )

    def pieces(
        self, number: np.ndarray, each: int, first: int, stop: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(row of the run, piece of it) int64 (N,) of pieces that rows first to stop (None: the
        run's end) are given as, `each` of a
        row: number n is in its place where nothing is shuffled, and else a permutation inside
        windows that double until they have `window_rows` pieces, so that what a batch holds does
        not all come from a few long rows. Whatever the windows, rows first to stop give each of
        their pieces once.
        """
        number = np.asarray(number, np.int64)
        if self.shuffle != "none":
            place = number - first * each
            start, end = _windows(place, np.zeros_like(place), self.window_rows)
            size = (end if stop is None else np.minimum(end, (stop - first) * each)) - start
            keys = key(self.seed, 3, first, start)
            number = first * each + start + permute(place - start, size, keys).astype(np.int64)
        return number // each, number % each


def _windows(
    place: np.ndarray, epoch: np.ndarray, window_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """[start, stop) of the window around each place of an epoch.

    In the first epoch windows double until they are whole, so that training can begin long before a whole one exists. With
    64 rows first and window_rows = 300:  [0, 64) [64, 128) [128, 256) [256, 512) [512, 812) [812, 1112) ...
    Later epochs begin on a finished source, with whole windows.
    """
    first = min(FIRST_WINDOW_ROWS, window_rows)
    doublings = max(0, int(np.ceil(np.log2(window_rows / first))))
    doubling_ends = np.where(epoch == 0, first << doublings, 0)
    power = np.floor(np.log2(np.maximum(place // first, 1))).astype(np.int64)
    small = (
        np.where(place < first, 0, first << power),
        np.where(place < first, first, first << (power + 1)),
    )
    start = doubling_ends + (place - doubling_ends) // window_rows * window_rows
    doubling = place < doubling_ends
    return np.where(doubling, small[0], start), np.where(doubling, small[1], start + window_rows)
