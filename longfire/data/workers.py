"""Processes that tokenize: texts go out over a pipe, ids come back, in the order in which they were
given.

A worker is a child process that ends when its pipe does, so none outlives a killed parent.
Processes and not the library's own threads: making arrays of its results needs the interpreter's
lock, which would stop threads from scaling.
"""

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import numpy as np
from tokenizers import Tokenizer as Backend

from longfire.data.losses import Losses
from longfire.data.record_format import Encoded, EndTokens
from longfire.data.token_record import TokenRecord
from longfire.data.tokenizer import Tokenizer
from longfire.errors import DataError

LOSS_COUNTS = len(Losses().counts())  # numbers of a message before the lengths


def encode(tokenizer: Tokenizer, texts: list[str], ends: EndTokens) -> Encoded:
    """Tokens of documents, each with its `ends`."""
    before = token_array(ends.bos, tokenizer.dtype)
    after = token_array(ends.eos, tokenizer.dtype)
    documents = tokenizer.arrays(texts)
    parts: list[np.ndarray] = []
    lengths = []
    for ids in documents:
        parts += [before, ids, after]
        lengths.append(len(before) + len(ids) + len(after))
    joined = np.concatenate(parts) if parts else before[:0]
    record = TokenRecord(joined, np.array(lengths, np.int64))
    return Encoded(record, sizes_of(texts), tokenizer.losses_of(texts, documents))


def sizes_of(texts: Sequence[str]) -> np.ndarray:
    """Bytes of each text in UTF-8, int64 (D,)."""
    return np.array([utf8_size(text) for text in texts], np.int64)


def utf8_size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    if text.isascii():
        return len(text)
    return len(text.encode())


def token_array(token_id: int | None, dtype: str) -> np.ndarray:
    """An array of one id; an empty one for None."""
    if token_id is None:
        return np.array([], dtype)
    return np.array([token_id], dtype)


class Worker:
    """The parent's side of one tokenizing process, in a session of its own, so that Ctrl-C reaches
    it only through the parent."""

    def __init__(self, tokenizer: Tokenizer, ends: EndTokens) -> None:
        self.dtype = tokenizer.dtype
        self.process = subprocess.Popen(
            [sys.executable, "-m", "longfire.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdin and self.process.stdout, "asked for by PIPE"
        self.requests = self.process.stdin
        self.answers = self.process.stdout
        setup = [tokenizer.backend.to_str(), tokenizer.bos, tokenizer.eos, ends]
        send(self.requests, json.dumps(setup).encode(), b"")

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode in the process. Raises DataError if it has ended."""
        raw = [text.encode() for text in texts]
        sizes = np.array([len(text) for text in raw], np.int64)
        try:
            send(self.requests, sizes.tobytes(), b"".join(raw))
            head, ids = receive(self.answers)
        except (OSError, EOFError) as error:
            raise DataError(
                f"a tokenizing process ended with code {self.process.wait()}; if it was killed for "
                "memory, set a smaller data.num_workers"
            ) from error
        numbers = np.frombuffer(head, np.int64)
        losses = Losses(*numbers[:LOSS_COUNTS].tolist())
        record = TokenRecord(np.frombuffer(ids, self.dtype), numbers[LOSS_COUNTS:])
        return Encoded(record, sizes, losses)


class Encoders:
    """`count` processes that encode, or with 0 this process; use as a context manager."""

    def __init__(self, tokenizer: Tokenizer, ends: EndTokens, count: int) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.count = count
        self._workers: list[Worker] = []
        self._own = threading.local()  # each thread has one process
        self._threads: ThreadPoolExecutor | None = None
        if count:
            self._threads = ThreadPoolExecutor(count, "encoders", self._start)

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.process.communicate()

    def submit(self, texts: list[str]) -> "Future[Encoded]":
        """Encode texts while the caller continues. The future raises DataError if the process
        ended."""
        if self._threads:
            return self._threads.submit(self._encode, texts)
        future: Future[Encoded] = Future()
        future.set_result(encode(self.tokenizer, texts, self.ends))
        return future

    def _start(self) -> None:
        """One process for this thread."""
        worker = Worker(self.tokenizer, self.ends)
        self._workers.append(worker)
        self._own.worker = worker

    def _encode(self, texts: list[str]) -> Encoded:
        worker: Worker = self._own.worker
        return worker.encode(texts)


def send(stream: IO[bytes], head: bytes, body: bytes) -> None:
    """Write a message: the sizes of its two blocks, and the blocks."""
    stream.write(struct.pack("<qq", len(head), len(body)))
    stream.write(head)
    stream.write(body)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[bytes, bytes]:
    """The two blocks of a message. Raises EOFError."""
    head_size, body_size = struct.unpack("<qq", read_exactly(stream, 16))
    return read_exactly(stream, head_size), read_exactly(stream, body_size)


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the pipe ended")
    return content


def work() -> None:
    """The process of a `Worker`: set-up, then batches of texts, until the pipe ends."""
    # One thread each: the processes are the parallelism.
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    requests = sys.stdin.buffer
    answers = sys.stdout.buffer
    try:
        setup, _ = receive(requests)
        backend, bos, eos, ends = json.loads(setup)
        tokenizer = Tokenizer(Backend.from_str(backend), bos, eos)
        while True:
            sizes, raw = receive(requests)
            texts = split_texts(raw, np.frombuffer(sizes, np.int64))
            encoded = encode(tokenizer, texts, EndTokens(*ends))
            lengths = encoded.record.lengths.tolist()
            head = np.array([*encoded.losses.counts(), *lengths], np.int64)
            send(answers, head.tobytes(), encoded.record.ids.tobytes())
    except (EOFError, BrokenPipeError):
        return


def split_texts(raw: bytes, sizes: np.ndarray) -> list[str]:
    """The texts that are end to end in `raw`. sizes: of each in bytes (N,)."""
    texts = []
    start = 0
    for size in sizes.tolist():
        texts.append(raw[start : start + size].decode())
        start += size
    return texts


if __name__ == "__main__":
    work()
