"""Token records and their way through store and packing: the mask stays with its token."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from longfire.config import settings
from longfire.data.batches import Batches
from longfire.data.manifest import FORMAT, MASKED_FORMAT, read_manifest
from longfire.data.pack import NO_LABEL, pack
from longfire.data.prepare import Prepared
from longfire.data.record_format import EndTokens
from longfire.data.records import TEXTS
from longfire.data.store_writer import StoreWriter
from longfire.data.token_record import (
    TokenRecord,
    begins_document,
    document_record,
    join_records,
    mask_of,
    sum_documents,
)
from longfire.data.tokenizer import bytes_tokenizer
from longfire.data.tokens import TokenStore
from longfire.data.workers import encode

HEADER = {
    "source": {"name": "s", "entry": "s.txt", "fingerprint": "f"},
    "tokenizer": {"fingerprint": bytes_tokenizer().fingerprint, "vocab_size": 258},
    "options": {},
    "dtype": "uint16",
}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """fsync is for power cuts; a killed process loses nothing that it wrote."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def counts(ids: np.ndarray) -> np.ndarray:
    """The rule of the masks of these tests: a token counts in the loss unless its id is a multiple
    of three. So a mask can be read from the ids wherever both are."""
    return ids % 3 != 0


def records_of(seed: int, count: int, masked_from: int = 0) -> list[TokenRecord]:
    """Documents of many lengths. Those before number `masked_from` have no mask, and ids that all
    count."""
    draw = np.random.default_rng(seed)
    records = []
    for number in range(count):
        ids = draw.integers(0, 250, draw.integers(1, 30)).astype(np.uint16)
        if number < masked_from:
            records.append(document_record(np.where(counts(ids), ids, ids + 1).astype(np.uint16)))
        else:
            records.append(document_record(ids, counts(ids)))
    return records


def write(
    folder: Path, records: list[TokenRecord], commit_every: int = 7, complete: bool = True
) -> None:
    """A store of small shards; every fifth document is for validation. It is continued from
    wherever it stands."""
    folder.mkdir(exist_ok=True)
    writer = StoreWriter(folder, HEADER, shard_tokens=64, shard_documents=16)
    for number in range(writer.progress.get("done", 0), len(records)):
        stream = "heldout" if number % 5 == 4 else "train"
        record = records[number]
        writer.append(stream, record, np.array([len(record.ids)]))
        if number % commit_every == 0:
            writer.commit({"done": number + 1})
    if complete:
        writer.commit({"done": len(records)}, complete=True)
    writer.close()


def files(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


masks = st.lists(st.booleans(), max_size=30)


@given(documents=st.lists(masks, max_size=8), chosen=st.randoms(use_true_random=False))
def test_selecting_joining_and_cutting_keep_each_mask_with_its_token(documents, chosen):
    number = 0
    records = []
    for mask in documents:
        if not mask:
            continue
        ids = np.arange(number, number + len(mask), dtype=np.uint16)
        number += len(mask)
        records.append(document_record(ids, np.array(mask)))
    expected = np.array([entry for mask in documents for entry in mask], bool)
    whole = join_records(records, "uint16")
    assert np.array_equal(mask_of(whole), expected)
    assert whole.loss_tokens == expected.sum()
    selected = np.array([chosen.random() < 0.5 for _ in records], bool)
    part = whole.select(selected)
    assert np.array_equal(mask_of(part), expected[part.ids])
    assert part.lengths.sum() == len(part.ids)
    place = chosen.randint(0, number)
    first, second = whole.cut(place)
    assert np.array_equal(np.concatenate([mask_of(first), mask_of(second)]), expected)
    assert first.lengths.sum() == place
    assert second.lengths.sum() == number - place


def test_joining_records_of_which_only_some_have_a_mask():
    plain = document_record(np.array([1, 2], np.uint16))
    masked = document_record(np.array([3, 4], np.uint16), np.array([False, True]))
    assert join_records([plain, plain], "uint16").loss_mask is None
    assert mask_of(join_records([plain, masked], "uint16")).tolist() == [True, True, False, True]
    assert join_records([], "uint16").ids.dtype == np.uint16


@given(
    pieces=st.lists(st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.booleans()))
)
def test_open_records_are_joined_to_whole_documents(pieces):
    """A plain reading: a list of documents, of which the last one grows while its record is open."""
    records = []
    documents: list[int] = []
    is_open = False
    for lengths, opens in pieces:
        record = TokenRecord(np.zeros(sum(lengths), np.uint16), np.array(lengths), None, opens)
        records.append(record)
        if is_open:
            documents[-1] += lengths[0]
            documents += lengths[1:]
        else:
            documents += lengths
        is_open = opens
    joined = join_records(records, "uint16")
    assert joined.lengths.tolist() == documents
    begins = begins_document(records)
    assert begins.sum() == len(documents)
    twice = sum_documents([2 * record.lengths for record in records], begins)
    assert twice.tolist() == [2 * length for length in documents]


