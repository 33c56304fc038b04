"""What layers keep between the calls of transformers' `generate`: longfire's cache with
the interface of transformers."""

from torch import Tensor
from transformers import Cache as TransformersCache

from longfire.mixers.cache import Cache
from longfire.mixers.cache_rows import selected


class GenerationCache(TransformersCache):
    """past_key_values of LongfireForCausalLM: the states and keys of a batch.

    kept: the states and keys of the layers. seen: tokens of a sequence that the model was given,
    padding too, as transformers counts them.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept = Cache()
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    def reset(self) -> None:
        self.kept = Cache()
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.kept = selected(self.kept, indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        numbers: list[int] = []
        for number in range(self._sequences()):
            numbers += [number] * repeats
        self.kept = selected(self.kept, numbers)

    def _sequences(self) -> int:
        """How many sequences the cache is of."""
        for layer in self.kept.layers.values():
            for tensor in layer.values():
                return len(tensor)
        raise ValueError("the cache is empty: no layer has kept anything yet")

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a recurrent state cannot forget the last tokens."""
        raise ValueError(
            "LongfireForCausalLM cannot take tokens back: its states are of all tokens; leave out "
            "what needs it"
        )
