"""Layouts: every token has one place, cutting and joining are inverse, work is even."""

import pathlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longfire.ops.documents import Documents
from longfire.parallel.layout import KINDS, ContextShard, SequenceLayout, keys_seen

kinds = st.sampled_from(KINDS)
processes = st.integers(1, 9)


def positions_of(lengths: list[int], tokens: int) -> torch.Tensor:
    """Positions in documents of these lengths, over and over."""
    return torch.cat([torch.arange(length) for length in lengths * (tokens // sum(lengths) + 1)])[
        :tokens
    ]


def layout_of(
    kind: str, count: int, tokens: int, multiple: int = 1, lengths: list[int] | None = None
) -> SequenceLayout:
    return SequenceLayout.of_kind(
        kind, count, tokens, multiple, keys_seen(positions_of(lengths or [tokens], tokens))
    )


@given(kinds, processes, st.integers(1, 200), st.integers(1, 4))
def test_every_token_has_one_place_and_comes_back(kind, count, tokens, multiple):
    layout = layout_of(kind, count, tokens, multiple)
    rows_BT = torch.arange(2 * tokens).view(2, tokens)
    parts = [layout.cut(rows_BT, rank, fill=-1) for rank in range(count)]
    assert sorted(torch.cat(parts, 1).flatten().tolist()) == [-1] * 2 * (
        layout.padded_tokens - tokens
    ) + list(range(2 * tokens))
    assert len({part.shape for part in parts}) == 1 and layout.length % multiple == 0
    torch.testing.assert_close(layout.joined(parts), rows_BT)
    assert all(list(place) == sorted(place) for place in layout.places), (
        "segments lie in the order of the row"
    )


def test_the_picture():
    """That of layout.py's first page."""
    row = torch.tensor([list(b"abcdefg")])

    def parts(kind: str) -> list[str]:
        layout = layout_of(kind, 2, 7)
        return [
            bytes(layout.cut(row, rank, fill=ord(".")).flatten().tolist()).decode()
            for rank in range(2)
        ]

    assert parts("contiguous") == ["abcd", "efg."]
    assert parts("zigzag") == ["abg.", "cdef"]


@pytest.mark.parametrize("count", [2, 4, 8, 64])
def test_causal_rows_are_even_in_a_zigzag(count):
    """Contiguous: the last of n pieces has (2 n - 1) / n of the mean."""
    seen_BT = keys_seen(torch.arange(64 * count)[None])
    assert layout_of("zigzag", count, 64 * count).balance(seen_BT) <= 1.0 + 1e-9
    assert layout_of("contiguous", count, 64 * count).balance(seen_BT) == pytest.approx(
        2 - 1 / count, rel=0.02
    )


def real_lengths() -> list[int]:
    """Bytes of the modules of Python's own library, the corpus that every installation has: from 100 to 100,000."""
    return [
        path.stat().st_size
        for path in sorted(Path(pathlib.__file__).parent.glob("*.py"))
        if path.stat().st_size
    ]


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("first", range(6))
def test_rows_of_real_documents_are_even_when_dealt(count, first):
    """The goal is 1.15; a zigzag leaves far more where one document has most of the work."""
    lengths = real_lengths()
    tokens, lengths = 131072, lengths[25 * first :] + lengths[: 25 * first]
    seen_BT = keys_seen(positions_of(lengths, tokens)[None])
    assert layout_of("balanced", count, tokens, lengths=lengths).balance(seen_BT) <= 1.15


def test_a_long_document_at_the_end_unbalances_a_zigzag():
    lengths, tokens = [16] * 512 + [8192], 16384
    seen_BT = keys_seen(positions_of(lengths, tokens)[None])
    assert layout_of("zigzag", 4, tokens).balance(seen_BT) > 1.5
    assert layout_of("balanced", 4, tokens, lengths=lengths).balance(seen_BT) < 1.05


@given(kinds, st.integers(1, 5), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_a_share_knows_the_row(kind, count, lengths):
    tokens = sum(lengths)
    ids_BT = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].expand(2, -1)
    documents = Documents.from_ids(ids_BT)
    layout = layout_of(kind, count, tokens, lengths=lengths)
    whole = layout.segments_of(ids_BT, fill=len(lengths))
    for rank in range(count):
        share = ContextShard.of_rows(layout, rank, documents, 2)
        mine = whole[:, list(share.mine)].flatten(0, 1)
        found = share.documents()
        folded = share.fold_documents(found)
        torch.testing.assert_close(folded.ids_BT // len(share.mine), mine)
        assert torch.equal(folded.cu_lengths, Documents.from_ids(mine).cu_lengths)
        assert folded.max_length == Documents.from_ids(mine).max_length
        assert torch.equal(found.of([1]).ids_BT, share.of([1]).documents().ids_BT)
        here = layout.cut(ids_BT, rank, fill=-1)
        torch.testing.assert_close(
            share.lengths()[here >= 0], torch.tensor(lengths)[here[here >= 0]]
        )
        torch.testing.assert_close(share.unfold(share.fold(here)), here)
        for segment in share.mine[segment_zero(share) :]:
            first = segment * layout.length
            same = whole.flatten(1)[:, first] == whole.flatten(1)[:, first - 1]
            torch.testing.assert_close(share.continues(1, segment), same)


def segment_zero(share: ContextShard) -> int:
    return int(share.mine[0] == 0)
