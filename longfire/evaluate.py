"""How well a model predicts documents it never saw: loss, perplexity and bits per byte, by source."""

import functools
import json
import lzma
import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from longfire import settings
from longfire.data.batches import Batches
from longfire.data.pack import NO_LABEL
from longfire.data.prepare import prepare
from longfire.data.tokenizer import Tokenizer, byte_level_alphabet
from longfire.errors import DataError, SettingsError
from longfire.loss import loss_sum
from longfire.model import Model
from longfire.run import Run
from longfire.weights import open_model

ROWS = 8  # rows of a batch
BYTE_OF = byte_level_alphabet()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # other rows and no gradients: a compiled model would be compiled again
def evaluate(model: Model, batches: Batches, tokens: int, chunk_tokens: int) -> dict[str, dict[str, float]]:
    """{source: {loss (nats a token), perplexity, bits_per_byte, tokens, bytes}} on up to `tokens` held-out tokens of each.

    Bits per byte are the nats of all real labels / ln 2 / the bytes of the text that these labels decode to, so that models
    with different tokenizers can be compared; BOS and EOS cost nats and have no bytes. Sources without held-out documents
    are left out.
    """
    lengths_W = byte_lengths(batches.prepared.tokenizer)
    device = next(model.parameters()).device
    results = {}
    for index, name in enumerate(batches.prepared.names):
        nats, count, size = 0.0, 0, 0
        for batch in batches.heldout(index, tokens, ROWS):
            labels = real_labels(batch)
            nats += loss_sum(model, batch.to(device), chunk_tokens).item()
            count, size = count + len(labels), size + int(lengths_W[labels].sum())
        if count:
            results[name] = {
                "loss": nats / count,
                "perplexity": math.exp(min(nats / count, 700.0)),  # e^710 is no fp64
                "bits_per_byte": nats / math.log(2) / size if size else math.nan,
                "tokens": count,
                "bytes": size,
            }
    return results


def real_labels(batch) -> np.ndarray:
    """The labels that count, in the order of the text."""
    labels = batch.labels_BT.numpy().ravel()
    return labels[labels != NO_LABEL]


def heldout_bytes(batches: Batches, source: str, tokens: int) -> bytes:
    """The very bytes of a source that `evaluate` predicts with the same `tokens`."""
    table = token_bytes(batches.prepared.tokenizer)
    index = batches.prepared.names.index(source)
    labels = chain.from_iterable(real_labels(batch).tolist() for batch in batches.heldout(index, tokens, ROWS))
    return b"".join(table[label] for label in labels)


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9` reaches on these bytes, headers included: a yardstick that needs no model."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text) if text else math.nan


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(W,) int64: bytes of UTF-8 that each id stands for."""
    return np.array([len(word) for word in token_bytes(tokenizer)], np.int64)


@functools.lru_cache(4)
def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id stands for; special words (BOS, EOS) stand for none.

    Byte-level tokenizers (GPT-2 and most since): each character of a word is one byte by GPT-2's table, so bytes are exact
    even where a word is half a character. SentencePiece: `▁` is a space and `<0x0A>` one byte. Others: the word decoded alone.
    """
    spelled = tokenizer.words.get_vocab(with_added_tokens=True)
    added = tokenizer.words.get_added_tokens_decoder()
    decoder = json.loads(tokenizer.words.to_str())["decoder"] or {}
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
            table[number] = tokenizer.words.decode([number]).encode()
    return table


def main(run_folder: Path, step: int = -1, tokens: int = 0, plugins: tuple[str, ...] = ()) -> int:
    """Evaluate a run's checkpoint (-1: the newest whole one) on its held-out documents and print the table."""
    opened = open_model(Path(run_folder), step, plugins=plugins)
    run = opened.run
    if run is None:
        raise SettingsError(f"{run_folder} is no run folder, so it does not say which documents were held out")
    with (
        prepare(run.data, trained_with(run)) as prepared,
        Batches(prepared, run.data, run.training.seq_len, run.training.seed) as batches,
    ):
        results = evaluate(opened.model, batches, tokens or run.eval.tokens, run.training.loss_chunk_tokens)
    if not results:
        raise DataError("no document was held out: raise data.heldout_fraction, or add text")
    show(results, opened.step)
    return 0


def trained_with(run: Run) -> settings.Tokenizer:
    """The run's tokenizer settings with the copy in its folder: `train` would make another one where the data have changed."""
    kept = run.tokenizer_folder
    return replace(run.tokenizer, path=str(kept)) if kept.is_dir() else run.tokenizer


def show(results: dict[str, dict[str, float]], step: int) -> None:
    """The table that `longfire eval` prints."""
    table = Table("source", title=f"step {step}, held-out documents", title_justify="left")
    for name in ("loss (nats a token)", "perplexity", "bits a byte", "tokens", "bytes"):
        table.add_column(name, justify="right")
    for source, n in results.items():
        table.add_row(source, f"{n['loss']:.4f}", f"{n['perplexity']:.2f}", f"{n['bits_per_byte']:.4f}", f"{n['tokens']:,}",
                      f"{n['bytes']:,}")  # fmt: skip
    Console().print(table)
