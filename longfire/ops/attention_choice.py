"""Which softmax attention computes sequences that are whole in one process, as [attention] says."""

from functools import partial

from longfire.config.settings import Attention
from longfire.ops.attention import attention_reference
from longfire.ops.blockwise import blockwise
from longfire.ops.sequence_ops import LocalSequence


def local_sequence(chosen: Attention) -> LocalSequence:
    """auto: by device; vanilla: the reference, all scores at once; blockwise: in chunks."""
    if chosen.kind == "vanilla":
        return LocalSequence(attention_reference)
    if chosen.kind == "blockwise":
        return in_chunks(chosen.query_chunk_size, chosen.key_chunk_size)
    return LocalSequence()


def in_chunks(queries: int, keys: int) -> LocalSequence:
    """Attention to so many keys at a time, of so many queries."""
    chunks = (queries, keys)
    return LocalSequence(partial(blockwise, chunks=chunks), chunks)
