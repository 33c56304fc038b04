"""What lies beside a tokenizer.json: carried along, read again, and the rule of BOS as training had it."""

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import processors

from longfire.data.token_templates import starts_with, with_bos_rule
from longfire.data.tokenizer import Tokenizer, bytes_tokenizer, from_folder, train_tokenizer
from longfire.data.tokenizer_files import CarriedFiles, read_carried
from longfire.errors import DataError

CONFIG = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": {"content": "<bos>"},
    "padding_side": "left",
    "model_max_length": 4096,
    "chat_template": [
        {"name": "default", "template": "{{ a }}"},
        {"name": "tools", "template": "{{ b }}"},
    ],
    "tokenizer_class": "SomeTokenizerFast",
    "auto_map": {"AutoTokenizer": ["code.py", None]},
    "name_or_path": "/somewhere/else",
}
GENERATION = {
    "eos_token_id": [257, 10, 13],
    "temperature": 0.6,
    "top_p": 0.9,
    "do_sample": True,
    "_from_model_config": True,
}


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    bytes_tokenizer().save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ c }}")
    return folder


def test_everything_goes_along_and_comes_back(source, tmp_path):
    tokenizer = from_folder(source)
    tokenizer.save(tmp_path / "copy")
    assert from_folder(tmp_path / "copy").carried == tokenizer.carried
    config = json.loads((tmp_path / "copy/tokenizer_config.json").read_text())
    for key in ("padding_side", "model_max_length", "chat_template"):
        assert config[key] == CONFIG[key]
    assert config["pad_token"] == "<bos>"
    assert "auto_map" not in config and "name_or_path" not in config
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs.chat_template.keys() >= {"rag"} and theirs.model_max_length == 4096
    assert (theirs.pad_token, theirs.padding_side) == ("<bos>", "left")


def test_all_ends_are_kept_and_sampling_defaults_too(source, tmp_path):
    tokenizer = from_folder(source)
    assert tokenizer.end_ids == (257, 10, 13) and tokenizer.pad_id == 256
    tokenizer.save(tmp_path / "copy")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "copy")
    assert (theirs.eos_token_id, theirs.temperature, theirs.top_p) == ([257, 10, 13], 0.6, 0.9)
    assert (theirs.bos_token_id, theirs.pad_token_id) == (256, 256)


def test_ends_of_a_model_config_count_where_no_generation_config_is(source):
    (source / "generation_config.json").unlink()
    (source / "config.json").write_text(json.dumps({"eos_token_id": [3, 99999]}))
    assert from_folder(source).end_ids == (3, 257), "of the vocabulary, and EOS"


def test_a_tokenizer_of_our_own_has_one_end(tmp_path):
    tokenizer = train_tokenizer(["some words"], 259)
    assert tokenizer.end_ids == (tokenizer.eos_id,) and tokenizer.carried == CarriedFiles()
    tokenizer.save(tmp_path)
    assert (
        json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
        == tokenizer.eos_id
    )
    assert from_folder(tmp_path).end_ids == tokenizer.end_ids


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_the_rule_of_bos_is_written_and_read_again(adds_bos, before, tmp_path):
    """Whatever the tokenizer did before; transformers does then as training did."""
    made = train_tokenizer(["some words, and some more"], 300)
    tokenizer = Tokenizer(with_bos_rule(made.backend, "<bos>", before), "<bos>", "<eos>")
    assert tokenizer.adds_bos == before
    tokenizer.save(tmp_path, adds_bos)
    again = from_folder(tmp_path)
    assert again.adds_bos == adds_bos and again.encode("some words") == tokenizer.encode(
        "some words"
    )
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("some words")["input_ids"]
    assert ids == [made.bos_id] * adds_bos + made.encode("some words")


def test_add_bos_token_of_a_config_is_heeded(tmp_path):
    bytes_tokenizer().save(tmp_path)
    assert not from_folder(tmp_path).adds_bos
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "add_bos_token": True})
    )
    assert from_folder(tmp_path).adds_bos
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "add_bos_token": True})
    )
    assert not from_folder(tmp_path).adds_bos, "there is no BOS to add"


def test_the_other_parts_of_a_post_processor_stay():
    words = train_tokenizer(["some words"], 300).backend
    with_both = with_bos_rule(words, "<bos>", True)
    bos_id = words.token_to_id("<bos>")
    assert starts_with(with_both, bos_id) and not starts_with(words, bos_id)
    assert not starts_with(with_bos_rule(with_both, "<bos>", False), bos_id)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_a_file_that_is_no_object_is_named(name, source):
    (source / name).write_text("[1]")
    with pytest.raises(DataError, match=f"{name}: it must be an object, not a list"):
        read_carried(source)


def test_a_template_outside_the_folder_is_not_read(source, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source / "additional_chat_templates/secret.jinja").symlink_to(tmp_path / "secret")
    assert list(read_carried(source).files) == ["additional_chat_templates/rag.jinja"]


TOKENS = [("<bos>", 256), ("<eos>", 257)]
POST_PROCESSORS = {  # and the ids that follow a text
    "none": (None, []),
    "bytes": (processors.ByteLevel(trim_offsets=False), []),
    "BOS": (
        processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=TOKENS
        ),
        [],
    ),
    "EOS, as T5": (
        processors.TemplateProcessing(
            single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=TOKENS
        ),
        [257],
    ),
    "both": (
        processors.TemplateProcessing(single="<bos> $A <eos>", pair=None, special_tokens=TOKENS),
        [257],
    ),
    "one token as EOS": (
        processors.TemplateProcessing(
            single="$A <bos>", pair="$A <bos> $B <bos>", special_tokens=TOKENS
        ),
        [256],
    ),
    "one token at both ends": (
        processors.TemplateProcessing(
            single="<bos> $A <bos>", pair="<bos> $A <bos> $B <bos>", special_tokens=TOKENS
        ),
        [256],
    ),
    "BERT": (processors.BertProcessing(("<eos>", 257), ("<bos>", 256)), [257]),
    "RoBERTa": (processors.RobertaProcessing(("<eos>", 257), ("<bos>", 256)), [257]),
    "several": (
        processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="$A <eos>", pair=None, special_tokens=TOKENS),
            ]
        ),
        [257],
    ),
}


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_the_rule_of_bos_changes_nothing_else_that_a_post_processor_adds(name, adds_bos):
    words = bytes_tokenizer().backend
    words.post_processor, after = POST_PROCESSORS[name]
    ruled = with_bos_rule(words, "<bos>", adds_bos)
    assert ruled.encode("hi").ids == [256] * adds_bos + [104, 105] + after
    again = with_bos_rule(with_bos_rule(ruled, "<bos>", not adds_bos), "<bos>", adds_bos)
    assert again.encode("hi").ids == ruled.encode("hi").ids


@pytest.mark.parametrize("name", ["none", "EOS, as T5", "RoBERTa"])
def test_the_second_text_of_a_pair_begins_with_bos_too(name):
    words = bytes_tokenizer().backend
    words.post_processor, _ = POST_PROCESSORS[name]
    if name == "RoBERTa":  # has a BOS of its own
        words = with_bos_rule(words, "<bos>", False)
        assert 256 not in words.encode("a", "b").ids
    ids = with_bos_rule(words, "<bos>", True).encode("a", "b").ids
    assert ids[:2] == [256, 97] and ids[ids.index(98) - 1] == 256


def test_a_chat_template_that_is_not_utf_8_is_named(tmp_path):
    from longfire.data.tokenizer import bytes_tokenizer, from_folder

    bytes_tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(DataError, match=r"chat_template\.jinja: cannot be read as text"):
        from_folder(tmp_path)
