"""Packing against the plainest loop over tokens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longfire.data.batch import batch_of
from longfire.data.pack import NO_LABEL, document_starts, pack
from longfire.ops.documents import Documents


def pack_reference(stream, document_of, first, T, context_len):
    """ids, labels, positions, piece numbers of one row, token by token."""
    ids, labels, positions, pieces = [], [], [], []
    position, piece = 0, -1
    for t in range(first, first + T):
        begins = (
            t == first
            or document_of[t] != document_of[t - 1]
            or (context_len and position == context_len)
        )
        position, piece = (0, piece + 1) if begins else (position, piece)
        ids.append(stream[t])
        labels.append(stream[t + 1] if document_of[t + 1] == document_of[t] else NO_LABEL)
        positions.append(position)
        pieces.append(piece)
        position += 1
    return ids, labels, positions, pieces


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=30),
    st.integers(1, 25),
    st.integers(0, 12),
    st.data(),
)
def test_documents_against_the_plain_loop(lengths, T, context_len, data):
    stream = np.arange(sum(lengths), dtype=np.uint16)
    rows = (len(stream) - 1) // T
    if not rows:
        return
    first = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5))) * T
    tokens_BS = np.stack([stream[f : f + T + 1] for f in first])
    starts_BS = document_starts(np.cumsum(lengths), first, T + 1)
    batch = batch_of(pack(tokens_BS, starts_BS, context_len))
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    slow = [pack_reference(stream.tolist(), document_of, f, T, context_len) for f in first.tolist()]
    for tensor, column in zip(
        (batch.ids_BT, batch.labels_BT, batch.positions_BT, batch.documents.ids_BT), zip(*slow)
    ):
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == list(column)
    again = Documents.from_ids(batch.documents.ids_BT)
    assert torch.equal(again.cu_lengths, batch.documents.cu_lengths)
    assert again.max_length == batch.documents.max_length


def test_documents_flow_on():
    packed = pack(np.arange(10, dtype=np.uint16).reshape(2, 5))
    assert packed.ids_BT.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert packed.labels_BT.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert packed.positions_BT.tolist() == [[0, 1, 2, 3]] * 2
    assert packed.starts_BT is None


def test_the_worked_row_of_the_docstring():
    starts_BS = np.array([[1, 0, 0, 0, 1, 0, 0]], bool)
    packed = pack(np.frombuffer(b"abcdxyz", np.uint8)[None], starts_BS, 3)
    assert bytes(packed.ids_BT[0].tolist()) == b"abcdxy"
    assert [chr(x) if x > 0 else "." for x in packed.labels_BT[0].tolist()] == list("bcd.yz")
    assert packed.positions_BT.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert (np.cumsum(packed.starts_BT[0]) - 1).tolist() == [0, 0, 0, 1, 2, 2]
