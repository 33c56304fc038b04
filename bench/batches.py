"""How fast batches come out of a token store, and how long it takes to find a place in a store of 10^12 tokens.

Goals: 20M tokens/s in one process, without prefetching; under 50 ms from a store that is just opened to a batch
from anywhere in it. The large store is generated and sparse: every file has its full size, and the ids are holes (zeros), so
that finding is measured and not a disk.
"""

import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
from measure import alternate, arguments, medians, print_table, seconds, write_result

from longfire.config import settings
from longfire.data.batches import Batches
from longfire.data.blocks import BLOCK_BYTES, Sums, sum_of, sums_file, written_sums
from longfire.data.manifest import MASK, column_shapes, read_manifest, shard_file, write_manifest
from longfire.data.prepare import Prepared
from longfire.data.store_writer import SHARD_DOCUMENTS, SHARD_TOKENS, StoreWriter
from longfire.data.token_record import TokenRecord
from longfire.data.tokenizer import bytes_tokenizer
from longfire.data.tokens import TokenStore

TOKENS_PER_SECOND, SEEK_SECONDS = 20e6, 0.05
T, ROWS = 2048, 16
LARGE_TOKENS, DOCUMENT_TOKENS = 10**12, 10**5
HEADER = {
    "source": {"name": "random", "entry": "random", "fingerprint": "random"},
    "tokenizer": {"fingerprint": bytes_tokenizer().fingerprint, "vocab_size": 258},
    "options": {},
    "dtype": "uint16",
}


def written_store(folder: Path, tokens: int) -> TokenStore:
    """A finished store of random ids in documents of 100 to 2000 tokens."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    writer = StoreWriter(folder, HEADER)
    while writer.tokens("train") < tokens:
        lengths = draw.integers(100, 2000, 4096)
        ids = draw.integers(0, 256, lengths.sum(), np.uint16)
        writer.append("train", TokenRecord(ids, lengths), lengths)
    writer.commit({}, complete=True)
    writer.close()
    return TokenStore(folder)


def sparse_store(folder: Path, tokens: int) -> Path:
    """A finished store of `tokens` ids that take no room; the ends of its documents are written, one in 10^5 tokens."""
    folder.mkdir()
    StoreWriter(folder, HEADER).close()
    manifest = read_manifest(folder)
    documents = tokens // DOCUMENT_TOKENS
    shards = []
    for name, (dtype, items) in column_shapes("uint16", SHARD_TOKENS, SHARD_DOCUMENTS).items():
        if name == MASK:
            continue  # every token counts in the loss
        for number, start in enumerate(range(0, tokens if name == "tokens" else documents, items)):
            count = min(items, (tokens if name == "tokens" else documents) - start)
            file, size = (
                shard_file(folder / "train" / name, number),
                count * np.dtype(dtype).itemsize,
            )
            if name == "tokens":
                file.touch()
                os.truncate(file, size)
                sums = sums_of_zeros(file, size)
            else:
                ((np.arange(start, start + count) + 1) * DOCUMENT_TOKENS).astype(dtype).tofile(file)
                sums = written_sums(file, size)
            shards.append({"file": file.name, "size": size, **sums._asdict()})
    manifest["streams"]["train"] = {
        "tokens": tokens,
        "documents": documents,
        "bytes": tokens,
        "shards": shards,
    }
    write_manifest(folder, {**manifest, "complete": True})
    return folder


def sums_of_zeros(file: Path, size: int) -> Sums:
    """Checksums of a file of zeros, without reading it."""
    whole, rest = divmod(size, BLOCK_BYTES)
    blocks = sum_of(bytes(BLOCK_BYTES)) * whole
    sums_file(file).write_bytes(blocks)
    return Sums(zlib.crc32(blocks), zlib.crc32(bytes(rest)))


def batches_of(store: TokenStore, **changes: object) -> Batches:
    prepared = Prepared(bytes_tokenizer(), (store,), (1.0,), ("random",))
    return Batches(prepared, settings.Data(prefetch_factor=0, **changes), T, seed=0)


def rates(tokens: int, batches: int, repeats: int) -> list[dict]:
    """Tokens/s of `batches` batches one after the other, for each way to make them."""
    kinds = {
        "global shuffle": {},
        "window shuffle": {"shuffle": "window"},
        "global shuffle, varlen": {"varlen": True},
    }
    with tempfile.TemporaryDirectory() as folder:
        store = written_store(Path(folder, "store"), tokens)
        made = {name: batches_of(store, **changes) for name, changes in kinds.items()}
        functions = {
            name: lambda b=b: [b.at(number * ROWS, ROWS) for number in range(batches)]
            for name, b in made.items()
        }
        times = medians(alternate(functions, repeats))
    found = {name: batches * ROWS * T / time for name, time in times.items()}
    return [
        {
            "what": f"batches, {name}",
            "M tokens/s": rate / 1e6,
            "goal": f">= {TOKENS_PER_SECOND / 1e6:.0f}",
            "reached": rate >= TOKENS_PER_SECOND,
        }
        for name, rate in found.items()
    ]


def seeks(tokens: int, count: int) -> list[dict]:
    """Milliseconds from anywhere, each time from a newly opened store as a resumed run has it; goals are for medians."""
    draw = np.random.default_rng(1)
    times: dict[str, list[float]] = {
        "open the store": [],
        "a batch from anywhere": [],
        "the same, its pages in memory": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = sparse_store(Path(folder, "store"), tokens)
        for place in draw.integers(0, 3 * tokens // T, count).tolist():  # of the first three epochs
            for what in ("a batch from anywhere", "the same, its pages in memory"):
                times["open the store"].append(seconds(lambda: TokenStore(path)))
                batches = batches_of(TokenStore(path), varlen=True)
                times[what].append(seconds(lambda b=batches, p=place: b.at(p, ROWS)))
    rows = []
    for what, found in times.items():
        median = float(np.median(found))
        rows.append(
            {
                "what": what,
                "median ms": 1e3 * median,
                "worst ms": 1e3 * max(found),
                "goal": f"< {1e3 * SEEK_SECONDS:.0f}",
                "reached": median < SEEK_SECONDS,
            }
        )
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0], tokens=200_000_000, repeats=7)
    tokens, batches, repeats, count = (
        (2_000_000, 20, 2, 5) if options.quick else (options.tokens, 400, options.repeats, 50)
    )
    rate_rows, seek_rows = rates(tokens, batches, repeats), seeks(LARGE_TOKENS, count)
    print_table(
        f"{ROWS} rows of {T} tokens, one process, a store of {tokens / 1e6:.0f}M tokens", rate_rows
    )
    print_table(f"seek in a store of {LARGE_TOKENS:.0e} tokens", seek_rows)
    write_result("batches", {"rows": rate_rows, "seek": seek_rows}, options.quick)


if __name__ == "__main__":
    main()
