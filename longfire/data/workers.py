"""Processes that tokenize: texts go out over a pipe, ids come back, in the order in which they were given.

Each worker is a plain child process of its own interpreter, which ends when its pipe does; so none outlives a killed parent.
Processes rather than threads: turning ids into arrays holds the interpreter's lock, which would stop threads from scaling.
"""

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer as Words

from longfire.data.tokenizer import Tokenizer
from longfire.errors import DataError


@dataclass(frozen=True)
class Ids:
    """Documents' ids end to end, and the length of each."""

    ids: np.ndarray
    lengths: np.ndarray


def encode(tokenizer: Tokenizer, texts: Sequence[str], bos: int | None, eos: int | None) -> Ids:
    """Documents' ids, each with `bos` before and `eos` after it where they are not None."""
    before, after = [] if bos is None else [bos], [] if eos is None else [eos]
    documents = [before + ids + after for ids in tokenizer.encode_batch(list(texts))]
    lengths = np.array([len(ids) for ids in documents], np.int64)
    flat = np.fromiter((id for ids in documents for id in ids), tokenizer.dtype, int(lengths.sum()))
    return Ids(flat, lengths)


class Encoders:
    """`count` processes that encode; 0: this process does it itself, when asked. Use as a context manager."""

    def __init__(self, tokenizer: Tokenizer, bos: int | None, eos: int | None, count: int) -> None:
        self.tokenizer, self.ends, self.count = tokenizer, (bos, eos), count
        self._processes: list[subprocess.Popen] = []
        self._mine = threading.local()
        self._threads = ThreadPoolExecutor(count, initializer=self._start) if count else None

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *exc) -> None:
        for process in self._processes:
            process.kill()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()

    def submit(self, texts: list[str]) -> "Future[Ids]":
        """Encode texts behind the caller; the future raises DataError if the worker died."""
        if self._threads:
            return self._threads.submit(self._ask, texts)
        future: Future[Ids] = Future()
        future.set_result(encode(self.tokenizer, texts, *self.ends))
        return future

    def _start(self) -> None:
        """One worker for each thread; its own session, so that Ctrl-C reaches it only through us."""
        process = subprocess.Popen(
            [sys.executable, "-m", "longfire.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._processes.append(process)
        self._mine.process = process
        t = self.tokenizer
        setup = {"words": t.words.to_str(), "bos": t.bos, "eos": t.eos, "ends": self.ends}
        _send(process.stdin, json.dumps(setup).encode())

    def _ask(self, texts: list[str]) -> Ids:
        process: subprocess.Popen = self._mine.process
        raw = [text.encode() for text in texts]
        try:
            _send(process.stdin, np.array([len(r) for r in raw], np.int64).tobytes(), *raw)
            lengths = np.frombuffer(_receive(process.stdout), np.int64)
            ids = np.frombuffer(_receive(process.stdout), self.tokenizer.dtype)
        except (OSError, EOFError) as e:
            raise DataError(
                f"a tokenizing process ended ({process.wait()}); if it was killed for memory, set a smaller "
                f"data.num_workers"
            ) from e
        return Ids(ids, lengths)


def _send(stream: BinaryIO, head: bytes, *parts: bytes) -> None:
    """One message: the sizes of head and body, then both."""
    stream.write(struct.pack("<qq", len(head), sum(map(len, parts))))
    stream.write(head)
    for part in parts:
        stream.write(part)
    stream.flush()


def _receive(stream: BinaryIO) -> bytes:
    """The head of the next message, or its body when only that was sent (see `_work`)."""
    size, body = struct.unpack("<qq", _exactly(stream, 16))
    assert body == 0
    return _exactly(stream, size)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the pipe ended")
    return content


def _work() -> None:
    """A worker: set-up, then batches of texts until the pipe ends."""
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # one thread each: the processes are the parallelism
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = json.loads(_receive(requests))
    tokenizer = Tokenizer(Words.from_str(setup["words"]), setup["bos"], setup["eos"])
    while True:
        try:
            head, body = struct.unpack("<qq", _exactly(requests, 16))
            lengths = np.frombuffer(_exactly(requests, head), np.int64)
            raw = _exactly(requests, body)
        except EOFError:
            return
        stops = np.cumsum(lengths)
        texts = [raw[stop - length : stop].decode() for stop, length in zip(stops.tolist(), lengths.tolist())]
        encoded = encode(tokenizer, texts, *setup["ends"])
        _send(answers, encoded.lengths.tobytes())
        _send(answers, encoded.ids.tobytes())


if __name__ == "__main__":
    _work()