@pytest.mark.parametrize("masked_from", [0, 13, 39])
def test_a_store_gives_back_the_masks(masked_from, tmp_path):
    """Also where the first records have none."""
    records = records_of(0, 40, masked_from)
    write(tmp_path / "s", records)
    store = TokenStore(tmp_path / "s")
    store.verify()
    train = join_records([r for i, r in enumerate(records) if i % 5 != 4], "uint16")
    validation = join_records(records[4::5], "uint16")
    for stream, expected in ((store.train, train), (store.validation, validation)):
        assert stream.has_mask == (expected.loss_mask is not None)
        assert np.array_equal(stream.tokens(0, stream.length), expected.ids)
        assert np.array_equal(stream.loss_mask(0, stream.length), mask_of(expected))
        assert stream.loss_tokens == expected.loss_tokens
        first = np.arange(0, stream.length - 20, 9)
        assert np.array_equal(
            stream.loss_masks(first, 20),
            [mask_of(expected)[start : start + 20] for start in first],
        )


def test_a_store_without_masks_is_as_it_was_before_there_were_any(tmp_path):
    write(tmp_path / "plain", records_of(0, 40, masked_from=40))
    write(tmp_path / "masked", records_of(0, 40))
    plain = read_manifest(tmp_path / "plain")
    assert plain["format"] == FORMAT
    assert set(plain["streams"]["train"]) == {"tokens", "documents", "bytes", "shards"}
    assert not any("mask" in name for name in files(tmp_path / "plain"))
    # an earlier version refuses it instead of training on all of its tokens
    assert read_manifest(tmp_path / "masked")["format"] == MASKED_FORMAT


@pytest.mark.parametrize("committed", [0, 5, 12, 13, 14, 30])
def test_a_masked_store_that_was_cut_off_is_continued_byte_for_byte(committed, tmp_path):
    """The first record with a mask is number 13."""
    records = records_of(0, 40, masked_from=13)
    write(tmp_path / "whole", records, commit_every=1)
    write(tmp_path / "cut", records[: committed + 1], commit_every=1, complete=False)
    lost = StoreWriter(tmp_path / "cut", HEADER, 64, 16)
    ids = np.arange(100)
    for stream in ("train", "heldout"):
        lost.append(stream, document_record(ids, counts(ids)), np.array([100]))
    lost.close()  # never committed
    write(tmp_path / "cut", records, commit_every=1)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_damaged_mask_is_found(tmp_path):
    write(tmp_path / "s", records_of(0, 40))
    file = tmp_path / "s" / "train" / "mask-00001.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(Exception, match=r"mask-00001\.bin: block 0 .* is damaged"):
        TokenStore(tmp_path / "s").verify()


def prepared_of(folder: Path, *stores: list[TokenRecord]) -> Prepared:
    opened = []
    for number, records in enumerate(stores):
        write(folder / str(number), records)
        opened.append(TokenStore(folder / str(number)))
    shares = tuple(1 / len(stores) for _ in stores)
    names = tuple(str(number) for number in range(len(stores)))
    return Prepared(bytes_tokenizer(), tuple(opened), shares, names)


