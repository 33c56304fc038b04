"""The bytes of text that each id of a tokenizer stands for."""

import functools
import json

import numpy as np

from longfire.data.token_record import TokenRecord
from longfire.data.tokenizer import Tokenizer, byte_level_alphabet

BYTE_OF = byte_level_alphabet()


@functools.lru_cache(4)
def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64: bytes of UTF-8 that each id stands for."""
    return np.array([len(word) for word in token_bytes(tokenizer)], np.int64)


def record_bytes(record: TokenRecord, tokenizer: Tokenizer) -> np.ndarray:
    """(D,) int64: bytes of the text that the ids of each document of a record stand for."""
    starts = np.cumsum(record.lengths) - record.lengths
    return np.add.reduceat(byte_lengths(tokenizer)[record.ids], starts)


@functools.lru_cache(4)
def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id stands for; special tokens (BOS, EOS) stand for none.

    Byte-level tokenizers (GPT-2 and most since): each character of a token is one byte by GPT-2's
    table, so bytes are exact even where a token is half a character. SentencePiece: `▁` is a space
    and `<0x0A>` one byte. Others: the token decoded alone.
    """
    spelled = tokenizer.backend.get_vocab(with_added_tokens=True)
    added = tokenizer.backend.get_added_tokens_decoder()
    decoder = json.loads(tokenizer.backend.to_str())["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    table = [b""] * tokenizer.vocab_size
    for word, number in spelled.items():
        if number in added:
            table[number] = b"" if added[number].special else word.encode()
        elif "ByteLevel" in kinds:
            table[number] = bytes(BYTE_OF[character] for character in word)
        elif "ByteFallback" in kinds and word.startswith("<0x") and len(word) == 6:
            table[number] = bytes.fromhex(word[3:5])
        elif kinds & {"ByteFallback", "Metaspace"}:
            table[number] = word.replace("▁", " ").encode()
        else:
            table[number] = tokenizer.backend.decode([number]).encode()
    return table
