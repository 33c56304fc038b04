"""Data is what was named, whole: cut files, unclear folders, sources that change, tokenizers that lose text."""

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from logged import logged_to
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers

from longfire.cli import main
from longfire.config import settings
from longfire.data.labelled_texts import read_labelled
from longfire.data.lines import read_lines
from longfire.data.losses import loses_nothing
from longfire.data.manifest import checksum, read_manifest
from longfire.data.prepare import prepare, verify
from longfire.data.store_writer import StoreWriter
from longfire.data.text import sources
from longfire.data.tokenizer import bytes_tokenizer, from_folder
from longfire.data.tokens import TokenStore
from longfire.errors import DataError
from longfire.generation.prompts import read_prompts
from longfire.images.parquet import ImageParquet


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def write(file: Path, *texts: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def texts(entry: Path | str, **changes) -> list[str]:
    (source,) = sources(settings.Data(dataset=(str(entry),), **changes))
    return [document.text for document in source.documents()]


def data_for(entry: Path, **changes) -> settings.Data:
    folder = str(entry.parent / "stores")
    return settings.Data(dataset=(str(entry),), folder=folder, validation_fraction=0.0, **changes)


def prepared_of(data: settings.Data, said: list[str] | None = None, **tokenizer) -> TokenStore:
    with (
        logged_to([] if said is None else said),
        prepare(data, settings.Tokenizer(**tokenizer)) as prepared,
    ):
        return prepared.stores[0]


def packed(texts: list[str]) -> bytes:
    return zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())


FRAME = packed(["one", "two"])


