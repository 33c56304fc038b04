"""What layers keep between the calls of a generation: states of constant size, and keys and values
that grow."""

from collections import defaultdict

from torch import Tensor

# In place of a layer: the token ids of the whole text, where a model has to compute it again.
IDS = -1


class Cache:
    """For each layer a dict of tensors whose first dim is the sequences.

    Rows of different lengths share a cache with their newest tokens side by side: the shorter ones
    have padding on the left.
    """

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self.length = 0  # tokens already seen, of the longest sequence
        # By how many tokens each sequence is shorter; None: none is.
        self.padding_B: Tensor | None = None
        # What keys lie in (B, G, R, K); how much of R is taken.
        self.rooms: dict[tuple[int, str], tuple[Tensor, int]] = {}

    @property
    def lengths_B(self) -> Tensor | int:
        """Tokens already seen of each sequence; one number where all have the same."""
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
        sequence; None: none."""
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


def in_room(x_BSGK: Tensor, size: int) -> Tensor:
    """(B, G, size, K) whose first places are these keys."""
    B, S, G, K = x_BSGK.shape
    room = x_BSGK.new_empty(B, G, size, K)
    room[:, :, :S] = x_BSGK.transpose(1, 2)
    return room
