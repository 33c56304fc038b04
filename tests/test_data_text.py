"""Sources and formats: the same documents from any of them, from any position on; bad input names file, row and fix."""

import gzip
import json
import re
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from longfire.config import settings
from longfire.data import formats, text
from longfire.data.chosen_files import relative
from longfire.errors import DataError, SettingsError

TEXTS = ["one", "zwei\nLänge", "", "三 四", "x" * 5000, "five\t5", " "] * 60


def write_jsonl(file: Path, opened=open) -> None:
    with opened(file, "wt", encoding="utf-8") as f:
        for i, content in enumerate(TEXTS):
            f.write(
                json.dumps({"id": i, "text": content}, ensure_ascii=i % 2 == 0)
                + "\n"
                + "\n" * (i % 3 == 0)
            )


def write_zst(file: Path) -> None:
    write_jsonl(file.with_suffix(""))
    file.write_bytes(zstandard.compress(file.with_suffix("").read_bytes()))
    file.with_suffix("").unlink()


def table() -> pa.Table:
    return pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})


def write_arrow_file(file: Path) -> None:
    with pa.ipc.new_file(str(file), table().schema) as f:
        f.write_table(table(), max_chunksize=33)


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": lambda file: write_jsonl(file, gzip.open),
    "a.jsonl.zst": write_zst,
    "a.json": lambda file: file.write_text(json.dumps([{"text": t} for t in TEXTS])),
    "lines.json": write_jsonl,
    "a.parquet": lambda file: pq.write_table(table(), file, row_group_size=37),
    "a.arrow": write_arrow_file,
}


def source_of(*entries: str | Path, **changes) -> text.Source:
    (source,) = text.sources(settings.Data(dataset=tuple(map(str, entries)), **changes))
    return source


def texts(source: text.Source, position=None) -> list[str]:
    documents = list(source.documents(position))
    assert not [d.problem for d in documents if d.problem]
    return [d.text for d in documents]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents_and_goes_on_from_anywhere(name, tmp_path):
    WRITERS[name](tmp_path / name)
    source = source_of(tmp_path / name)
    assert texts(source) == TEXTS
    documents = source.documents()
    for number, document in enumerate(documents, 1):
        assert (
            document.identity.startswith(f"{name}:")
            and document.where == f"{tmp_path}/{document.identity}"
        )
        if number % 31 == 0 or number in (1, len(TEXTS)):
            position = json.loads(json.dumps(documents.position))  # as it lies in a manifest
            assert texts(source, position) == TEXTS[number:]
    assert documents.bytes_read == source.bytes_total


def test_datasets_folder_and_its_splits(tmp_path):
    both = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"text": [f"{split} {i}" for i in range(5)]})
            for split in ("train", "odd")
        }
    )
    both.save_to_disk(tmp_path / "both")
    both["odd"].save_to_disk(tmp_path / "one")
    assert texts(source_of(tmp_path / "both")) == [f"train {i}" for i in range(5)]
    assert texts(source_of(tmp_path / "both", dataset_split=("odd",))) == [
        f"odd {i}" for i in range(5)
    ]
    assert texts(source_of(tmp_path / "one")) == [f"odd {i}" for i in range(5)]
    with pytest.raises(DataError, match="no files of split 'test'.*train, odd"):
        source_of(tmp_path / "both", dataset_split=("test",))


def test_a_folder_of_texts_has_a_document_a_file(tmp_path):
    for name in ("b/z.txt", "b/train.md", "a.txt", ".hidden/x.txt", "notes.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfmarked")
    documents = list(source_of(tmp_path).documents())
    assert [d.text for d in documents] == ["a.txt", "b/train.md", "b/z.txt", "packed", "marked"]
    assert [d.identity for d in documents] == [
        "a.txt",
        "b/train.md",
        "b/z.txt",
        "c.txt.gz",
        "mark.txt",
    ]


@pytest.fixture
def cloned(tmp_path) -> Path:
    """As a dataset's repository lies after `git clone`."""
    for name in ("train/0.jsonl", "train/1.jsonl", "validation/0.jsonl", "math/train-0.jsonl"):
        (tmp_path / "repo" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "repo" / name).write_text(json.dumps({"content": name}))
    (tmp_path / "repo" / "README.md").write_text("no document")
    (tmp_path / "repo" / "dataset_infos.json").write_text("{}")
    return tmp_path / "repo"


