"""data.record_format = "tokens": ids of other programs, with loss masks or labels, read in place."""

import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logged import logged_to

from longfire.config import settings
from longfire.data import chunks
from longfire.data.batches import Batches
from longfire.data.hub import HubSource
from longfire.data.prepare import Prepared, prepare
from longfire.data.tables import records_of_rows
from longfire.data.token_rows import TokenRows, document_lengths
from longfire.data.validation import is_validation
from longfire.errors import DataError, SettingsError

EOS = 257  # of the tokenizer `bytes`


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """fsync is for power cuts; a killed process loses nothing that it wrote."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def rows_of(count: int, length: int = 12) -> list[dict[str, list[int]]]:
    """Rows of ids with an EOS somewhere, of which the first ids are not learned."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = draw.integers(32, 127, length)
        ids[draw.integers(0, length)] = EOS
        mask = np.arange(length) >= draw.integers(0, 6)
        labels = np.where(mask, ids, -100)
        rows.append({"input_ids": ids, "loss_mask": mask.astype(int), "labels": labels})
    return [{key: value.tolist() for key, value in row.items()} for row in rows]


def only(rows: list[dict], *fields: str) -> list[dict]:
    return [{field: row[field] for field in fields} for row in rows]


def write_jsonl(folder: Path, rows: list[dict]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_parquet(folder: Path, rows: list[dict]) -> Path:
    file = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=17)
    return file


def write_dataset(folder: Path, rows: list[dict]) -> Path:
    """What `datasets` saves to disk: a folder of arrow files."""
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "save_to_disk": write_dataset}


def prepared_of(entry: Path, **changes) -> Prepared:
    given = {
        "folder": str(entry.parent / "stores"),
        "num_workers": 1,
        "validation_fraction": 0.0,
        "record_format": ("tokens",),
        **changes,
    }
    data = settings.Data(dataset=(str(entry),), **given)
    return prepare(data, settings.Tokenizer())


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("fields", [("loss_mask",), ("labels",), ("loss_mask", "labels"), ()])
def test_rows_are_read_with_their_masks(kind, fields, tmp_path):
    rows = rows_of(40)
    entry = WRITERS[kind](tmp_path, only(rows, "input_ids", *fields))
    stream = prepared_of(entry).stores[0].train
    ids = np.concatenate([row["input_ids"] for row in rows])
    mask = np.concatenate([row["loss_mask"] for row in rows]).astype(bool)
    if not fields:
        mask[:] = True
    assert np.array_equal(stream.tokens(0, stream.length), ids)
    assert np.array_equal(stream.loss_mask(0, stream.length), mask)
    assert stream.has_mask == bool(fields)
    assert stream.ends[:].tolist() == np.arange(12, 481, 12).tolist()
    characters = np.cumsum([sum(i < 256 for i in row["input_ids"]) for row in rows])
    assert stream.bytes[:].tolist() == characters.tolist()


def test_a_row_of_whole_numbers_of_an_arrow_file_is_a_view_of_its_memory():
    column = pa.array([[1, 2, 3], [4, 5]], pa.list_(pa.int32()))
    batch = pa.record_batch({"input_ids": column})
    address = column.values.buffers()[1].address
    rows = records_of_rows([batch], ("input_ids",), 0, 0)
    found = [record["input_ids"] for _, record in rows]
    assert [ids.tolist() for ids in found] == [[1, 2, 3], [4, 5]]
    assert found[0].ctypes.data == address
    assert found[1].ctypes.data == address + 12


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_documents_end_after_a_named_token_and_go_on_from_row_to_row(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", chunk)
    rows = rows_of(30)
    rows[4]["input_ids"] = [65] * 12  # a row in the middle of a document
    rows[5]["input_ids"][-1] = EOS
    entry = write_jsonl(tmp_path, only(rows, "input_ids"))
    stream = prepared_of(entry, document_end="<eos>").stores[0].train
    flat = np.concatenate([row["input_ids"] for row in rows])
    ends = [place + 1 for place, number in enumerate(flat) if number == EOS]
    if ends[-1] != 360:
        ends.append(360)
    assert stream.ends[:].tolist() == ends
    characters = np.cumsum(flat < 256)
    assert stream.bytes[:].tolist() == [characters[end - 1] for end in ends]
    with pytest.raises(SettingsError, match=r"data\.document_end = '</s>' is no token"):
        prepared_of(entry, document_end="</s>")
    assert document_lengths(np.array([7, 7]), 7).tolist() == [1, 1]


def test_no_document_goes_on_behind_a_row_that_is_not_there(tmp_path):
    """One that is kept for validation, or is bad; and none gathers without an end."""
    rows = [{"input_ids": [65 + number % 26] * 12} for number in range(200)]
    rows.insert(50, {"input_ids": [-1]})
    entry = write_jsonl(tmp_path, rows)
    changes = {"document_end": "<eos>", "skip_bad_documents": True, "validation_fraction": 0.2}
    store = prepared_of(entry, **changes).stores[0]
    breaks = {50}
    kept = [is_validation(f"rows.jsonl:{number}", 0.2) for number in range(1, 202)]
    for number in range(1, 201):
        if kept[number] != kept[number - 1]:
            breaks.add(number)
    for stream, of_validation in ((store.train, False), (store.validation, True)):
        ends = set()
        tokens = 0
        for number in range(201):
            if number in breaks | {51}:
                ends.add(tokens)
            if number != 50 and kept[number] == of_validation:
                tokens += 12
        ends = (ends | {tokens}) - {0}
        assert stream.ends[:].tolist() == sorted(ends)


def test_a_document_without_an_end_ends_after_some_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 12)
    rows = [{"input_ids": [65] * 12}] * 100
    stream = prepared_of(write_jsonl(tmp_path, rows), document_end="<eos>").stores[0].train
    assert stream.ends[:].tolist() == [*range(48, 1200, 48), 1200]


