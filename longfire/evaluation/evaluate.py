"""How well a model predicts validation documents: loss, perplexity and bits per byte, by source and
by position."""

import functools
import lzma
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch

from longfire.data.batch import Batch
from longfire.data.batches import Batches, WaitStopped
from longfire.data.pack import NO_LABEL
from longfire.data.token_bytes import byte_lengths, token_bytes
from longfire.data.tokens import TokenStream
from longfire.loss import losses
from longfire.model import Model
from longfire.parallel.apply import device_of, reshard
from longfire.parallel.axes import DATA
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.pipeline import pipeline_of
from longfire.work_progress import WorkProgress

ROWS = 8  # sequences of a batch on each process
COUNTED_TOKENS = 2**20  # whose bytes are counted at a time


class EvaluationStopped(Exception):
    """A stop was requested; raised by all processes between the same two batches."""


def evaluate(
    model: Model,
    batches: Batches,
    tokens: int,
    chunk_tokens: int,
    mesh: Mesh = ALONE,
    seq_len: int = 0,
    rows: int = ROWS,
    accuracy: bool = False,
) -> dict[str, dict[str, float]]:
    """{source: {loss (nats a token), perplexity, bits_per_byte, tokens, bytes}} on up to `tokens`
    validation tokens of each.

    seq_len: tokens of a sequence; 0: those of the batches. rows: of a batch on each process.
    accuracy: also the share of labels that are the likeliest word, the first of several.
    Sources without validation documents are left out. Collective over the mesh. Raises
    EvaluationStopped where batches.stopped says so.
    """
    measured = measure_validation(
        model,
        batches,
        tokens,
        chunk_tokens,
        mesh,
        seq_len,
        rows,
    )
    results = {name: found.numbers() for name, found in measured.items()}
    if accuracy:
        for name, found in measured.items():
            results[name]["accuracy"] = found.accuracy
    return results


def measure_validation(
    model: Model,
    batches: Batches,
    tokens: int,
    chunk_tokens: int,
    mesh: Mesh = ALONE,
    seq_len: int = 0,
    rows: int = ROWS,
    shows_progress: bool = False,
) -> "dict[str, Measured]":
    """What `evaluate` counts, with the positions. shows_progress: of each source."""
    bytes_V = byte_lengths(batches.prepared.tokenizer)
    sequences_of_all = rows * mesh.size(*DATA)
    measured: dict[str, Measured] = {}
    for index, (name, _, stream) in enumerate(batches.prepared.validation):
        wait_for_validation(batches, index, tokens, mesh)
        validation = batches.validation_batches(index, tokens, sequences_of_all, seq_len)
        until_stopped = stoppable(validation, batches.stopped, mesh)
        if shows_progress:
            expected = batches.validation_tokens(index, tokens)
            until_stopped = with_progress(until_stopped, name, expected)
        labels = measure(model, until_stopped, bytes_V, chunk_tokens, mesh)
        if labels.tokens:
            length = batches.validation_tokens(index, tokens)
            measured[name] = labels.of_documents(stream, length, bytes_V)
    return measured


def with_progress(batches: Iterator[Batch], source: str, tokens: int) -> Iterator[Batch]:
    """The same batches, while it is shown how many of the source's tokens are evaluated."""
    with WorkProgress(source, tokens, "tokens") as progress:
        for batch in batches:
            yield batch
            progress.add(int((batch.labels_BT != NO_LABEL).sum()))


def wait_for_validation(
    batches: Batches,
    index: int,
    tokens: int,
    mesh: Mesh,
) -> None:
    """Wait until a store that is still written has the tokens to evaluate on. Collective; raises
    EvaluationStopped."""
    is_there = True
    try:
        batches.validation_tokens(index, tokens)
    except WaitStopped:
        is_there = False
    if mesh.any(not is_there):
        raise EvaluationStopped


def stoppable(
    batches: Iterable[Batch],
    stopped: Callable[[], bool],
    mesh: Mesh,
) -> Iterator[Batch]:
    """The same batches, until a stop is requested of some process. Raises EvaluationStopped."""
    for batch in batches:
        if mesh.any(stopped()):
            raise EvaluationStopped
        yield batch


# The loss of labels with so many tokens before them: from, to, loss (nats a token), tokens
Bucket = TypedDict("Bucket", {"from": int, "to": int, "loss": float, "tokens": int})