@pytest.mark.parametrize(
    "content", [*(FRAME + FRAME[:cut] for cut in range(1, len(FRAME))), FRAME[:-1], b""]
)
def test_zstandard_that_ends_within_a_frame_is_an_error(content, tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: broken after row"):
        texts(tmp_path / "a.jsonl.zst")


def test_frames_one_after_another_and_skippable_ones_are_read(tmp_path):
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"about"
    (tmp_path / "a.jsonl.zst").write_bytes(FRAME + skippable + FRAME)
    assert texts(tmp_path / "a.jsonl.zst") == ["one", "two", "one", "two"]


def test_zstandard_with_the_longest_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(compressor.compress(b"long text") + compressor.flush())
    assert texts(tmp_path / "a.txt.zst") == ["long text"]


LATER_STREAMS = [
    (packing.compress, suffix, position)
    for packing, suffix in ((bz2, ".bz2"), (lzma, ".xz"), (gzip, ".gz"))
    for position in (0, 4, -1)
]


@pytest.mark.parametrize(("compress", "suffix", "position"), LATER_STREAMS)
def test_a_later_stream_that_is_damaged_is_an_error(compress, suffix, position, tmp_path):
    # Python's readers of bzip2 and xz end there as if the file did
    damaged = bytearray(compress(b"two\n"))
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(compress(b"one\n") + damaged)
    assert texts(file, split_documents="lines") == ["one", "two"]
    damaged[position] ^= 32
    file.write_bytes(compress(b"one\n") + damaged)
    if (suffix, position) != (".gz", 4):  # the time in gzip's header, which is no text
        with pytest.raises(DataError, match="broken after row"):
            texts(file, split_documents="lines")


def test_padding_between_streams_is_no_text(tmp_path):
    for compress, suffix in (
        (bz2.compress, ".bz2"),
        (lzma.compress, ".xz"),
        (gzip.compress, ".gz"),
    ):
        file = tmp_path / f"a.txt{suffix}"
        file.write_bytes(compress(b"one\n") + bytes(20_000) + compress(b"two\n") + bytes(8))
        assert texts(file, split_documents="lines") == ["one", "two"]
        file.write_bytes(bytes(512))
        with pytest.raises(DataError, match="broken after row 0"):
            texts(file, split_documents="lines")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_of_no_bytes_is_an_error(suffix, tmp_path):
    (tmp_path / f"a.txt{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match="no bytes"):
        texts(tmp_path / f"a.txt{suffix}")


def test_an_arrow_file_whose_places_lie_outside_of_it(tmp_path):
    """Reading there would end the process with a bus error."""
    places = np.array([0, 2, 0x7F000000, 6], np.int32)
    buffers = [None, pa.py_buffer(places.tobytes()), pa.py_buffer(b"abcdef")]
    column = pa.Array.from_buffers(pa.string(), 3, buffers)
    batch = pa.RecordBatch.from_arrays([column], ["text"])
    for name, writer_of in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        file = tmp_path / f"{name}.arrow"
        with pa.OSFile(str(file), "wb") as sink, writer_of(sink, batch.schema) as writer:
            writer.write_batch(batch)
        with pytest.raises(DataError, match=f"{name}.arrow"):
            texts(file)


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_names_of_columns_that_are_not_utf_8(tmp_path, suffix):
    """A flipped bit makes one: pyarrow has no error of its own for it."""
    table = pa.table({"text": ["a", "b"], "kind": ["c", "d"]})
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, whole, store_schema=False)
    else:
        with pa.OSFile(str(whole), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    file = tmp_path / f"flipped{suffix}"
    file.write_bytes(whole.read_bytes().replace(b"kind", b"\xf4ind"))
    with pytest.raises(DataError, match=f"flipped{suffix}.*broken"):
        texts(file)
    if suffix == ".parquet":
        with pytest.raises(DataError, match="flipped.*cannot be read"):
            read_labelled(str(file), "a", "text", "text")
        with pytest.raises(DataError, match="flipped.*no readable parquet file"):
            ImageParquet([file], tmp_path, "a", "text", "text")


def test_an_arrow_stream_without_its_end_or_with_more_behind_it(tmp_path):
    table = pa.table({"text": [f"document {i}" for i in range(100)]})
    with pa.OSFile(str(tmp_path / "whole.arrow"), "wb") as file:
        writer = pa.ipc.new_stream(file, table.schema)
        for batch in table.to_batches(max_chunksize=10):
            writer.write_batch(batch)
        writer.close()
    whole = (tmp_path / "whole.arrow").read_bytes()
    assert len(texts(tmp_path / "whole.arrow")) == 100
    (tmp_path / "cut.arrow").write_bytes(whole[:-8])
    with pytest.raises(DataError, match="without its end mark"):
        texts(tmp_path / "cut.arrow")
    (tmp_path / "two.arrow").write_bytes(whole + whole)
    with pytest.raises(DataError, match="behind the end"):
        texts(tmp_path / "two.arrow")


def test_only_line_feeds_end_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028still one\r\n\ntwo\x0cstill two\x85\nthree".encode())
    assert read_prompts(file) == ["one\u2028still one", "two\x0cstill two\x85", "three"]
    assert [number for number, _, _ in read_lines(file)] == [1, 2, 3, 4]


def test_a_field_that_is_there_twice(tmp_path):
    schema = pa.schema([("text", pa.string()), ("text", pa.string())])
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], schema=schema),
        tmp_path / "a.parquet",
    )
    with pytest.raises(DataError, match="the field 'text' is there 2 times"):
        texts(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(DataError, match="the field 'text' is there 2 times"):
        prepared_of(data_for(tmp_path / "a.jsonl"))


def test_what_of_a_folder_is_read_is_reported(tmp_path):
    folder = tmp_path / "f"
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        write(folder / name, name)
    (folder / "README.md").write_text("about")
    (folder / "x.bin").write_bytes(b"x")
    said: list[str] = []
    prepared_of(data_for(folder), said)
    assert "2 of 5 files read" in said[0]
    assert all(
        part in said[0]
        for part in ("kind .bin (x.bin)", "beside the data (README.md)", "splits (test.jsonl)")
    )


def test_folders_that_are_not_clear(tmp_path):
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "lfs").mkdir()
    (tmp_path / "lfs" / "a.txt").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n"
    )
    write(tmp_path / "mixed" / "train_times.jsonl", "a")
    write(tmp_path / "mixed" / "bus_times.jsonl", "b")
    write(tmp_path / "parts" / "a-00000-of-00003.jsonl", "a")
    write(tmp_path / "parts" / "a-00002-of-00003.jsonl", "c")
    expected = {
        "link": "which is not there",
        "lfs": "git lfs pull",
        "mixed": "data.dataset_split",
        "parts": "00001-of-00003",
    }
    for name, message in expected.items():
        with pytest.raises(DataError, match=message):
            texts(tmp_path / name)
    assert texts(tmp_path / "mixed", data_files=("**/*",)) == ["b", "a"]
    assert texts(tmp_path / "parts", data_files=("*.jsonl",)) == ["a", "c"]


