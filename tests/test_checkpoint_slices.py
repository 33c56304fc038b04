"""slices.py beside a plain count of how often each number of a tensor is in a part."""

import random
from pathlib import Path

import numpy as np
import torch

from longfire.checkpoint.shards import Entry, StoredPart
from longfire.checkpoint.slices import first_wrong


def random_parts(chance: random.Random, shape: tuple[int, ...]) -> list[StoredPart]:
    """The parts of a grid, of which one may be moved, lost or doubled."""
    parts = [((0,) * len(shape), shape)]
    for axis, length in enumerate(shape):
        cut = chance.randrange(length + 1)
        halves = []
        for begin, size in parts:
            first, second = list(size), list(size)
            first[axis], second[axis] = cut, length - cut
            moved = list(begin)
            moved[axis] = cut
            halves += [(begin, tuple(first)), (tuple(moved), tuple(second))]
        parts = halves
    number = chance.randrange(len(parts))
    way = chance.randrange(4)
    if way == 0:
        begin, size = parts[number]
        parts[number] = (tuple(first + chance.randint(-1, 1) for first in begin), size)
    elif way == 1:
        del parts[number]
    elif way == 2:
        parts.append(parts[number])
    return [StoredPart(Path("f"), "key", begin, size) for begin, size in parts]


def is_whole(parts: list[StoredPart], shape: tuple[int, ...]) -> bool:
    """Whether each number of the tensor is in one part, counted."""
    counts = np.zeros(shape, int)
    for part in parts:
        ends = [begin + size for begin, size in zip(part.begin, part.size)]
        if min(part.begin) < 0 or any(end > length for end, length in zip(ends, shape)):
            return False
        counts[tuple(slice(begin, end) for begin, end in zip(part.begin, ends))] += 1
    return bool((counts == 1).all())


def test_parts_that_lie_outside_overlap_or_leave_holes_are_found():
    chance = random.Random(0)
    seen = set()
    for _ in range(500):
        shape = tuple(chance.randint(1, 5) for _ in range(chance.randint(1, 3)))
        parts = random_parts(chance, shape)
        expected = is_whole(parts, shape)
        wrong = first_wrong({"t": Entry(shape, torch.float32, parts)})
        assert (wrong == "") == expected, (shape, parts, wrong)
        seen.add(expected)
    assert seen == {True, False}


def test_a_number_is_in_one_file():
    part = StoredPart(Path("f"), "t", (), ())
    assert first_wrong({"t": Entry((), torch.float32, [part])}) == ""
    assert "overlap" in first_wrong({"t": Entry((), torch.float32, [part, part])})
    assert "in no file" in first_wrong({"t": Entry((), torch.float32, [])})
