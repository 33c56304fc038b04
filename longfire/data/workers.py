"""Processes that tokenize: texts go out over a pipe, ids come back, in the order in which they were
given.

A worker is a child process that ends when its pipe does, so none outlives a killed parent.
Processes rather than the library's own threads: making arrays of its results needs the
interpreter's lock, which would stop threads from scaling.
"""

import json
import os
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer as Words

from longfire.data.losses import Losses
from longfire.data.tokenizer import Tokenizer
from longfire.errors import DataError

LOSS_COUNTS = len(Losses().counts())  # numbers of a message before the lengths


@dataclass(frozen=True)
class Ids:
    """Documents' ids end to end, the length of each, and what the tokenizer could not say of
    them."""

    ids: np.ndarray
    lengths: np.ndarray
    losses: Losses


def encode(tokenizer: Tokenizer, texts: list[str], bos: int | None, eos: int | None) -> Ids:
    """Ids of documents, each with `bos` before it and `eos` after it where these are not None."""
    before, after = (
        np.array([] if word is None else [word], tokenizer.dtype) for word in (bos, eos)
    )
    documents = tokenizer.arrays(texts)
    lengths = np.array([len(before) + len(ids) + len(after) for ids in documents], np.int64)
    parts = [part for ids in documents for part in (before, ids, after)]
    ids = np.concatenate(parts) if parts else before[:0]
    return Ids(ids, lengths, tokenizer.losses_of(texts, documents))


class Encoders:
    """`count` processes that encode, or with 0 this one; use as a context manager."""

    def __init__(self, tokenizer: Tokenizer, bos: int | None, eos: int | None, count: int) -> None:
        self.tokenizer, self.ends, self.count = tokenizer, (bos, eos), count
        self._processes: list[subprocess.Popen] = []
        self._own = threading.local()  # each thread speaks with one process
        self._threads = ThreadPoolExecutor(count, "encoders", self._start) if count else None

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *exc) -> None:
        for process in self._processes:
            process.kill()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def submit(self, texts: list[str]) -> "Future[Ids]":
        """Encode texts behind the caller. The future raises DataError if the process died."""
        if self._threads:
            return self._threads.submit(self._ask, texts)
        future: Future[Ids] = Future()
        future.set_result(encode(self.tokenizer, texts, *self.ends))
        return future

    def _start(self) -> None:
        """One process for this thread, in a session of its own so that Ctrl-C reaches it only
        through us."""
        command = [sys.executable, "-m", "longfire.data.workers"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._processes.append(process)
        self._own.process = process
        words = self.tokenizer.words.to_str()
        _send(
            process.stdin,
            json.dumps([words, self.tokenizer.bos, self.tokenizer.eos, self.ends]).encode(),
            b"",
        )

    def _ask(self, texts: list[str]) -> Ids:
        process: subprocess.Popen = self._own.process
        raw = [text.encode() for text in texts]
        try:
            _send(
                process.stdin,
                np.array([len(text) for text in raw], np.int64).tobytes(),
                b"".join(raw),
            )
            lengths, ids = _receive(process.stdout)
        except (OSError, EOFError) as e:
            raise DataError(
                f"a tokenizing process ended with code {process.wait()}; if it was killed for memory, set a smaller "
                f"data.num_workers"
            ) from e
        numbers = np.frombuffer(lengths, np.int64)
        losses = Losses(*numbers[:LOSS_COUNTS].tolist())
        return Ids(np.frombuffer(ids, self.tokenizer.dtype), numbers[LOSS_COUNTS:], losses)


def _send(stream: BinaryIO, head: bytes, body: bytes) -> None:
    """A message is two blocks; their sizes go first."""
    stream.write(struct.pack("<qq", len(head), len(body)))
    stream.write(head)
    stream.write(body)
    stream.flush()


def _receive(stream: BinaryIO) -> tuple[bytes, bytes]:
    head, body = struct.unpack("<qq", _exactly(stream, 16))
    return _exactly(stream, head), _exactly(stream, body)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the pipe ended")
    return content


def _work() -> None:
    """A worker's life: set-up, then batches of texts, until the pipe ends."""
    os.putenv(
        "TOKENIZERS_PARALLELISM", "false"
    )  # one thread each: the processes are the parallelism
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        words, bos, eos, ends = json.loads(_receive(requests)[0])
        tokenizer = Tokenizer(Words.from_str(words), bos, eos)
        while True:
            lengths, raw = _receive(requests)
            stops = np.cumsum(np.frombuffer(lengths, np.int64)).tolist()
            texts = [raw[start:stop].decode() for start, stop in zip([0, *stops], stops)]
            encoded = encode(tokenizer, texts, *ends)
            head = np.array([*encoded.losses.counts(), *encoded.lengths.tolist()], np.int64)
            _send(answers, head.tobytes(), encoded.ids.tobytes())
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    _work()
