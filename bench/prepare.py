"""`prepare` against the tokenizer library alone, on the same text and as many processes: how much the rest of the work costs.

Goal: at least 85 % of the library's own rate on 2 processes. The library gets its texts in memory, ready in lists,
what it returns is thrown away, and it is called as fast as it goes (`encode_batch_fast`: no offsets): once with its own
threads, once as processes of one thread each; the faster is the yardstick. `prepare` reads jsonl, tokenizes, hashes, and
writes a store that would survive a power cut, from an empty folder.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import arguments, print_table, write_result
from tokenizers import Tokenizer as VocabularyShard

from longfire.config import settings
from longfire.data import text
from longfire.data.prepare import prepare
from longfire.data.tokenizer import train_tokenizer
from longfire.data.tokenizer_training import sample
from longfire.data.validation import ValidationSplit

GOAL = 0.85
DOCUMENTS = 1024  # of one call of the library
WORDS = 32_000


def write_texts(folder: Path, megabytes: float, words: int) -> None:
    """texts.jsonl of Python's own library, again and again up to the size, and a tokenizer.json trained on it."""
    (source,) = text.sources(settings.Data())
    size = 0
    with (folder / "texts.jsonl").open("w") as file:
        while size < megabytes * 1e6:
            for document in source.documents():
                if document.text and size < megabytes * 1e6:
                    file.write(json.dumps({"text": document.text}) + "\n")
                    size += len(document.text)
    train_tokenizer(sample(source, 4_000_000, ValidationSplit(0.0)), words).save(
        folder / "tokenizer"
    )


def library(folder: Path, part: int, parts: int) -> None:
    """A process of its own: get ready, say so, wait for a line, encode every `parts`-th text, say how many tokens."""
    words = VocabularyShard.from_file(str(folder / "tokenizer/tokenizer.json"))
    lines = (folder / "texts.jsonl").read_text().splitlines()[part::parts]
    texts = [json.loads(line)["text"] for line in lines]
    print("ready", flush=True)
    sys.stdin.readline()
    tokens = 0
    for start in range(0, len(texts), DOCUMENTS):
        encoded = words.encode_batch_fast(
            texts[start : start + DOCUMENTS], add_special_tokens=False
        )
        tokens += sum(len(one) for one in encoded)
    print(tokens, flush=True)


def library_rate(folder: Path, processes: int, threads: int) -> float:
    """Tokens/s of the library with so many processes of so many threads, without the time they take to get ready."""
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": str(threads > 1).lower(),
        "RAYON_NUM_THREADS": str(threads),
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--library", str(folder), str(part), str(processes)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(processes)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    begun = time.perf_counter()
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    tokens = sum(int(process.stdout.readline()) for process in started)
    rate = tokens / (time.perf_counter() - begun)
    for process in started:
        process.communicate()
    return rate


def prepare_rate(folder: Path, processes: int) -> float:
    """Tokens/s of the whole of `prepare`, its processes' start included."""
    with tempfile.TemporaryDirectory(dir=folder) as stores:
        data = settings.Data(
            dataset=(str(folder / "texts.jsonl"),),
            folder=stores,
            validation_fraction=0.0,
            num_workers=processes,
        )
        wanted = settings.Tokenizer(path=str(folder / "tokenizer"), add_eos=False)
        begun = time.perf_counter()
        with prepare(data, wanted) as prepared:
            return prepared.stores[0].train.length / (time.perf_counter() - begun)


def main() -> None:
    if sys.argv[1:2] == ["--library"]:
        library(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return
    options = arguments(__doc__.splitlines()[0], megabytes=100.0, processes=2, repeats=5)
    megabytes, repeats, words = (
        (6.0, 1, 2000) if options.quick else (options.megabytes, options.repeats, WORDS)
    )
    n = options.processes
    measured: dict[str, list[float]] = {
        f"library, {n} threads": [],
        f"library, {n} processes": [],
        "prepare": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder), megabytes, words)
        for _ in range(repeats):
            measured[f"library, {n} threads"].append(library_rate(Path(folder), 1, n))
            measured[f"library, {n} processes"].append(library_rate(Path(folder), n, 1))
            measured["prepare"].append(prepare_rate(Path(folder), n))
    rates = {name: sorted(found)[len(found) // 2] for name, found in measured.items()}
    best = max(rate for name, rate in rates.items() if name != "prepare")
    rows = [
        {"what": name, "M tokens/s": rate / 1e6, "of the faster library": rate / best}
        for name, rate in rates.items()
    ]
    print_table(f"{megabytes:.0f} MB of jsonl, BPE of {words} words, {n} processes", rows)
    share = rates["prepare"] / best
    print(
        f"prepare reaches {share:.0%} of the library's rate; goal {GOAL:.0%}: {'reached' if share >= GOAL else 'missed'}"
    )
    write_result("prepare", {"rows": rows, "share": share, "goal": GOAL}, options.quick)


if __name__ == "__main__":
    main()