SHUFFLES = ("global", "window", "none")


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory) -> Prepared:
    """One of which every record has a mask, and one without any."""
    folder = tmp_path_factory.mktemp("two")
    plain = records_of(1, 60, masked_from=60)
    return prepared_of(folder, records_of(0, 200), plain)


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    shuffle=st.sampled_from(SHUFFLES),
    varlen=st.booleans(),
    context_len=st.sampled_from([0, 3, 11]),
    seed=st.integers(0, 3),
    first=st.integers(0, 10**6),
    count=st.integers(1, 9),
    pieces=st.sampled_from([1, 2, 4]),
)
def test_the_mask_follows_its_token_through_order_and_packing(
    two_stores, shuffle, varlen, context_len, seed, first, count, pieces
):
    """A label is there exactly where the same packing of all tokens has one and the label's token
    counts."""
    data = settings.Data(
        shuffle=shuffle,
        shuffle_window_sequences=70,
        varlen=varlen,
        context_len=context_len if varlen else 0,
        prefetch_factor=0,
    )
    stages = ((0, 16 // pieces),)
    with Batches(two_stores, data, 16, seed, stages=stages) as batches:
        batch = batches.at(first, count)
        places = batches._pieces(first, count)
    for row in range(batch.sequences):
        stream = two_stores.stores[places.source[row]].train
        start = int(places.row[row] * 16 + places.piece[row] * (16 // pieces))
        tokens = stream.tokens(start, start + 16 // pieces + 1).astype(np.int64)
        labels = batch.labels_BT[row].numpy()
        ids = batch.ids_BT[row].numpy()
        assert np.array_equal(ids, tokens[:-1])
        is_document_start = np.isin(np.arange(start + 1, start + len(tokens)), stream.ends[:])
        is_label = ~(is_document_start & varlen)
        if places.source[row] == 0:
            is_label &= counts(tokens[1:])
        assert np.array_equal(labels, np.where(is_label, tokens[1:], NO_LABEL))


@given(parts=st.sampled_from([1, 2, 3, 4]), number=st.integers(0, 50))
@hypothesis_settings(deadline=None, max_examples=20)
def test_processes_and_microbatches_share_out_the_same_labels(two_stores, parts, number):
    data = settings.Data(prefetch_factor=0)
    with Batches(two_stores, data, 16, 0) as batches:
        whole = batches.at(number * 12, 12)
        size = 12 // parts
        labels = []
        for part in range(parts):
            labels.append(batches.at(number * 12 + part * size, size).labels_BT)
    by_microbatch = [part.labels_BT for part in whole.split(parts)]
    for mine, split in zip(labels, by_microbatch):
        assert mine.equal(split)
    assert sum(int((mine != NO_LABEL).sum()) for mine in labels) == whole.real_tokens()


def test_validation_batches_have_the_masks_of_validation_text(two_stores):
    data = settings.Data(prefetch_factor=0)
    stream = two_stores.stores[0].validation
    with Batches(two_stores, data, 16, 0) as batches:
        labels = [batch.labels_BT for batch in batches.validation_batches(0, 10**6)]
    tokens = stream.tokens(0, stream.length).astype(np.int64)
    expected = tokens[1:][counts(tokens[1:])]
    found = np.concatenate([batch.numpy().ravel() for batch in labels])
    assert np.array_equal(found[found != NO_LABEL], expected)


def test_the_last_token_of_a_sequence_is_masked_as_a_label():
    tokens_BS = np.array([[5, 6, 7, 8]])
    mask_BS = np.array([[False, True, True, False]])
    packed = pack(tokens_BS, loss_mask_BS=mask_BS)
    assert packed.ids_BT.tolist() == [[5, 6, 7]]
    assert packed.labels_BT.tolist() == [[6, 7, NO_LABEL]]


@pytest.mark.parametrize("ends", [EndTokens(None, None), EndTokens(256, 257)])
def test_workers_encode_texts_as_their_format_says(ends):
    texts = ["one", "", "d\u00e9j\u00e0 vu"]
    tokenizer = bytes_tokenizer()
    whole = encode(tokenizer, texts, ends)
    parts = [TEXTS.encode(text, tokenizer, ends)[0] for text in texts]
    joined = join_records([part.record for part in parts], tokenizer.dtype)
    assert np.array_equal(joined.ids, whole.record.ids)
    assert np.array_equal(joined.lengths, whole.record.lengths)
    assert np.array_equal(np.concatenate([p.text_bytes for p in parts]), whole.text_bytes)
