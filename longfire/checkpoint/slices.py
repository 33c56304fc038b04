"""Whether the parts of each tensor in the files of a checkpoint make up the tensor: inside it,
apart from each other, without a hole. Nothing is allocated for it."""

from collections.abc import Mapping
from math import prod

from longfire.checkpoint.shards import Entry, StoredPart


def first_wrong(index: Mapping[str, Entry]) -> str:
    """What is wrong with the parts of the first such tensor, by its name; "" if nothing is."""
    for name, entry in index.items():
        wrong = wrong_of(entry)
        if wrong:
            return f"{name}: {wrong}"
    return ""


def wrong_of(entry: Entry) -> str:
    """What is wrong with the parts of a tensor; "" if they make it up."""
    if any(length < 0 for length in entry.shape):
        return "its shape is negative"
    parts: list[StoredPart] = []
    for part in entry.parts:
        if not is_inside(part, entry.shape):
            return f"a part in {part.path.name} lies outside it"
        if prod(part.size):
            parts.append(part)
    both = overlapping(parts)
    if both:
        first, second = both
        return f"parts in {first.path.name} and {second.path.name} overlap"
    if sum(prod(part.size) for part in parts) != prod(entry.shape):
        return "a part of it is in no file"
    return ""


def is_inside(part: StoredPart, shape: tuple[int, ...]) -> bool:
    """Whether a part lies inside a tensor of this shape."""
    if not len(part.begin) == len(part.size) == len(shape):
        return False
    ends = [begin + size for begin, size in zip(part.begin, part.size)]
    fits = all(end <= length for end, length in zip(ends, shape))
    return fits and min(part.begin, default=0) >= 0


def overlapping(parts: list[StoredPart]) -> tuple[StoredPart, StoredPart] | None:
    """Two parts that have a number in common; None if there are none.

    Parts are compared with those only that have not ended where they begin, along the dimension
    that they were cut along most: thousands of processes make thousands of parts.
    """
    if len(parts) < 2:
        return None
    if not parts[0].size:
        return parts[0], parts[1]
    axis = most_cut_axis(parts)
    current: list[StoredPart] = []
    for part in sorted(parts, key=lambda part: part.begin[axis]):
        begin = part.begin[axis]
        current = [other for other in current if other.begin[axis] + other.size[axis] > begin]
        for other in current:
            if share_a_number(part, other):
                return other, part
        current.append(part)
    return None


def most_cut_axis(parts: list[StoredPart]) -> int:
    """The dimension along which the parts begin at most places."""
    cuts: list[int] = []
    for axis in range(len(parts[0].size)):
        begins = {part.begin[axis] for part in parts}
        cuts.append(len(begins))
    return cuts.index(max(cuts))


def share_a_number(first: StoredPart, second: StoredPart) -> bool:
    """Whether two parts, neither of which is empty, overlap."""
    for a, size_a, b, size_b in zip(first.begin, first.size, second.begin, second.size):
        if a + size_a <= b or b + size_b <= a:
            return False
    return True
