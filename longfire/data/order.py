"""Which row of which source is number i of the run: a pure function of (seed, shares, sizes, i), with no state to save.

    mix:      number i of the run   -> (source, number k within that source)
    shuffled: number k of a source  -> (epoch, row)

Both are vectorised over i and cost the same for any i. The mixture is exact, not drawn: every prefix of n rows holds
n * share rows of each source, give or take a few (`mix` states the bound). All rows have the same number of tokens, so
shares of rows are shares of tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

FIRST_WINDOW_ROWS = 64  # training behind a growing store can start once so many rows exist (see `Windows`)
FEISTEL_ROUNDS = 6


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A mixing bijection of uint64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*numbers: int | np.ndarray) -> np.ndarray:
    """One uint64 from several: seed, purpose, source, epoch ...; arrays broadcast."""
    mixed = np.zeros(1, np.uint64)
    for number in numbers:
        mixed = splitmix64(mixed ^ np.atleast_1d(np.asarray(number)).astype(np.uint64))
    return mixed


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of range(size) sends `index`: a Feistel network with cycle walking; uint64, all broadcast.

    The network permutes the smallest square power of two that holds `size` (at most 4 x size); an index that lands outside
    is sent on until it is inside, at most 4 times on average. (Black and Rogaway 2002, "Ciphers with arbitrary finite domains".)
    """
    index, size, key = (a.copy() for a in np.broadcast_arrays(np.atleast_1d(index).astype(np.uint64), size, key))
    size = size.astype(np.uint64)
    assert (index < size).all(), "index outside of the permutation"
    half = _half_bits(size)
    outside = np.ones(index.shape, bool)
    while outside.any():
        index[outside] = _feistel(index[outside], half[outside], key[outside])
        outside = index >= size
    return index


def _half_bits(size: np.ndarray) -> np.ndarray:
    """Half of the bits of the smallest even-bit domain that holds range(size); at least 1."""
    bits = np.ceil(np.log2(np.maximum(size, 2).astype(np.float64))).astype(np.uint64)
    bits += (np.uint64(1) << bits) < size  # log2 in float64 may round down near powers of two
    return np.maximum((bits + np.uint64(1)) // np.uint64(2), np.uint64(1))


def _feistel(index: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = index >> half, index & mask
    for turn in range(FEISTEL_ROUNDS):
        mixed = splitmix64(right ^ splitmix64(key + np.uint64(turn)))
        left, right = right, left ^ (mixed >> (np.uint64(64) - half))
    return (left << half) | right


def mix(index: np.ndarray, shares: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, k) of each index: it is number k of that source's own rows.

    A balanced tree of two-way splits; each sends exactly floor(n * share + phase) of its first n indices left, the phase from
    the seed. So among the first n indices the count of a source differs from n * share by less than 1 + ceil(log2(sources))
    (each level adds less than one row, and shares are exact to 2**-32 up to n of about 2**32).

    >>> mix(np.arange(8), (0.75, 0.25), seed=0)[0].tolist()
    [0, 0, 0, 1, 0, 0, 0, 1]
    """
    index = np.asarray(index, np.uint64)
    if len(shares) == 1:
        return np.zeros(index.shape, np.int64), index.astype(np.int64)
    middle = len(shares) // 2
    share_left = sum(shares[:middle]) / sum(shares)
    phase = key(seed, 1, len(shares), middle)[0] & np.uint64(0xFFFFFFFF)
    before = _count(index, share_left, phase)
    left = _count(index + np.uint64(1), share_left, phase) > before
    source, k = np.empty(index.shape, np.int64), np.empty(index.shape, np.int64)
    source[left], k[left] = mix(before[left], shares[:middle], seed)
    source[~left], k[~left] = mix((index - before)[~left], shares[middle:], seed)
    source[~left] += middle
    return source, k


def _count(n: np.ndarray, share: float, phase: np.uint64) -> np.ndarray:
    """floor(n * share + phase / 2**32), exactly, with the share rounded to 2**-32: n * share needs more than 64 bits."""
    part, low = np.uint64(round(share * 2**32)), np.uint64(0xFFFFFFFF)
    return (n >> np.uint64(32)) * part + (((n & low) * part + phase) >> np.uint64(32))


@dataclass(frozen=True)
class Order:
    """The order of the rows of each source.

    "none": as they lie. "global": each epoch a permutation of all rows, so the number of rows must be known. "window": each
    epoch a permutation inside each window of `window_rows`, so that a store can be read while it grows: the same rows in the
    same order then and later.
    """

    shuffle: Literal["global", "window", "none"]
    window_rows: int
    seed: int

    def rows_needed(self, k: int) -> int:
        """Rows of the source that must exist before number k of its first epoch is known ("none", "window")."""
        if self.shuffle == "none":
            return k + 1
        start, stop = _windows(np.asarray([k]), np.asarray([0]), self.window_rows)
        return int(stop[0])

    def rows(self, k: np.ndarray, rows: int, source: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row) of numbers k of a source with `rows` rows; each epoch visits every row once."""
        k = np.asarray(k, np.int64)
        epoch, place = k // rows, k % rows
        if self.shuffle == "none":
            return epoch, place
        if self.shuffle == "global":
            start, stop = np.zeros_like(place), np.full_like(place, rows)
        else:
            start, stop = _windows(place, epoch, self.window_rows)
            stop = np.minimum(stop, rows)
        row = permute(place - start, stop - start, key(self.seed, 2, source, epoch, start))
        return epoch, start + row.astype(np.int64)


def _windows(place: np.ndarray, epoch: np.ndarray, window_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """[start, stop) of the window that holds each place.

    In the first epoch windows grow, so that training starts long before a whole window is tokenized:
    with 64 first and window_rows = 300: [0,64) [64,128) [128,256) [256,512) [512,812) [812,1112) ...
    Later epochs, which begin on a finished source, have whole windows from the start.
    """
    first = min(FIRST_WINDOW_ROWS, window_rows)
    doublings = max(0, int(np.ceil(np.log2(window_rows / first))))
    ramp = np.where(epoch == 0, first << doublings, 0)  # where growing ends
    power = np.floor(np.log2(np.maximum(place // first, 1))).astype(np.int64)
    start_growing = np.where(place < first, 0, first << power)
    stop_growing = np.where(place < first, first, first << (power + 1))
    start_whole = ramp + (place - ramp) // window_rows * window_rows
    growing = place < ramp
    return np.where(growing, start_growing, start_whole), np.where(growing, stop_growing, start_whole + window_rows)
