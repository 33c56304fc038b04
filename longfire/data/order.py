"""Which sequence of which source is number i of the run: a pure function of (seed, shares, sizes,
i), without any state to save.

    mix:              number i of the run  -> (source, number k among the sequences of that source)
    Order.sequences:  number k of a source -> (epoch, sequence)

Both take arrays of numbers and cost the same for any of them. The mixture is not drawn but counted:
among the first n sequences, n * share are from each source, with an error of a few (`mix` states
the bound). Since all sequences have the same number of tokens, shares of sequences are shares of
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Training on a growing store can begin when so many sequences exist (`_windows`).
FIRST_WINDOW_SEQUENCES = 64
FEISTEL_ROUNDS = 6
# The purposes of keys, so that no two orders depend on each other.
MIXTURE = 1
SEQUENCES = 2
PIECES = 3
AUGMENTATION = 4
MIXUP = 5
CUTMIX = 6
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
    """The image of `index` in the permutation of range(size) that belongs to a key; uint64 (N,),
    all broadcast.

    A Feistel network permutes the smallest power of four that holds `size` (at least 64). An index
    that is sent outside is permuted again until it is inside, on average fewer than 4 times (Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    index, size, keys = np.broadcast_arrays(_uint64(index), _uint64(size), _uint64(keys))
    assert (index < size).all(), "index outside of the permutation"
    half = _half_bits(size)
    round_keys = []
    for number in range(FEISTEL_ROUNDS):
        round_keys.append(splitmix64(keys + np.uint64(number)))
    image = _feistel(index, half, round_keys)
    outside = np.flatnonzero(image >= size)
    while outside.size:
        their_keys = [round_key[outside] for round_key in round_keys]
        image[outside] = _feistel(image[outside], half[outside], their_keys)
        outside = np.flatnonzero(image >= size)
    return image


def _uint64(x: np.ndarray) -> np.ndarray:
    return np.atleast_1d(x).astype(np.uint64)


def _half_bits(size: np.ndarray) -> np.ndarray:
    """h such that 4**h is the smallest power of four that holds range(size). At least 3: with fewer
    bits some orders of few sequences would be likelier than others."""
    half = np.full(size.shape, 3, np.uint64)
    while True:
        is_small = (half < np.uint64(32)) & ((size - np.uint64(1)) >> (half + half) > 0)
        if not is_small.any():
            return half
        half += is_small


def _feistel(index: np.ndarray, half: np.ndarray, round_keys: list[np.ndarray]) -> np.ndarray:
    left = index >> half
    right = index & ((np.uint64(1) << half) - np.uint64(1))
    for round_key in round_keys:
        mixed = left ^ (splitmix64(right ^ round_key) >> (np.uint64(64) - half))
        left = right
        right = mixed
    return (left << half) | right


def mix(index: np.ndarray, shares: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, k) of each number of the run: it is number k among the sequences of that source.
    int64 (N,).

    A balanced tree of two-way splits: of its first n numbers a split sends floor(n * share + phase)
    to the left, with a phase that depends on the seed. So among the first n numbers of the run the
    count of a source differs from n * share by less than ceil(log2(sources)) sequences: each level
    adds less than one (and 2**-33 n, since shares are rounded to 2**-32).

    Three quarters and one quarter, phase 0:     i  0 1 2 3 4 5 6 7
                                            source  1 0 0 0 1 0 0 0
                                                 k  0 0 1 2 1 3 4 5
    """
    index = np.asarray(index, np.uint64)
    if len(shares) == 1:
        return np.zeros(index.shape, np.int64), index.astype(np.int64)
    middle = len(shares) // 2
    part = np.uint64(round(sum(shares[:middle]) / sum(shares) * 2**32))
    phase = key(seed, MIXTURE, len(shares))[0] & LOW
    before = _count(index, part, phase)
    left = _count(index + np.uint64(1), part, phase) > before
    source = np.empty(index.shape, np.int64)
    k = np.empty(index.shape, np.int64)
    source[left], k[left] = mix(before[left], shares[:middle], seed)
    source[~left], k[~left] = mix((index - before)[~left], shares[middle:], seed)
    source[~left] += middle
    return source, k


def _count(n: np.ndarray, part: np.uint64, phase: np.uint64) -> np.ndarray:
    """floor((n * part + phase) / 2**32) exactly, though n * part may need more than 64 bits."""
    return (n >> np.uint64(32)) * part + (((n & LOW) * part + phase) >> np.uint64(32))


@dataclass(frozen=True)
class Order:
    """The order of the sequences of each source.

    "none": as they are stored. "global": each epoch a permutation of all sequences, whose number
    must be known. "window": each epoch a permutation inside windows of `window` sequences. So a
    store can be read while it grows, and gives the same sequences in the same order then and when
    it is complete.
    """

    shuffle: Literal["global", "window", "none"]
    window: int
    seed: int

    def sequences_needed(self, k: int) -> int | None:
        """How many sequences of a growing source must exist before number k of its order is known;
        None: all."""
        if self.shuffle == "global":
            return None
        if self.shuffle == "none":
            return k + 1
        _, stop = _windows(np.array([k]), np.array([0]), self.window)
        return int(stop[0])

    def sequences(self, k: np.ndarray, count: int, source: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, sequence) int64 (N,) of numbers k of a source that has `count` sequences. An
        epoch has each sequence once."""
        epoch, place = np.divmod(np.asarray(k, np.int64), count)
        if self.shuffle == "none":
            return epoch, place
        if self.shuffle == "global":
            start = np.zeros_like(place)
            stop = np.full_like(place, count)
        else:
            start, stop = _windows(place, epoch, self.window)
        size = np.minimum(stop, count) - start
        keys = key(self.seed, SEQUENCES, source, epoch, start)
        return epoch, start + permute(place - start, size, keys).astype(np.int64)

    def pieces(
        self, number: np.ndarray, pieces: int, first: int, stop: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(sequence of the run, piece of it) int64 (N,), where sequences `first` to `stop` (None:
        the run's end) are given in `pieces` pieces each.

        Piece number n is in its place where nothing is shuffled. Else the pieces are permuted
        inside windows that double until they have `window` pieces, so that a batch does not hold
        only pieces of a few sequences. With any windows, each piece comes once.
        """
        number = np.asarray(number, np.int64)
        if self.shuffle != "none":
            place = number - first * pieces
            start, end = _windows(place, np.zeros_like(place), self.window)
            if stop is not None:
                end = np.minimum(end, (stop - first) * pieces)
            keys = key(self.seed, PIECES, first, start)
            permuted = permute(place - start, end - start, keys).astype(np.int64)
            number = first * pieces + start + permuted
        return number // pieces, number % pieces


def places(
    order: Order,
    numbers: Sequence[int],
    sizes: Sequence[int],
    shares: tuple[float, ...],
    seed: int,
) -> list[tuple[int, int, int]]:
    """(source, epoch, record) of these numbers of the run, where sources have so many records each
    and all of them are there."""
    source_N, k_N = mix(np.array(numbers), shares, seed)
    epoch_N = np.empty_like(k_N)
    record_N = np.empty_like(k_N)
    for source, size in enumerate(sizes):
        of_it_N = source_N == source
        epoch_N[of_it_N], record_N[of_it_N] = order.sequences(k_N[of_it_N], size, source)
    return list(zip(source_N.tolist(), epoch_N.tolist(), record_N.tolist()))


def _windows(place: np.ndarray, epoch: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """[start, stop) of the window around each place of an epoch; int64 (N,).

    In the first epoch windows double until they have their full size, so that training can begin
    long before so many sequences exist. With 64 sequences first and size = 300:
        [0, 64) [64, 128) [128, 256) [256, 512) [512, 812) [812, 1112) ...
    Later epochs begin on a complete source, with full windows.
    """
    first = min(FIRST_WINDOW_SEQUENCES, size)
    doublings = max(0, int(np.ceil(np.log2(size / first))))
    doubling_end = np.where(epoch == 0, first << doublings, 0)
    is_doubling = place < doubling_end
    power = np.floor(np.log2(np.maximum(place // first, 1))).astype(np.int64)
    doubling_start = np.where(place < first, 0, first << power)
    doubling_stop = np.where(place < first, first, first << (power + 1))
    full_start = doubling_end + (place - doubling_end) // size * size
    start = np.where(is_doubling, doubling_start, full_start)
    stop = np.where(is_doubling, doubling_stop, full_start + size)
    return start, stop
