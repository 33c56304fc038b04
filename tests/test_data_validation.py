"""heldout.py: each source has unseen text, none of it is trained on, and stores that were made before keep their address."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as some
from logged import logged_to

from longfire.config import settings
from longfire.data import text
from longfire.data.batches import Batches
from longfire.data.documents import Document
from longfire.data.prepare import Prepared, describe, prepare
from longfire.data.tokens import TokenStream
from longfire.data.validation import (
    CUT_CHARACTERS,
    FEW_DOCUMENTS,
    ValidationSplit,
    drawn_numbers,
    hash_of,
    is_validation,
    tail_start,
    validation_split_of,
)
from longfire.errors import DataError, SettingsError

BYTES = settings.Tokenizer(path="bytes")


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "\n".join(
        " ".join(draw.choices(["fire", "long", "state", "gate"], k=9)) for _ in range(count // 9)
    )


def jsonl(file: Path, count: int, length: int = 40) -> None:
    lines = [json.dumps({"text": f"{number} {words(length, number)}"}) for number in range(count)]
    file.write_text("\n".join(lines))


def data_of(folder: Path, *entries: str, **changes) -> settings.Data:
    given = {"folder": str(folder / "stores"), "num_workers": 1, "prefetch_factor": 0, **changes}
    return settings.Data(dataset=tuple(str(folder / entry) for entry in entries), **given)


def prepared_of(data: settings.Data) -> Prepared:
    return prepare(data, BYTES)


def texts_of(prepared: Prepared, stream: TokenStream) -> list[str]:
    ends = [0, *stream.ends[:].tolist()]
    return [prepared.tokenizer.decode(stream.tokens(a, b)) for a, b in pairwise(ends)]


def test_of_one_long_text_the_end_is_held_out_and_not_trained_on(tmp_path):
    whole = words(9000)
    (tmp_path / "input.txt").write_text(whole)
    prepared = prepared_of(data_of(tmp_path, "input.txt"))
    store = prepared.stores[0]
    (trained,), (unseen,) = texts_of(prepared, store.train), texts_of(prepared, store.validation)
    assert trained + unseen == whole and unseen[0] != "\n" and trained.endswith("\n")
    assert 0.08 * len(whole) < len(unseen) < 0.1 * len(whole) + 1


@given(some.text(alphabet="ab \n", min_size=CUT_CHARACTERS, max_size=5000), some.floats(0.001, 0.9))
@hypothesis_settings(deadline=None, max_examples=30)
def test_a_tail_is_about_as_long_as_asked_for_and_never_everything(text, fraction):
    place = tail_start(text, fraction)
    size = max(round(fraction * len(text)), round(0.1 * len(text)))
    assert 0 < place < len(text) and size // 2 <= len(text) - place <= size


def test_short_texts_are_not_cut():
    assert tail_start("a" * (CUT_CHARACTERS - 1), 0.5) == CUT_CHARACTERS - 1


@pytest.mark.parametrize("count", [FEW_DOCUMENTS, 60])
def test_of_documents_that_all_hash_above_the_fraction_the_lowest_is_held_out(tmp_path, count):
    jsonl(tmp_path / "a.jsonl", count)
    (source,) = text.sources(data_of(tmp_path, "a.jsonl"))
    rule = validation_split_of(source, 1e-6)
    lowest = min((f"a.jsonl:{n}" for n in range(1, count + 1)), key=hash_of)
    assert rule == ValidationSplit(1e-6, lowest)
    prepared = prepared_of(data_of(tmp_path, "a.jsonl", validation_fraction=1e-6))
    assert (
        prepared.stores[0].validation.documents == 1
        and prepared.stores[0].train.documents == count - 1
    )


@pytest.mark.parametrize(("count", "fraction", "seed"), [(500, 0.0005, 2357), (37, 0.2, 0)])
def test_a_seed_draws_the_documents_of_train_test_split(tmp_path, count, fraction, seed):
    records = [{"text": "" if number % 9 == 4 else f"text {number}"} for number in range(count)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    theirs = Dataset.from_list(records).train_test_split(
        test_size=fraction, seed=seed, shuffle=True
    )
    data = data_of(tmp_path, "a.jsonl", validation_fraction=fraction, validation_seed=seed)
    prepared = prepared_of(data)
    store = prepared.stores[0]
    for part, stream in (("train", store.train), ("test", store.validation)):
        wanted = sorted(content for content in theirs[part]["text"] if content)
        assert sorted(texts_of(prepared, stream)) == wanted


def test_the_size_of_the_part_that_is_drawn_is_theirs():
    for count in (1, 8, 9_999, 100_001):
        rows = Dataset.from_dict({"row": range(count + 1)})
        theirs = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]["row"]
        assert drawn_numbers(count + 1, 0.0005, 2357).tolist() == list(theirs)


def test_a_seed_is_part_of_the_address(tmp_path):
    jsonl(tmp_path / "a.jsonl", 300)
    folders = set()
    for seed in (-1, 1, 2):
        data = data_of(tmp_path, "a.jsonl", validation_fraction=0.1, validation_seed=seed)
        folders.add(prepared_of(data).stores[0].folder)
    assert len(folders) == 3


def test_where_the_hash_decides_the_address_is_that_of_before(tmp_path):
    """A store that was made before there were tails and lowest hashes has these options and no others."""
    jsonl(tmp_path / "a.jsonl", 300)
    store = prepared_of(data_of(tmp_path, "a.jsonl", validation_fraction=0.1)).stores[0]
    options = {"add_bos", "add_eos", "heldout_fraction", "text_field", "skip_bad_documents"}
    assert store.manifest["options"].keys() == options
    unseen = [n for n in range(1, 301) if is_validation(f"a.jsonl:{n}", 0.1)]
    assert store.validation.documents == len(unseen) > 10


def test_a_document_is_in_one_part_only():
    for rule in (ValidationSplit(0.3), ValidationSplit(0.0, "a:7"), ValidationSplit(0.0)):
        for number in range(50):
            document = Document(f"a:{number}", "", "text", "")
            train, unseen = rule.parts(document)
            assert (train, unseen) in (("text", ""), ("", "text"))


FILES = {
    "lines": ("one\n\ntwo words\r\n  \nthree", ["one", "two words", "three"]),
    "blank_lines": ("one\nmore\n\n \ntwo\n\nthree\n", ["one\nmore", "two", "three"]),
    "<|endoftext|>": (
        "one\n<|endoftext|>\ntwo\n\nmore<|endoftext|><|endoftext|> three \n",
        ["one", "two\n\nmore", "three"],
    ),
}


@pytest.mark.parametrize("split_documents", FILES)
@pytest.mark.parametrize("block_bytes", [3, 2**20])
def test_a_text_file_is_split_and_read_on_from_anywhere(
    tmp_path, split_documents, block_bytes, monkeypatch
):
    import gzip

    monkeypatch.setattr("longfire.data.text_files.BLOCK_BYTES", block_bytes)
    content, expected = FILES[split_documents]
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.txt", "a.txt.gz"):
        (source,) = text.sources(data_of(tmp_path, name, split_documents=split_documents))
        documents = source.documents()
        positions = [(document.text, dict(documents.position)) for document in documents]
        assert [found for found, _ in positions] == expected
        for number, (_, position) in enumerate(positions):
            assert [document.text for document in source.documents(position)] == expected[
                number + 1 :
            ]
    assert len({document.identity for document in source.documents()}) == 3


def test_splits_are_documents_with_an_address_of_their_own(tmp_path):
    (tmp_path / "input.txt").write_text(
        "<|endoftext|>".join(words(90, seed) for seed in range(200))
    )
    whole = prepared_of(data_of(tmp_path, "input.txt")).stores[0]
    split = prepared_of(
        data_of(tmp_path, "input.txt", split_documents="<|endoftext|>", validation_fraction=0.1)
    ).stores[0]
    assert whole.folder != split.folder and whole.train.documents == 1
    assert (
        split.train.documents + split.validation.documents == 200
        and 8 < split.validation.documents < 40
    )
    unseen = {f"input.txt:{n}" for n in range(1, 201) if is_validation(f"input.txt:{n}", 0.1)}
    assert split.validation.documents == len(unseen)


def test_texts_of_ones_own_are_evaluated_on_and_nothing_else_is_held_out(tmp_path):
    jsonl(tmp_path / "a.jsonl", 50)
    (tmp_path / "unseen.txt").write_text("never trained on")
    data = data_of(
        tmp_path, "a.jsonl", validation_fraction=0.5, validation=(str(tmp_path / "unseen.txt"),)
    )
    prepared = prepared_of(data)
    assert prepared.stores[0].train.documents == 50 and prepared.stores[0].validation.documents == 0
    assert [name for name, _, _ in prepared.validation] == ["unseen.txt"]
    with Batches(prepared, data, 4, 0) as batches:
        assert batches.validation_text(0, 1000) == "never trained on"
        assert sum(batch.real_tokens() for batch in batches.validation_batches(0, 1000)) == len(
            "never trained on"
        )


def test_a_tokenizer_is_not_trained_on_what_is_held_out(tmp_path):
    """`zzzz` stands in the tail only: no word of the tokenizer is made of it."""
    (tmp_path / "input.txt").write_text(words(3000) + " zzzzzzzz" * 100)
    trained = settings.Tokenizer(path="train", train_vocab_size=400)
    prepared = prepare(data_of(tmp_path, "input.txt"), trained)
    assert not any("zz" in word for word in prepared.tokenizer.backend.get_vocab())
    assert any("zz" in unseen for unseen in texts_of(prepared, prepared.stores[0].validation))


def test_a_small_tokenizer_says_what_it_is(tmp_path):
    (tmp_path / "input.txt").write_text("ab")
    message: list[str] = []
    trained = settings.Tokenizer(path="train", train_vocab_size=2048)
    with logged_to(message):
        prepare(data_of(tmp_path, "input.txt"), trained)
    assert message[0].startswith(
        "tokenizer: a vocabulary of 259 (2048 asked for: the text has no more) from 2 bytes"
    ), "bytes, ends, ab"


def test_validation_text_that_is_not_there_is_named_by_its_setting(tmp_path):
    jsonl(tmp_path / "a.jsonl", 20)
    with pytest.raises(DataError, match=r"data\.validation: no such file or folder: './none.txt'"):
        prepared_of(data_of(tmp_path, "a.jsonl", validation=("./none.txt",)))


@pytest.mark.parametrize(
    "entry", ["texts", "texts/part.jsonl", "copy.jsonl", "texts/../texts/*.jsonl"]
)
def test_validation_text_that_is_trained_on_is_refused_however_it_is_named(tmp_path, entry):
    (tmp_path / "texts").mkdir()
    jsonl(tmp_path / "texts" / "part.jsonl", 20)
    jsonl(tmp_path / "texts" / "more.jsonl", 10)
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "texts" / "part.jsonl").read_bytes())
    with pytest.raises(
        SettingsError, match=r"data\.validation: .* is text that data\.dataset trains on"
    ):
        prepared_of(data_of(tmp_path, "texts", validation=(str(tmp_path / entry),)))


def test_validation_files_of_one_name_are_both_evaluated_on(tmp_path):
    jsonl(tmp_path / "a.jsonl", 20)
    files = [tmp_path / place / "unseen.txt" for place in ("first", "second")]
    for file in files:
        file.parent.mkdir()
        file.write_text(f"text of {file.parent.name}")
    prepared = prepared_of(data_of(tmp_path, "a.jsonl", validation=tuple(map(str, files))))
    assert [name for name, _, _ in prepared.validation] == ["unseen.txt", "unseen.txt-2"]


def test_a_store_says_where_its_held_out_text_stands_whatever_its_documents_are_called(tmp_path):
    jsonl(tmp_path / "retails.jsonl", FEW_DOCUMENTS)
    (tmp_path / "input.txt").write_text(words(3000))
    documents, tail = prepared_of(data_of(tmp_path, "retails.jsonl", "input.txt")).stores
    assert " in 1 -> " in describe(documents) and "at the end of 1 -> " in describe(tail)


@pytest.mark.parametrize(
    "split_documents, warned", [("<s>", False), ("line", True), (r"\n", True), ("lines", False)]
)
def test_a_separator_that_never_occurs_is_named_at_once(tmp_path, split_documents, warned):
    (tmp_path / "input.txt").write_text("one<s>\ntwo<s>\nthree")
    notes: list[str] = []
    with logged_to(notes):
        prepare(data_of(tmp_path, "input.txt", split_documents=split_documents), BYTES)
    assert any("data.split_documents = " in line for line in notes) == warned


def test_a_validation_file_that_is_missing_is_named_before_a_tokenizer_is_trained(tmp_path):
    jsonl(tmp_path / "a.jsonl", 30)
    data = data_of(tmp_path, "a.jsonl", validation=("none.jsonl",))
    with pytest.raises(DataError, match=r"data\.validation: no such file or folder: 'none.jsonl'"):
        prepare(data, settings.Tokenizer(path="train"))
    assert not list(tmp_path.rglob("tokenizer-*"))