@dataclass(frozen=True)
class Measured:
    """Sums over labels by the number of tokens before each (its context, C = 1, 2 ...), and the
    bytes of their text.

    Bits per byte are the nats of all labels / ln 2 / the bytes of their documents, so that models
    with different tokenizers can be compared, also when a tokenizer loses or changes text; BOS and
    EOS have nats and no bytes.
    """

    nats_C: np.ndarray
    count_C: np.ndarray
    bytes: int
    correct: int = 0  # labels that are the likeliest word

    @property
    def tokens(self) -> int:
        """Labels that were measured."""
        return int(self.count_C.sum())

    @property
    def accuracy(self) -> float:
        """The share of labels that are the likeliest word, the first of several."""
        return self.correct / self.tokens

    def of_documents(
        self,
        stream: TokenStream,
        length: int,
        bytes_V: np.ndarray,
    ) -> "Measured":
        """The same with bytes of documents where `measure` counted bytes that labels decode to.
        length: tokens of the stream that were measured.

        The labels have the share of the documents' bytes that they have of what these decode to:
        labels are fewer than tokens, and the last document may be cut. Both are equal, and this
        changes nothing, where a tokenizer gives every byte back.
        """
        documents, decoded = document_bytes(stream, length, bytes_V)
        if documents == decoded:
            return self
        if not decoded:
            return replace(self, bytes=documents)
        return replace(self, bytes=round(self.bytes * documents / decoded))

    def numbers(self) -> dict[str, float]:
        """loss, perplexity, bits_per_byte, tokens, bytes: see `evaluate`."""
        nats = float(self.nats_C.sum())
        count = self.tokens
        return {
            "loss": nats / count,
            "perplexity": perplexity(nats / count),
            "bits_per_byte": nats / math.log(2) / self.bytes if self.bytes else math.nan,
            "tokens": count,
            "bytes": self.bytes,
        }

    def by_position(self) -> list[Bucket]:
        """The loss in buckets of context that double: 1, 2 to 3, 4 to 7 ...; empty ones are left
        out."""
        firsts = [1 << power for power in range(len(self.nats_C).bit_length())]
        starts = [first - 1 for first in firsts]
        nats = np.add.reduceat(self.nats_C, starts)
        counts = np.add.reduceat(self.count_C, starts)
        buckets: list[Bucket] = []
        for first, nats_of_bucket, count in zip(firsts, nats, counts):
            if count:
                last = min(2 * first - 1, len(self.nats_C))
                loss = float(nats_of_bucket / count)
                buckets.append({"from": first, "to": last, "loss": loss, "tokens": int(count)})
        return buckets


def document_bytes(
    stream: TokenStream,
    length: int,
    bytes_V: np.ndarray,
) -> tuple[int, int]:
    """Bytes of the documents that begin in the first `length` tokens of a stream: of their text,
    and of what it is decoded to."""
    if not length:
        return 0, 0
    count = min(int(stream.ends.searchsorted(np.array([length]), "left")[0]) + 1, stream.documents)
    if not count:
        return 0, 0
    end = int(stream.ends[count - 1 : count][0])
    decoded = 0
    for start in range(0, end, COUNTED_TOKENS):
        decoded += int(bytes_V[stream.tokens(start, min(start + COUNTED_TOKENS, end))].sum())
    return int(stream.bytes[count - 1 : count][0]), decoded


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # e^710 is no fp64


@torch.no_grad()
# other shapes and no gradients: a compiled model would be compiled again
@torch.compiler.set_stance("force_eager")
def measure(
    model: Model,
    batches: Iterable[Batch],
    bytes_V: np.ndarray,
    chunk_tokens: int,
    mesh: Mesh = ALONE,
) -> Measured:
    """The losses of all labels of some batches; bytes_V: the bytes of each token. Each process of
    the mesh computes a part of the sequences, and the results are summed: all call this with the
    same batches."""
    device = device_of(model)
    pipeline = pipeline_of(model)
    nats_C = np.zeros(1)
    count_C = np.zeros(1, np.int64)
    text_bytes = 0
    correct = 0
    for batch in batches:
        batch = batch.process_part(mesh.rank(*DATA), mesh.size(*DATA))
        if model.context:
            batch = batch.context_part(model.context)
        compute = pipeline.losses if pipeline else functools.partial(losses, model)
        token_nats, is_correct_BT = compute(batch.to(device), chunk_tokens)
        nats_BT = token_nats.double().cpu().numpy()
        correct += int(is_correct_BT.sum())
        real_BT = batch.labels_BT.numpy() != NO_LABEL
        before = batch.positions_BT.numpy()[real_BT]
        nats_C = added(nats_C, np.bincount(before, nats_BT[real_BT]))
        count_C = added(count_C, np.bincount(before))
        text_bytes += int(bytes_V[real_labels(batch)].sum())
    reshard(model)
    return world_sum(Measured(nats_C, count_C, text_bytes, correct), mesh)


def world_sum(mine: "Measured", mesh: Mesh) -> "Measured":
    """The sum over all processes that measured sequences of their own."""
    if mesh.size(*DATA, "cp") == 1:
        return mine
    length = max(mesh.all_gather_object(len(mine.nats_C)))
    sums = np.zeros((4, length))
    sums[0, : len(mine.nats_C)] = mine.nats_C
    sums[1, : len(mine.count_C)] = mine.count_C
    sums[2, 0] = mine.bytes
    sums[3, 0] = mine.correct
    nats_C, count_C, sizes, correct = mesh.sum(torch.from_numpy(sums), *DATA, "cp").numpy()
    return Measured(nats_C, count_C.astype(np.int64), int(sizes[0]), int(correct[0]))


def added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two arrays, of which the shorter is continued with zeros."""
    if len(a) < len(b):
        a, b = b, a
    total = a.copy()
    total[: len(b)] += b
    return total


def real_labels(batch: Batch) -> np.ndarray:
    """The labels of a batch, in the order of the text."""
    labels = batch.labels_BT.numpy().ravel()
    return labels[labels != NO_LABEL]


def validation_bytes(
    batches: Batches,
    source: str,
    tokens: int,
) -> bytes:
    """The bytes of a source that `evaluate` predicts with the same `tokens`."""
    bytes_of = token_bytes(batches.prepared.tokenizer)
    index = [name for name, _, _ in batches.prepared.validation].index(source)
    text: list[bytes] = []
    for batch in batches.validation_batches(index, tokens, ROWS):
        text += [bytes_of[label] for label in real_labels(batch).tolist()]
    return b"".join(text)


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9e` reaches on these bytes, headers included: a yardstick that needs no model."""
    if not text:
        return math.nan
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
