"""SentencePiece models: the ids of their own library on hostile text, or a refusal."""

import io
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from longfire.cli import main
from longfire.config.run import Run
from longfire.data.sentencepiece_files import probe_texts, read_sentencepiece
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.errors import DataError

# An extra, which is part of `dev`
sentencepiece = pytest.importorskip("sentencepiece")

LINES = [
    "def f(x):",
    "    return x ** 2  # naïve",
    "the quick brown fox jumps over the lazy dog",
    "a tokenizer of the tokenizers library, and another tokenizer",
    "        if not text: return (1, 2, 3), [4, 5], {6: 7}",
    "==== ---- ........ 1234567890 \t\t tab",
]


def trained_model(**options) -> bytes:
    """A small model, as the library trains it."""
    wanted = {
        "vocab_size": 350,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, **(wanted | options)
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(trained_model())
    return folder


def library_of(folder):
    """The sentencepiece library's own reading of a folder's model."""
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


EXACT = {
    "llama": {},
    "without a space before the text": {"add_dummy_prefix": False},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "without bytes": {"byte_fallback": False, "vocab_size": 100},
    "symbols": {"add_dummy_prefix": False, "user_defined_symbols": ["<turn>"]},
}


@pytest.mark.parametrize("kind", EXACT)
def test_ids_are_those_of_the_library(kind, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained_model(**EXACT[kind]))
    library = library_of(tmp_path)
    tokens = from_folder(tmp_path)
    texts = [*probe_texts(read_sentencepiece(tmp_path / "tokenizer.model")), *LINES, "x<turn>y"]
    assert tokens.encode_batch(texts) == library.encode(texts)
    assert tokens.vocab_size == library.get_piece_size()
    assert (tokens.bos_id, tokens.eos_id) == (library.bos_id(), library.eos_id()) == (1, 2)


@pytest.fixture(scope="module")
def both(llama_like):
    """Our tokenizer of a model, and the library's."""
    return from_folder(llama_like), library_of(llama_like)


@hypothesis_settings(deadline=None, max_examples=200)
@given(content=st.text())
def test_any_text_has_the_ids_of_the_library_and_comes_back(content, both):
    tokens, library = both
    ids = tokens.encode(content)
    assert ids == library.encode(content)
    # both take the sign that stands for a space for a space
    assert tokens.decode(ids) == library.decode(ids) == content.replace("\u2581", " ")


def test_a_file_a_folder_and_a_saved_copy_are_one_tokenizer(llama_like, tmp_path):
    (tmp_path / "other-name.model").write_bytes((llama_like / "tokenizer.model").read_bytes())
    named = Tokenizer.load(tmp_path / "other-name.model")
    tokens = from_folder(llama_like)
    tokens.save(tmp_path / "saved")
    saved = from_folder(tmp_path / "saved")
    assert named.fingerprint == tokens.fingerprint == saved.fingerprint
    assert saved.encode_batch(LINES) == library_of(llama_like).encode(LINES)


def test_bos_begins_a_text_unless_the_files_beside_say_otherwise(llama_like, tmp_path):
    assert from_folder(llama_like).adds_bos
    (tmp_path / "tokenizer.model").write_bytes((llama_like / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    tokens = from_folder(tmp_path)
    assert not tokens.adds_bos and (tokens.bos, tokens.eos) == ("<s>", "</s>")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 320}, "no byte pair encoding"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises Unicode .* \\(nmt_nfkc\\)"),
        ({"user_defined_symbols": ["<turn>"]}, "user-defined symbols \\(<turn>\\)"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(options, reason, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained_model(**options))
    with pytest.raises(DataError, match=reason) as refused:
        from_folder(tmp_path)
    assert "tokenizer.json" in str(refused.value)


def test_tokens_that_were_added_beside_a_model_are_refused(llama_like, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama_like / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 350}))
    with pytest.raises(DataError, match=r"add tokens that the model does not have \(\[PAD\]\)"):
        from_folder(tmp_path)


def test_without_the_library_the_package_is_named(llama_like, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"pip install 'longfire\[sentencepiece\]'"):
        from_folder(llama_like)


@pytest.mark.parametrize("content", [b"\n\x05broken", b"aGVsbG8= 0\nd29ybGQ= 1\n"])
def test_files_that_are_none(content, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Tokenizer.load(file)


def test_weights_with_a_sentencepiece_model_are_imported_trained_and_exported(
    llama_like, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 350}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    shutil.copy(llama_like / "tokenizer.model", "llama")
    assert main(["import", "llama", "run"]) == 0
    Path("text.txt").write_text("\n".join(LINES * 20))
    settings = ["--data.dataset=text.txt", "--training.steps=1", "--training.seq_len=16"]
    small = ["--training.compile=off", "--training.threads=1", "--eval.at_end=false"]
    assert main(["train", "run/run.toml", *settings, *small, "--metrics.report=false"]) == 0
    assert "BOS <s> before each document" in capsys.readouterr().out
    assert main(["export", "run", "exported"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained("exported")
    library = library_of(llama_like)
    for line in LINES:
        assert theirs(line)["input_ids"] == [library.bos_id(), *library.encode(line)]


def test_ring_attentions_word_for_the_file_begins_documents_with_bos(
    llama_like, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a text")
    file = llama_like / "tokenizer.model"
    words = {"tokenizer.vocab_file": str(file), "data.dataset": "text.txt"}
    run = Run.compose(None, words, needs_model=False)
    assert run.tokenizer.path == str(file) and run.tokenizer.add_bos


def test_a_model_in_the_hubs_cache_is_read_by_its_name(llama_like, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--words/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(llama_like / "tokenizer.model", snapshot)
    (tmp_path / "models--someone--words/refs").mkdir()
    (tmp_path / "models--someone--words/refs/main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tokens = Tokenizer.load("someone/words")
    assert tokens.fingerprint == from_folder(llama_like).fingerprint and tokens.adds_bos
