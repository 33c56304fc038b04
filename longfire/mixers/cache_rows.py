"""Rows of caches, as serving needs them: joined, selected, and what they take."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.mixers.cache import Cache

# (B, S, G, K): one entry a token; everything else a layer keeps has a size of its own.
GROWING = ("k", "v")


def stacked(caches: list[Cache]) -> Cache:
    """One cache of the sequences of several, of any lengths; a copy."""
    joined = Cache()
    joined.length = max(cache.length for cache in caches)
    padding = []
    for cache in caches:
        first = next(tensor for kept in cache.layers.values() for tensor in kept.values())
        short = joined.length - cache.lengths_B
        padding.append(torch.as_tensor(short, device=first.device).expand(len(first)))
    joined.padding_B = torch.cat(padding) if any(p.any() for p in padding) else None
    for layer, kept in caches[0].layers.items():
        if not all(layer in cache.layers for cache in caches):
            continue  # one of them computes its whole text again, so all do (IDS)
        for name in kept:
            rows = [cache.layers[layer][name] for cache in caches]
            joined.layers[layer][name] = torch.cat(left_padded(rows) if name in GROWING else rows)
    return joined


def selected(cache: Cache, rows: list[int]) -> Cache:
    """A cache of some of the sequences only, as long as the longest of them; a copy."""
    chosen = Cache()
    cut = 0
    if cache.padding_B is not None:
        padding_B = cache.padding_B[rows]
        cut = int(padding_B.min())
        chosen.padding_B = padding_B - cut if (padding_B > cut).any() else None
    chosen.length = cache.length - cut
    for layer, kept in cache.layers.items():
        for name, tensor in kept.items():
            first = max(0, tensor.shape[1] - chosen.length) if name in GROWING else 0
            chosen.layers[layer][name] = tensor[rows, first:] if first else tensor[rows]
    return chosen


def memory_bytes(cache: Cache) -> int:
    """What the cache takes of the device, with the room for keys that are still to come."""
    sizes: dict[int, int] = {}  # by address: layers may share a storage
    for kept in cache.layers.values():
        for tensor in kept.values():
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def left_padded(rows: list[Tensor]) -> list[Tensor]:
    """Keys (B, S, G, K) of different S, all with as many as the longest: zeros before the others'
    first."""
    longest = max(x.shape[1] for x in rows)
    return [F.pad(x, (0, 0, 0, 0, longest - x.shape[1], 0)) for x in rows]