def test_parts_may_have_a_hash_behind_their_number(tmp_path):
    # data/train-00000-of-00002-8fa4ab9a2e9a9d9f.parquet, as `push_to_hub` wrote them
    for number, digest in enumerate(("8fa4ab9a2e9a9d9f", "0123456789abcdef")):
        write(tmp_path / "hub" / f"train-0000{number}-of-00002-{digest}.jsonl", digest)
    assert len(texts(tmp_path / "hub")) == 2
    (tmp_path / "hub" / "train-00000-of-00002-8fa4ab9a2e9a9d9f.jsonl").unlink()
    with pytest.raises(DataError, match="missing: .*train-00000-of-00002.jsonl"):
        texts(tmp_path / "hub")
    write(tmp_path / "no_count" / "10-of-9.jsonl", "a")
    assert texts(tmp_path / "no_count") == ["a"]


def test_a_file_that_a_link_names_again_is_read_once(tmp_path):
    write(tmp_path / "f" / "2024.jsonl", "a")
    (tmp_path / "f" / "latest.jsonl").symlink_to("2024.jsonl")
    assert texts(tmp_path / "f") == ["a"]
    (source,) = sources(settings.Data(dataset=(str(tmp_path / "f"),)))
    assert (
        source.description
        == "1 of 2 files read, left out: 1 links to files that are read (latest.jsonl)"
    )


def test_what_map_of_datasets_keeps_beside_the_data_is_left_out(tmp_path):
    write(tmp_path / "f" / "a.jsonl", "a")
    for name in ("cache-0123abcd.arrow", "cache-0123abcd_00000_of_00002.arrow"):
        (tmp_path / "f" / name).write_bytes(b"mapped")
    assert texts(tmp_path / "f") == ["a"]


def test_the_card_of_a_cloned_dataset_names_what_is_read(tmp_path):
    clone = tmp_path / "clone"
    write(clone / "data" / "x" / "0.jsonl", "all")
    write(clone / "sample" / "0.jsonl", "some")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
    (clone / "README.md").write_text(card + "- config_name: small\n  data_files: sample/*\n---\n")
    assert texts(clone) == ["all"]
    assert texts(clone, dataset_name=("small",)) == ["some"]
    with pytest.raises(DataError, match="default, small"):
        texts(clone, dataset_name=("none",))
    with pytest.raises(DataError, match="no split 'test'"):
        texts(clone, dataset_split=("test",))
    (clone / "README.md").write_text("\n---\nconfigs:\n- config_name: x\n  data_files: '**'\n---\n")
    assert texts(clone) == ["all", "some"]  # and not the card


def test_a_folder_inside_the_hubs_cache_links_to_its_blobs(tmp_path):
    inner, blobs = (
        tmp_path / "datasets--x" / "snapshots" / "abc" / "data",
        tmp_path / "datasets--x" / "blobs",
    )
    inner.mkdir(parents=True)
    write(blobs / "123", "blob")
    (inner / "a.jsonl").symlink_to("../../../blobs/123")
    assert texts(inner) == ["blob"]
    assert texts(tmp_path / "datasets--x" / "snapshots" / "*" / "data" / "*.jsonl") == ["blob"]
    with pytest.raises(DataError, match="keeps each revision.*snapshots/abc"):
        texts(tmp_path / "datasets--x")


def test_a_name_that_is_not_utf_8(tmp_path):
    (tmp_path / "f").mkdir()
    write(Path(os.fsdecode(os.fsencode(tmp_path / "f") + b"/lat\xe9.jsonl")), "a")
    assert prepared_of(data_for(tmp_path / "f")).train.documents == 1


def test_a_word_that_is_not_utf_8(capsys):
    assert main(["generate", "m", "--prompt", os.fsdecode(b"bad \xff")]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_an_end_that_is_a_list(tmp_path):
    bytes_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["<eos>", "<bos>"]}')
    with pytest.raises(DataError, match="eos_token = .* must be one token"):
        from_folder(tmp_path)


