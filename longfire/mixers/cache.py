"""What layers keep between the calls of a generation: states of constant size, and keys and values
that grow."""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

# In place of a layer: the token ids of the whole text, where a model has to compute it again.
IDS = -1
# (B, S, G, K): one entry a token; everything else a layer keeps has a size of its own.
GROWING = ("k", "v")


class Cache:
    """For each layer a dict of tensors whose first dim is the row.

    Rows of different lengths share a cache with their newest tokens side by side: the shorter ones
    have padding on the left.
    """

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self.length = 0  # tokens already seen, of the longest row
        # By how many tokens each row is shorter; None: none is.
        self.padding_B: Tensor | None = None
        # What keys lie in (B, G, R, K); how much of R is taken.
        self.rooms: dict[tuple[int, str], tuple[Tensor, int]] = {}

    @property
    def lengths_B(self) -> Tensor | int:
        """Tokens already seen of each row; one number where all rows have the same."""
        if self.padding_B is None:
            return self.length
        return self.length - self.padding_B

    def of(self, layer: int) -> "Cache":
        """What this layer's block is given of it."""
        return self

    def kept(self, layer: int) -> dict[str, Tensor]:
        """What the layer reads, and writes anew."""
        return self.layers[layer]

    def drop_all_but(self, layer: int) -> None:
        """Forget what the other layers kept."""
        self.layers = defaultdict(dict, {layer: self.layers[layer]})
        self.rooms.clear()

    def hidden_B(self, keys: int, tokens: int) -> Tensor | None:
        """How many of a layer's `keys`, the last `tokens` of which are new, are padding in each
        row; None: none."""
        if self.padding_B is None:
            return None
        return (keys - tokens - (self.length - self.padding_B)).clamp_min(0)

    def append(self, layer: int, name: str, x_BTGK: Tensor, window: int = 0) -> Tensor:
        """Put keys or values behind those of the layer and return all (B, S, G, K); of a window
        only those are kept that the next query can see.

        They lie in a room that doubles when it is full, so that a token costs its own copy and not
        one of all before it, and there the keys of one head lie together: attention to 4096 keys
        takes 0.6 of the time.
        """
        before = self.layers[layer].get(name, x_BTGK[:, :0])
        T = x_BTGK.shape[1]
        rows = before.shape[1]
        room, taken = self.rooms.get((layer, name), (None, 0))
        if room is None or taken + T > room.shape[2]:
            room = in_room(before, max(rows + T, 2 * (window or rows)))
            taken = rows
        room[:, :, taken : taken + T] = x_BTGK.transpose(1, 2)
        all_BSGK = room[:, :, taken - rows : taken + T].transpose(1, 2)
        kept_BSGK = all_BSGK[:, max(0, rows + T - window + 1) :] if window else all_BSGK
        if window and room.shape[2] > 2 * window:  # what a long chunk took is given back
            room = in_room(kept_BSGK, 2 * window)
            taken = kept_BSGK.shape[1] - T
            kept_BSGK = room[:, :, : kept_BSGK.shape[1]].transpose(1, 2)
        self.layers[layer][name], self.rooms[layer, name] = kept_BSGK, (room, taken + T)
        return all_BSGK

    @classmethod
    def stack(cls, caches: "list[Cache]") -> "Cache":
        """One cache of the rows of several, of any lengths; a copy."""
        joined = cls()
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
                joined.layers[layer][name] = torch.cat(
                    left_padded(rows) if name in GROWING else rows
                )
        return joined

    def select(self, rows: list[int]) -> "Cache":
        """A cache of some of the rows only, as long as the longest of them; a copy."""
        chosen = type(self)()
        cut = 0
        if self.padding_B is not None:
            padding_B = self.padding_B[rows]
            cut = int(padding_B.min())
            chosen.padding_B = padding_B - cut if (padding_B > cut).any() else None
        chosen.length = self.length - cut
        for layer, kept in self.layers.items():
            for name, tensor in kept.items():
                first = max(0, tensor.shape[1] - chosen.length) if name in GROWING else 0
                chosen.layers[layer][name] = tensor[rows, first:] if first else tensor[rows]
        return chosen

    def memory_bytes(self) -> int:
        """What the cache takes of the device, with the room for keys that are still to come."""
        sizes: dict[int, int] = {}  # by address: layers may share a storage
        for kept in self.layers.values():
            for tensor in kept.values():
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())


def in_room(x_BSGK: Tensor, size: int) -> Tensor:
    """(B, G, size, K) whose first places are these keys."""
    B, S, G, K = x_BSGK.shape
    room = x_BSGK.new_empty(B, G, size, K)
    room[:, :, :S] = x_BSGK.transpose(1, 2)
    return room


def left_padded(rows: list[Tensor]) -> list[Tensor]:
    """Keys (B, S, G, K) of different S, all with as many as the longest: zeros before the others'
    first."""
    longest = max(x.shape[1] for x in rows)
    return [F.pad(x, (0, 0, 0, 0, longest - x.shape[1], 0)) for x in rows]