def test_splits_folders_and_files_inside_a_source(cloned):
    assert texts(source_of(cloned)) == ["math/train-0.jsonl", "train/0.jsonl", "train/1.jsonl"]
    assert texts(source_of(cloned, dataset_split=("validation",))) == ["validation/0.jsonl"]
    assert texts(source_of(cloned / "math")) == ["math/train-0.jsonl"]
    assert texts(source_of(cloned, data_dir=("math",))) == ["math/train-0.jsonl"]
    assert texts(source_of(cloned, data_files=("*/0.jsonl",))) == [
        "train/0.jsonl",
        "validation/0.jsonl",
    ]
    assert texts(source_of(f"{cloned}/*/0.jsonl")) == ["train/0.jsonl", "validation/0.jsonl"]
    assert texts(source_of(f"{cloned}/**/*.jsonl", dataset_split=("validation",))) == [
        "validation/0.jsonl"
    ]


def test_nothing_escapes_its_folder(cloned, tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}')
    for wrong in ("../secret.jsonl", "train/../../secret.jsonl", f"{tmp_path}/secret.jsonl"):
        with pytest.raises(DataError, match="leads out of"):
            source_of(cloned, data_files=(wrong,))
    (cloned / "train" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    for chosen in ({}, {"data_files": ("train/*",)}):
        with pytest.raises(DataError, match=r"link\.jsonl: a link to .*secret\.jsonl, outside"):
            source_of(cloned, **chosen)
    (cloned / "train" / "link.jsonl").unlink()
    (cloned / "out").symlink_to(tmp_path)
    for chosen in ({}, {"data_files": ("out/*.jsonl",)}, {"data_dir": ("out",)}):
        with pytest.raises(DataError, match="outside of"):
            source_of(cloned, **chosen)


def test_the_hubs_own_cache_links_inside_itself(tmp_path):
    snapshot, blobs = (
        tmp_path / "datasets--x--y" / "snapshots" / "abc",
        tmp_path / "datasets--x--y" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text('{"text": "blob"}')
    (snapshot / "a.jsonl").symlink_to("../../blobs/123")
    assert texts(source_of(snapshot)) == ["blob"]


def test_settings_of_one_source_or_all(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"text": "t", "body": "b", "title": name})
        )
    entries = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    both = text.sources(settings.Data(dataset=entries, text_field=("body",)))
    assert [texts(s) for s in both] == [["b"], ["b"]]
    each = text.sources(settings.Data(dataset=entries, text_field=("", "title+body")))
    assert [texts(s) for s in each] == [["t"], ["b\nb"]]
    assert each[0].fingerprint != each[1].fingerprint
    with pytest.raises(SettingsError, match=r"data\.text_field has 3 entries for 2 sources"):
        text.sources(settings.Data(dataset=entries, text_field=("a", "b", "c")))
    with pytest.raises(SettingsError, match="loss masks"):
        text.sources(settings.Data(dataset=entries, text_field=("[title]+body",)))
    assert text.shares(settings.Data(dataset=entries, data_probs=(3.0, 1.0))) == (0.75, 0.25)
    for wrong in ((1.0,), (1.0, -1.0), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(SettingsError, match="data.data_probs"):
            text.shares(settings.Data(dataset=entries, data_probs=wrong))


BAD_RECORDS = {
    b'{"text": "a"}\n{"text": "b"\n': r"bad\.jsonl:2: broken JSON",
    b'{"text": "a"}\n\n{"body": "b", "id": 1}\n': r"bad\.jsonl:3: no field 'text' \(fields there: body, id\); set data\.text_field",
    b'{"text": "a"}\n{"text": "\xff"}\n': r"bad\.jsonl:2: invalid UTF-8 at byte 10",
    b'{"text": 5}\n': r"bad\.jsonl:1: the text field holds int, not text",
    b'{"text": "\\ud800"}\n': r"bad\.jsonl:1: half a surrogate pair",
    b'["text"]\n': r"bad\.jsonl:1: an object was expected, not list",
    b"[" * 100_000 + b"\n": r"bad\.jsonl:1: broken JSON",
}


@pytest.mark.parametrize("content", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_bad_records_say_where_and_what_and_do_not_stop_the_rest(content, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(content + b'{"text": "good"}\n')
    *_, bad, good = source_of(tmp_path / "bad.jsonl").documents()
    assert re.search(BAD_RECORDS[content], f"{bad.where}: {bad.problem}")
    assert good.text == "good" and not good.problem


def test_columns_hold_bad_text_too(tmp_path):
    raw = pa.array([b"good", b"\xffbad", None], pa.binary())
    strings = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    for name, column in (("binary", raw), ("string", strings)):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
        documents = list(source_of(tmp_path / f"{name}.parquet").documents())
        assert [(d.text, d.problem) for d in documents] == [
            ("good", ""),
            ("", "invalid UTF-8 at byte 0"),
            ("", ""),
        ]


BROKEN_FILES = {
    "a.parquet": b"PAR1 and nothing",
    "a.arrow": b"no arrow",
    "a.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 50_000)[:-20],
    "a.jsonl.zst": zstandard.compress(b'{"text": "a"}\n' * 50_000)[:-5] + b"wrong",
    "a.json": b'[{"text": "a"}, ',
    "b.json": b"\xff",
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_named(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN_FILES[name])
    with pytest.raises(DataError, match=f"{name}: .*(replace|fix) or remove the file"):
        list(source_of(tmp_path / name).documents())


def test_a_column_that_is_not_there(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError,
        match=r"a\.parquet: no field 'text' \(fields there: body, id\); set data\.text_field",
    ):
        list(source_of(tmp_path / "a.parquet").documents())


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ("./none.jsonl", {}, "no such file or folder: './none.jsonl'"),
        ("none.jsonl", {}, "no such file or folder"),
        ("{tmp}/none", {}, "no such file or folder"),
        ("{tmp}/*.jsonl", {}, "no file matches"),
        ("{tmp}", {}, "no file in it that we read"),
        ("{tmp}/a.bin", {}, "not a kind of file that we read"),
        ("{tmp}", {"data_dir": ("sub",)}, "no such folder in"),
        ("{tmp}", {"data_files": ("*.x",)}, "no such file in"),
        ("{tmp}/a.txt", {"data_files": ("*.x",)}, "this is a file"),
        ("{tmp}", {"dataset_name": ("default",)}, "for datasets of the hub"),
    ],
)
def test_entries_that_are_nothing(entry, changes, message, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    if entry.endswith("a.txt"):
        (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=message):
        source_of(entry.format(tmp=tmp_path), **changes)


def test_the_embedded_library():
    source = source_of("embedded")
    names = [relative(file, source.root) for file in source.files]
    assert "pydoc_data/topics.py" in names and "json/decoder.py" in names
    assert not [
        name for name in names if {"test", "site-packages", "encodings"} & set(name.split("/"))
    ]
    assert source.bytes_total > 5_000_000 and len(source.fingerprint) == 32
    assert not [d.where for d in source.documents() if d.problem]


def test_a_fingerprint_is_of_names_and_contents(tmp_path):
    def fingerprint(files: dict[str, str], folder: str) -> str:
        for name, content in files.items():
            (tmp_path / folder / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / folder / name).write_text(content)
        return source_of(tmp_path / folder).fingerprint

    one = fingerprint({"a.txt": "a", "b.txt": "b"}, "1")
    assert one == fingerprint({"b.txt": "b", "a.txt": "a"}, "2"), "another place is the same source"
    assert one != fingerprint({"a.txt": "a", "b.txt": "c"}, "3")
    assert one != fingerprint({"a.txt": "a", "c.txt": "b"}, "4")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No test asks the hub; `datasets` keeps its cache in the test's folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_out_of_reach_is_one_message(streaming, offline):
    source = source_of("no-such-owner/no-such-dataset", streaming=streaming)
    with pytest.raises(
        DataError, match="no-such-owner/no-such-dataset.*check the name, the network"
    ):
        list(source.documents())


def test_folders_inside_a_hub_dataset():
    """`repo/discussions`."""
    source = source_of("OpenCoder-LLM/opc-fineweb-code-corpus/data/web", dataset_name=("default",))
    assert (
        source.repository == "OpenCoder-LLM/opc-fineweb-code-corpus"
        and source.data_dir == "data/web"
    )
    assert source.name == "OpenCoder-LLM-opc-fineweb-code-corpus-default-data-web"


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_for_us_and_goes_on_from_anywhere(streaming, offline, tmp_path):
    """Through `datasets`' own json builder, which needs no network: what a dataset of the hub goes through."""
    write_jsonl(tmp_path / "a.jsonl")
    source = source_of("json", streaming=streaming, data_files=(str(tmp_path / "a.jsonl"),))
    assert texts(source) == TEXTS
    documents = source.documents()
    positions = {
        n: json.loads(json.dumps(documents.position))
        for n, _ in enumerate(documents, 1)
        if n % 101 == 0
    }
    for number, position in positions.items():
        assert (
            texts(
                source_of("json", streaming=streaming, data_files=(str(tmp_path / "a.jsonl"),)),
                position,
            )
            == TEXTS[number:]
        )
    assert bool(source.fingerprint) != streaming


def test_formats_by_name():
    names = {
        "a.JSONL": ".jsonl",
        "a.b.jsonl.gz": ".jsonl",
        "a.txt.zst": ".txt",
        "a.parquet.gz": "",
        "a.gz": "",
        "a": "",
        "a.bin": "",
    }
    assert {name: formats.format_of(Path(name)) for name in names} == names