def test_content_decides_a_stores_address_and_not_the_time(tmp_path):
    file = write(tmp_path / "a.jsonl", *["word " * 4000] * 900)  # over 16 MiB
    assert file.stat().st_size > 2**24
    first = prepared_of(data_for(file)).folder
    os.utime(file, (1, 1))
    assert prepared_of(data_for(file)).folder == first
    middle = 100_000  # within a word of a line, behind the first bytes that were once hashed
    with open(file, "r+b") as opened:
        opened.seek(middle)
        opened.write(b"x")
    os.utime(file, (1, 1))
    assert prepared_of(data_for(file)).folder != first


def test_a_source_that_changes_while_it_is_prepared(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", *["word"] * 500)
    append, before = StoreWriter.append, file.read_bytes()

    def grow(self, *documents):
        with open(file, "ab") as opened:
            opened.write(b'{"text": "more"}\n')
        append(self, *documents)

    monkeypatch.setattr(StoreWriter, "append", grow)
    with pytest.raises(DataError, match="when preparation began.*deleted"):
        prepared_of(data_for(file))
    monkeypatch.undo()
    file.write_bytes(before)
    assert prepared_of(data_for(file)).train.documents == 500


@pytest.mark.parametrize("special", [["<eos>"], ["<eos>", "<unk>"]])
def test_a_tokenizer_that_loses_text(special, tmp_path):
    words = Backend(models.BPE(unk_token=special[1] if len(special) > 1 else None))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        ["the quick brown fox"], trainers.BpeTrainer(special_tokens=special, show_progress=False)
    )
    words.save(str(tmp_path / "t.json"))
    file = write(tmp_path / "a.jsonl", "the fox", "日本語", "the quick 漢")
    with pytest.raises(DataError, match="loses .*of the characters.*max_lost_share"):
        prepared_of(data_for(file), path=str(tmp_path / "t.json"))
    said: list[str] = []
    prepared_of(data_for(file), said, path=str(tmp_path / "t.json"), max_lost_share=1.0)
    assert f"{4 / 18:.2%} of the characters" in said[0]
    assert loses_nothing(bytes_tokenizer().backend)


def test_characters_that_a_normalizer_composes_are_not_lost(tmp_path):
    words = Backend(
        models.BPE({"<unk>": 0, "<eos>": 1, "\ud55c": 2, "\u1ec7": 3}, [], unk_token="<unk>")
    )
    words.normalizer = normalizers.NFC()
    words.add_special_tokens(["<unk>", "<eos>"])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "unk_token": "<unk>"}')
    entry = write(
        tmp_path / "a.jsonl", "\u1112\u1161\u11abe\u0323\u0302" * 20
    )  # decomposed: 3 characters for each
    said: list[str] = []
    assert prepared_of(data_for(entry), said, path=str(folder)).train.length == 41
    assert not any("the tokenizer loses" in line for line in said)
    entry = write(tmp_path / "b.jsonl", "\ud55c\u0323" * 20)  # no such syllable: the dot is lost
    with pytest.raises(DataError, match=r"loses 50\.00% of the characters"):
        prepared_of(data_for(entry), path=str(folder))


def test_a_manifest_that_is_no_object(tmp_path):
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(DataError, match="damaged: no JSON object"):
        read_manifest(tmp_path)


def test_a_store_of_before_is_read_and_gets_checksums(tmp_path):
    store = prepared_of(data_for(write(tmp_path / "a.jsonl", *["word"] * 50)))
    manifest = read_manifest(store.folder)
    for name, stream in manifest["streams"].items():
        for shard in stream["shards"]:
            file = store.folder / name / shard["file"]
            for key in ("blocks_crc32", "rest_crc32"):
                del shard[key]
            shard["blake2b"] = checksum(file.read_bytes())
            file.with_suffix(".crc32").unlink()
    (store.folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    said: list[str] = []
    with (
        logged_to(said),
        prepare(data_for(tmp_path / "a.jsonl"), settings.Tokenizer()) as prepared,
    ):
        assert prepared.stores[0].train.tokens(0, 4).tolist() == list(b"word")
        assert sum("no checksums of blocks" in line for line in said) == 1
        verify(prepared)
    again = TokenStore(store.folder)
    assert (
        again.has_checksums and again.verify() > 0 and np.array_equal(again.train.ends[:2], [5, 10])
    )
    shutil.rmtree(store.folder)
