"""cache.py: what was appended comes back, however it was cut; rows of several lengths in one cache; memory as it is taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.mixers.cache import Cache
from longfire.mixers.cache_rows import memory_bytes, selected, stacked

G, K = 2, 4


def rows(T: int, B: int = 2, start: int = 0) -> torch.Tensor:
    """Keys that tell row and place."""
    return (
        torch.arange(start, start + T)[None, :, None, None]
        + 1000 * torch.arange(B)[:, None, None, None]
    ).expand(B, T, G, K)


@given(
    some.lists(some.integers(1, 9), min_size=1, max_size=30), some.sampled_from([0, 1, 2, 5, 40])
)
@settings(deadline=None)
def test_what_was_appended_comes_back(chunks, window):
    cache, seen = Cache(), 0
    for T in chunks:
        before = min(seen, window - 1) if window else seen
        all_BSGK = cache.append(3, "k", rows(T, start=seen).float(), window)
        assert torch.equal(all_BSGK, rows(before + T, start=seen - before).float())
        seen += T
        kept = min(seen, window - 1) if window else seen
        assert torch.equal(cache.layers[3]["k"], rows(kept, start=seen - kept).float())
    if window:
        assert memory_bytes(cache) <= 2 * window * 2 * G * K * 4
    else:
        assert memory_bytes(cache) <= 2 * seen * 2 * G * K * 4


def test_a_token_copies_itself_and_not_all_before_it():
    cache = Cache()
    cache.append(0, "k", rows(100).float())
    cache.append(0, "k", rows(1).float())
    room = cache.layers[0]["k"].untyped_storage().data_ptr()
    for _ in range(99):
        cache.append(0, "k", rows(1).float())
        assert cache.layers[0]["k"].untyped_storage().data_ptr() == room
    cache.append(0, "k", rows(1).float())
    assert cache.layers[0]["k"].untyped_storage().data_ptr() != room


def filled(length: int, window: int) -> Cache:
    """One row: layer 0 with all keys, layer 1 with a window, layer 2 with a state."""
    cache = Cache()
    for layer, size in ((0, 0), (1, window)):
        for name in "kv":
            cache.append(layer, name, rows(length, B=1).float() + 10_000 * length, size)
    cache.layers[2]["state"] = torch.full((1, 3, 3), float(length))
    cache.length = length
    return cache


@pytest.mark.parametrize("window", [4, 9])
def test_rows_of_several_lengths(window):
    lengths = [3, 8, 5]
    joined = stacked([filled(length, window) for length in lengths])
    assert (
        joined.length == 8
        and joined.lengths_B.tolist() == lengths
        and joined.padding_B.tolist() == [5, 0, 3]
    )
    for chosen in ([0, 1, 2], [2, 0], [1], [0]):
        some_rows = selected(joined, chosen)
        longest = max(lengths[row] for row in chosen)
        assert some_rows.length == longest
        assert torch.as_tensor(some_rows.lengths_B).expand(len(chosen)).tolist() == [
            lengths[row] for row in chosen
        ]
        for layer, size in ((0, longest), (1, min(longest, window - 1))):
            kept = some_rows.layers[layer]["k"]
            assert kept.shape[1] == size
            for place, row in enumerate(chosen):
                real = min(size, lengths[row])
                alone = filled(lengths[row], window).layers[layer]["k"]
                assert torch.equal(kept[place, size - real :], alone[0, len(alone[0]) - real :])
        assert some_rows.layers[2]["state"][:, 0, 0].tolist() == [lengths[row] for row in chosen]


def test_what_is_hidden_of_a_layers_keys():
    joined = stacked([filled(length, 4) for length in (2, 8)])
    assert joined.hidden_B(keys=9, tokens=1).tolist() == [6, 0]  # all keys and a new one: 8 + 1
    assert joined.hidden_B(keys=4, tokens=1).tolist() == [
        1,
        0,
    ]  # a window of 4: the short row has 2 + 1 real ones
    assert stacked([filled(5, 4), filled(5, 4)]).hidden_B(6, 1) is None


def test_stacks_of_stacks():
    twice = stacked([stacked([filled(2, 4), filled(8, 4)]), filled(9, 4)])
    assert twice.lengths_B.tolist() == [2, 8, 9]
    assert twice.layers[0]["k"].shape[:2] == (3, 9)
