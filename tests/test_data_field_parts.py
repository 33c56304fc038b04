"""data.fields: documents of several fields, some of them without loss."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longfire.config import settings
from longfire.config.aliases.ring_attention import RING_ATTENTION
from longfire.data.field_parts import FieldPart, FieldParts, parse_fields
from longfire.data.prepare import Prepared, prepare
from longfire.errors import DataError, SettingsError

BOS, EOS = "\x01", "\x02"  # stand for the two tokens of `bytes` here


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """fsync is for power cuts; a killed process loses nothing that it wrote."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


RECORD = {"instruction": "Add.", "input": "2+3", "output": "5", "empty": "", "null": None}


def prepared_of(folder: Path, *records: object, add_bos: bool = False, **changes) -> Prepared:
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = settings.Data(
        dataset=(str(file),),
        folder=str(folder / "stores"),
        num_workers=1,
        validation_fraction=0.0,
        **changes,
    )
    return prepare(data, settings.Tokenizer(add_bos=add_bos))


def written(prepared: Prepared) -> tuple[str, str]:
    """The text of a store of `bytes`; and, below each character, 1 where it counts in the loss."""
    stream = prepared.stores[0].train
    text = ""
    for number in stream.tokens(0, stream.length).tolist():
        text += {256: BOS, 257: EOS}.get(number, chr(number))
    mask = stream.loss_mask(0, stream.length)
    return text, "".join("1" if counts else "0" for counts in mask)


CASES = {
    "[instruction+input],output": ("Add. 2+35" + EOS, "000000000"[:8] + "1" + "1"),
    "output": ("5" + EOS, "11"),
    "[instruction],[input],output": ("Add.2+35" + EOS, "000000011"),
    "[instruction,input],output": ("Add.2+35" + EOS, "000000011"),
    " [ instruction + empty + input ] , output ": ("Add. 2+35" + EOS, "0000000011"),
    "[null+output],instruction": ("5Add." + EOS, "011111"),
    "<|bos|>,[instruction],<|eos|>,output": (BOS + "Add." + EOS + "5" + EOS, "10000111"),
    "[<|bos|>,instruction,<|eos|>],output": (BOS + "Add." + EOS + "5" + EOS, "00000011"),
}


@pytest.mark.parametrize("notation", CASES)
def test_parts_are_joined_and_masked(notation, tmp_path):
    assert written(prepared_of(tmp_path, RECORD, fields=notation)) == CASES[notation]


def test_the_tokens_around_a_document(tmp_path):
    """A BOS that is put before it is not learned, an EOS after it is."""
    prepared = prepared_of(tmp_path, RECORD, RECORD, fields="output", add_bos=True)
    assert written(prepared) == ((BOS + "5" + EOS) * 2, "011" * 2)


def test_the_separator(tmp_path):
    prepared = prepared_of(tmp_path, RECORD, fields="[input+output]", field_separator="\n")
    assert written(prepared)[0] == "2+3\n5" + EOS


def test_records_that_say_their_own_parts(tmp_path):
    records = [
        {"parts": "[q],a", "q": "one?", "a": "1"},
        {"parts": "a,[q]", "q": "two?", "a": "2"},
    ]
    expected = ("one?1" + EOS + "2two?" + EOS, "000011" + "100001")
    prepared = prepared_of(tmp_path, *records, fields_from_record="parts")
    assert written(prepared) == expected

    file = tmp_path / "records.parquet"
    pq.write_table(pa.Table.from_pylist(records), file)
    data = settings.Data(
        dataset=(str(file),),
        folder=str(tmp_path / "stores"),
        num_workers=1,
        validation_fraction=0.0,
        fields_from_record="parts",
    )
    assert written(prepare(data, settings.Tokenizer())) == expected


