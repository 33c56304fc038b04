"""Batches come to the device without a wait of the host, which has the next step's work to
start."""

import counts
import pytest
import torch

from longfire.data.batch import Batch
from longfire.images.batch import ImageBatch
from longfire.ops.documents import Documents
from longfire.ops.sequence_noise import row_noise

CUDA = torch.device("cuda")
B, T = 4, 128


def text(has_documents: bool) -> Batch:
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    documents = None
    if has_documents:
        documents = Documents.from_ids((torch.arange(T) // 50).expand(B, T).contiguous())
    return Batch(ids_BT, ids_BT, torch.arange(T).expand(B, T), documents)


def images() -> ImageBatch:
    labels_B = torch.zeros(B, dtype=torch.long)
    return ImageBatch(torch.zeros(B, 3, 8, 8), labels_B, 17, labels_B, torch.ones(B))


@pytest.mark.parametrize(
    "batch", [text(False), text(True), images()], ids=["", "documents", "images"]
)
def test_a_batch(batch):
    batch.to(CUDA)  # the first use of the device waits
    before = counts.now()
    moved = batch.to(CUDA)
    done = counts.now() - before
    assert done.to_device > 0 and done.waits == 0
    if isinstance(moved, Batch) and moved.documents is not None:
        before = counts.now()
        assert moved.documents.cu_lengths_int64.device.type == "cuda"
        assert (counts.now() - before).waits == 0


def test_a_plain_copy_would_wait():
    """So that the counts above say something."""
    before = counts.now()
    torch.zeros(B).to(CUDA)
    assert (counts.now() - before).waits == 1


def test_noise_of_dropout():
    row_noise(2**40 + 5, 0, B, T, CUDA)
    before = counts.now()
    row_noise(2**40 + 5, 7, B, T, CUDA)
    assert (counts.now() - before).waits == 0