def test_rows_as_long_as_a_sequence_are_the_sequences(tmp_path):
    rows = rows_of(20, length=16)
    entry = write_parquet(tmp_path, only(rows, "input_ids", "labels"))
    prepared = prepared_of(entry)
    data = settings.Data(shuffle="none", prefetch_factor=0)
    with Batches(prepared, data, 16, 0) as batches:
        batch = batches.at(0, 19)
    for row in range(19):
        assert batch.ids_BT[row].tolist() == rows[row]["input_ids"]
        # of the last id the label is the first token of the next row
        assert batch.labels_BT[row, :-1].tolist() == rows[row]["labels"][1:]
        assert batch.labels_BT[row, -1] == rows[row + 1]["labels"][0]


GOOD = {"input_ids": [1, 2, 3]}
BAD_ROWS = {
    "outside": (
        {"input_ids": [1, 2, 258]},
        r"position 2 \(from 0\) of 'input_ids' is 258, .*ids 0 to 257: .*tokenizer\.path",
    ),
    "negative": ({"input_ids": [1, -2]}, r"position 1 .* of 'input_ids' is -2: .*not negative"),
    "float": ({"input_ids": [1, 2.5]}, r"position 1 .* of 'input_ids' is float 2\.5"),
    "whole float": ({"input_ids": [1.0, 2.0]}, r"position 0 .* of 'input_ids' is float 1\.0"),
    "nested": ({"input_ids": [[1], [2, 3]]}, r"position 0 .* of 'input_ids' is list \[1\]"),
    "text": ({"input_ids": "1 2"}, r"'input_ids' holds str, not a list of whole numbers"),
    "null": ({"input_ids": [1, None]}, r"position 1 .* of 'input_ids' is nothing"),
    "no ids": ({"tokens": [1]}, r"no field 'input_ids' \(fields there: tokens\); set data\.ids_"),
    "true": ({"input_ids": [True]}, r"position 0 .* is bool True"),
    "large": ({"input_ids": [2**70]}, r"'input_ids' holds a number of more than 64 bits"),
    "short mask": ({**GOOD, "loss_mask": [1, 0]}, r"'loss_mask' has 2 entries for 3 ids"),
    "other mask": ({**GOOD, "loss_mask": [1, 0, 2]}, r"position 2 .*'loss_mask' is 2, not 0 or 1"),
    "shifted": ({**GOOD, "labels": [2, 3, -100]}, r"position 0 .*'labels' is 2, .*not shifted"),
    "both": (
        {**GOOD, "labels": [1, 2, -100], "loss_mask": [1, 1, 1]},
        r"'loss_mask' and 'labels' differ at position 2",
    ),
    "list": ([1, 2], r"an object was expected, not list"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_file_record_and_position(name, tmp_path):
    row, message = BAD_ROWS[name]
    entry = write_jsonl(tmp_path, [GOOD, row, GOOD])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {message}"):
        prepared_of(entry)
    prepared = prepared_of(entry, skip_bad_documents=True)
    (bad,) = prepared.stores[0].manifest["progress"]["bad"]
    assert re.search(message, bad)
    assert prepared.stores[0].train.tokens(0, 6).tolist() == [1, 2, 3, 1, 2, 3]


TABLES = {
    "float": ([[1.0, 2.0]], r"position 0 .* of 'input_ids' is float 1\.0"),
    "nested": ([[[1], [2]]], r"position 0 .* of 'input_ids' is list"),
    "null": ([[1, None]], r"position 1 .* of 'input_ids' is nothing"),
    "negative": ([[1, 2, -1]], r"position 2 .* of 'input_ids' is -1"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_bad_row_of_a_table(name, tmp_path):
    values, message = TABLES[name]
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"input_ids": pa.array(values)}), file)
    with pytest.raises(DataError, match=rf"rows\.parquet:1: {message}"):
        prepared_of(file)


def test_masks_of_true_and_false(tmp_path):
    rows = [{**GOOD, "loss_mask": [False, True, True]}]
    for writer in (write_jsonl, write_parquet):
        stream = prepared_of(writer(tmp_path, rows)).stores[0].train
        assert stream.loss_mask(0, 3).tolist() == [False, True, True]


def test_validation_rows_keep_their_masks(tmp_path):
    """Whole rows of many; the end of each of a few."""
    rows = rows_of(200)
    (tmp_path / "many").mkdir()
    entry = write_jsonl(tmp_path / "many", only(rows, "input_ids", "loss_mask"))
    store = prepared_of(entry, validation_fraction=0.2).stores[0]
    by_ids = {tuple(row["input_ids"]): row["loss_mask"] for row in rows}
    for stream in (store.train, store.validation):
        assert stream.documents > 20
        for start in range(0, stream.length, 12):
            ids = tuple(stream.tokens(start, start + 12).tolist())
            assert stream.loss_mask(start, start + 12).tolist() == [bool(m) for m in by_ids[ids]]
    assert store.train.documents + store.validation.documents == 200

    row = rows_of(1, length=4000)[0]
    (tmp_path / "few").mkdir()
    entry = write_jsonl(tmp_path / "few", only([row], "input_ids", "loss_mask"))
    store = prepared_of(entry, validation_fraction=0.05).stores[0]
    streams = (store.train, store.validation)
    assert store.validation.length == 400
    joined = [stream.tokens(0, stream.length) for stream in streams]
    masks = [stream.loss_mask(0, stream.length) for stream in streams]
    assert np.concatenate(joined).tolist() == row["input_ids"]
    assert np.concatenate(masks).tolist() == [bool(m) for m in row["loss_mask"]]
    assert sum(stream.bytes[-1:][0] for stream in streams) == 3999


@pytest.mark.parametrize("document_end", ["", "<eos>"])
def test_preparing_goes_on_where_it_was_stopped(document_end, tmp_path, monkeypatch):
    from longfire.data import fill
    from longfire.data.store_writer import StoreWriter

    entry = write_jsonl(tmp_path, only(rows_of(300), "input_ids", "loss_mask"))
    changes = {"document_end": document_end}
    whole = prepared_of(entry, folder=str(tmp_path / "whole"), **changes).stores[0]
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", 20)
    monkeypatch.setattr(fill, "COMMIT_SECONDS", 0)
    append = StoreWriter.append
    left = [9]

    def fill_up(self, *documents):
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        append(self, *documents)

    monkeypatch.setattr(StoreWriter, "append", fill_up)
    with pytest.raises(DataError, match="what was committed is kept"):
        prepared_of(entry, **changes)
    store = prepared_of(entry, **changes).stores[0]
    for stream, expected in ((store.train, whole.train), (store.validation, whole.validation)):
        assert stream.length == expected.length
        for name in ("ids", "mask", "ends", "bytes"):
            assert np.array_equal(getattr(stream, name)[:], getattr(expected, name)[:])


def test_what_does_not_go_together(tmp_path):
    entry = write_jsonl(tmp_path, [GOOD])
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt: a file of text has no records, .*'tokens'"):
        prepared_of(tmp_path / "a.txt")
    with pytest.raises(SettingsError, match=r"data\.record_format = 'ids' is not one of text, tok"):
        prepared_of(entry, record_format=("ids",))
    with pytest.raises(SettingsError, match=r"data\.text_field = 'a'.*leave one of them empty"):
        prepared_of(entry, text_field=("a",))
    data = settings.Data(
        dataset=(str(entry),), record_format=("tokens",), folder=str(tmp_path / "stores")
    )
    with pytest.raises(
        SettingsError, match=r"tokenizer\.path = train: .*rows\.jsonl is read as tok"
    ):
        prepare(data, settings.Tokenizer(path="train"))


def test_a_source_of_text_and_one_of_ids(tmp_path):
    ids = write_jsonl(tmp_path, only(rows_of(20), "input_ids", "loss_mask"))
    text = tmp_path / "text.txt"
    text.write_text("plain text of another source")
    data = settings.Data(
        dataset=(str(ids), str(text)),
        record_format=("tokens", ""),
        folder=str(tmp_path / "stores"),
        num_workers=1,
    )
    lines: list[str] = []
    with logged_to(lines):
        first, second = prepare(data, settings.Tokenizer()).stores
    assert first.train.has_mask
    assert not second.train.has_mask
    share = first.train.loss_tokens / first.train.length
    assert f"{share:.1%} of the tokens count in the loss" in lines[0]
    assert "in the loss" not in lines[1]


def test_the_settings_are_part_of_the_address(tmp_path):
    from longfire.data.tokenizer import bytes_tokenizer

    tokenizer = bytes_tokenizer()
    options = [
        TokenRows().options(tokenizer),
        TokenRows(document_end="<eos>").options(tokenizer),
        TokenRows(ids_field="ids").options(tokenizer),
    ]
    assert len({json.dumps(option) for option in options}) == 3


def test_a_store_that_grows_while_it_is_read(tmp_path):
    """As with data.streaming: the batches are those of the finished store."""
    rows = rows_of(3000)
    for row in rows[:40]:
        del row["loss_mask"]
    entry = write_jsonl(tmp_path, [{k: v for k, v in row.items() if k != "labels"} for row in rows])
    data = settings.Data(
        dataset=(str(entry),),
        record_format=("tokens",),
        folder=str(tmp_path / "stores"),
        num_workers=1,
        validation_fraction=0.0,
        streaming=True,
        shuffle_window_sequences=64,
        prefetch_factor=0,
    )
    with (
        prepare(data, settings.Tokenizer(), background=True) as growing,
        Batches(growing, data, 16, 0) as batches,
    ):
        early = [batches.at(first, 20) for first in range(0, 1000, 20)]
    finished = prepare(data, settings.Tokenizer())
    with Batches(finished, data, 16, 0) as batches:
        for number, batch in enumerate(early):
            again = batches.at(number * 20, 20)
            assert batch.ids_BT.equal(again.ids_BT)
            assert batch.labels_BT.equal(again.labels_BT)
    assert finished.stores[0].train.has_mask


class StoredOnTheHub(HubSource):
    """A download of the hub, without the hub."""

    dataset = datasets.Dataset.from_list(rows_of(30))


def test_rows_of_a_dataset_of_the_hub():
    source = StoredOnTheHub("owner/rows", record_format=TokenRows())
    documents = list(source.documents())
    assert [d.content.ids.tolist() for d in documents] == [r["input_ids"] for r in rows_of(30)]
    masks = [document.content.loss_mask.astype(int).tolist() for document in documents]
    assert masks == [row["loss_mask"] for row in rows_of(30)]


def test_nearly_everything_is_kept_for_validation(tmp_path):
    """Of few rows the ends are kept: here the end of a row is all of it."""
    rows = only(rows_of(3, length=400), "input_ids", "loss_mask")
    entry = write_jsonl(tmp_path, [*rows, {"input_ids": [7, 8]}])
    store = prepared_of(entry, validation_fraction=0.9999).stores[0]
    assert store.train.tokens(0, store.train.length).tolist() == [7, 8]
    assert (store.validation.length, store.validation.documents) == (1200, 3)


def test_rows_of_which_no_token_counts_are_refused(tmp_path):
    """Every time; a few that count are enough."""
    rows = [{**GOOD, "loss_mask": [0, 0, 0]}] * 20
    entry = write_jsonl(tmp_path, rows)
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of its 60 tokens counts in the loss"):
            prepared_of(entry)
    write_jsonl(tmp_path, [*rows, GOOD])
    assert prepared_of(entry).stores[0].train.loss_tokens == 3


def test_the_bytes_of_a_row_that_is_cut_are_those_of_its_ids(tmp_path):
    """Bits per byte of the end divide by them. Here <eos>, which has none, fills the beginning."""
    row = {"input_ids": [257] * 1200 + list(b"x" * 800) + [257]}
    entry = write_jsonl(tmp_path, [row])
    store = prepared_of(entry, validation_fraction=0.25).stores[0]
    assert store.validation.length == 500
    assert store.validation.bytes[:].tolist() == [499]
    assert store.train.bytes[:].tolist() == [301]
    ended = prepared_of(entry, validation_fraction=0.25, document_end="<eos>").stores[0]
    assert ended.validation.bytes[:].tolist() == [499]
    assert ended.train.bytes[-1:].tolist() == [301]