WRONG = {
    "[a": "a bracket is not closed",
    "[a,[b]]": "begins inside of another",
    "a]": "brackets stand around whole parts",
    "a,,b": "names an empty field",
    "a+": "names an empty field",
    "<|pad|>": r"<\|pad\|> is not one of <\|bos\|>, <\|eos\|>",
}


@pytest.mark.parametrize("notation", WRONG)
def test_a_wrong_notation_is_refused(notation, tmp_path):
    with pytest.raises(SettingsError, match=rf"data\.fields = .*{WRONG[notation]}"):
        prepared_of(tmp_path, RECORD, fields=notation)
    record = {"parts": notation, "a": "1", "b": "2"}
    with pytest.raises(DataError, match=rf"records\.jsonl:1: 'parts' = .*{WRONG[notation]}"):
        prepared_of(tmp_path, record, fields_from_record="parts")


def test_wrong_records_are_named(tmp_path):
    with pytest.raises(DataError, match=r":2: no field 'output' .*set data\.fields;"):
        prepared_of(tmp_path, RECORD, {"instruction": "x"}, fields="[instruction],output")
    with pytest.raises(DataError, match=r":1: 'output': the text field holds int"):
        prepared_of(tmp_path, {"output": 5}, fields="output")
    with pytest.raises(SettingsError, match="set one of them"):
        prepared_of(tmp_path, RECORD, fields="output", fields_from_record="parts")
    with pytest.raises(SettingsError, match="set one of them"):
        prepared_of(tmp_path, RECORD, record_format=("fields",))


def test_a_record_without_text_is_counted_as_empty(tmp_path):
    nothing = {"instruction": "", "output": None}
    prepared = prepared_of(tmp_path, nothing, RECORD, fields="[instruction],output")
    assert prepared.stores[0].manifest["progress"]["empty_documents"] == 1


def test_a_tokenizer_is_trained_on_the_text_of_all_parts(tmp_path):
    file = tmp_path / "records.jsonl"
    record = {"q": "questions questions questions", "a": "answers answers answers"}
    file.write_text("".join(json.dumps(record) + "\n" for _ in range(20)))
    data = settings.Data(
        dataset=(str(file),), folder=str(tmp_path / "stores"), num_workers=1, fields="[q],a"
    )
    wanted = settings.Tokenizer(path="train", train_vocab_size=280)
    prepared = prepare(data, wanted)
    assert len(prepared.tokenizer.encode("questions")) < len("questions")
    stream = prepared.stores[0].train
    text = prepared.tokenizer.decode(stream.tokens(0, int(stream.ends[0:1][0])))
    assert text == record["q"] + record["a"]
    mask = stream.loss_mask(0, int(stream.ends[0:1][0]))
    learned = stream.tokens(0, len(mask))[mask]
    assert prepared.tokenizer.decode(learned) == record["a"]


def test_the_notation_has_the_meaning_of_its_first_implementation():
    """A plain reading of it: split at commas, brackets around one part, + between fields."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        words = []
        expected = []
        for _ in range(draw.integers(1, 5)):
            fields = tuple(draw.choice(["a", "b", "c"], draw.integers(1, 3)).tolist())
            in_loss = bool(draw.integers(2))
            word = "+".join(fields)
            words.append(word if in_loss else f"[{word}]")
            expected.append(FieldPart(fields, "", in_loss))
        assert parse_fields(",".join(words)) == tuple(expected)


def test_the_settings_of_the_notations_first_home():
    fields = RING_ATTENTION["train_dataset.text_processor.fields"]
    assert callable(fields)
    assert fields("text") == {"data.text_field": "text"}
    assert fields("[a+b],c") == {"data.fields": "[a+b],c"}
    own = RING_ATTENTION["train_dataset.text_processor.fields_from_example"]
    assert own == "data.fields_from_record"


def test_the_fields_that_are_read():
    assert FieldParts("[a+b],c,a", "", " ").fields == ("a", "b", "c")
    assert FieldParts("", "parts", " ").fields == ("parts",)
