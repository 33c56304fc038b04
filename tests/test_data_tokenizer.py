"""Tokenizers: the same ids here, in transformers and when a long text is cut; ends by name; the same training every time."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from logged import logged_to
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from longfire.config import settings
from longfire.data import text, tokenizer
from longfire.data.tokenizer import Tokenizer, bytes_tokenizer, from_folder, train_tokenizer
from longfire.data.tokenizer_training import load, sample
from longfire.data.validation import ValidationSplit, is_validation
from longfire.errors import DataError, SettingsError

TEXTS = [
    "",
    " ",
    "plain words",
    "def f(x):\n    return x  # ünï 三四 🔥\n\n",
    "<eos> is text <bos>",
    "\r\n\ttabs\x00",
    "a" * 300,
]


@pytest.fixture(scope="module")
def library() -> list[str]:
    (source,) = text.sources(settings.Data())
    return [document.text for document, _ in zip(source.documents(), range(60))]


@pytest.fixture(scope="module")
def trained(library) -> Tokenizer:
    return train_tokenizer(library, 600)


@pytest.fixture(params=["bytes", "train"])
def either(request, trained) -> Tokenizer:
    return bytes_tokenizer() if request.param == "bytes" else trained


def test_saved_it_is_the_same_here_and_in_transformers(either, tmp_path):
    either.save(tmp_path / "t")
    ours, theirs = from_folder(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")
    assert ours.fingerprint == either.fingerprint and type(ours) is type(either)
    assert (ours.bos, ours.eos) == (theirs.bos_token, theirs.eos_token) == ("<bos>", "<eos>")
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert len(theirs) == ours.vocab_size
    for content in TEXTS:
        ids = either.encode(content)
        assert ids == ours.encode(content) and either.decode(ids) == content
        assert ids == theirs(content, split_special_tokens=True)["input_ids"]
        assert theirs.decode(ids) == content


def test_bytes_are_bytes():
    tokens = bytes_tokenizer()
    assert (
        tokens.encode("hé") == list("hé".encode())
        and tokens.vocab_size == 258
        and tokens.dtype == "uint16"
    )
    slow = Tokenizer(tokens.backend, "<bos>", "<eos>")
    assert [slow.encode(t) for t in TEXTS] == [tokens.encode(t) for t in TEXTS]


@hypothesis_settings(deadline=None, max_examples=50)
@given(content=st.text())
def test_any_text_comes_back(trained, content):
    ids = trained.encode(content)
    assert trained.decode(ids) == content and not {trained.bos_id, trained.eos_id} & set(ids)


def test_training_is_the_same_every_time(library, trained):
    assert train_tokenizer(iter(library), 600).fingerprint == trained.fingerprint
    assert trained.vocab_size == 600


PATTERNS = {  # how the families split text before they merge
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("family", [*PATTERNS, "metaspace"])
def test_a_long_text_in_pieces_has_the_same_ids(family, library, monkeypatch):
    long = "\n".join(library)[:400_000]
    words = Backend(models.BPE(unk_token="?"))
    if family == "metaspace":  # marks the beginning of a text: no cut is allowed
        words.pre_tokenizer = pre_tokenizers.Metaspace()
        words.normalizer = normalizers.NFKC()
    else:
        split = pre_tokenizers.Split(Regex(PATTERNS[family]), "isolated")
        words.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    words.train_from_iterator(
        library, trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=["?"])
    )
    tokens = Tokenizer(words)
    whole = tokens.backend.encode(long, add_special_tokens=False).ids
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 5_000)
    cuts = list(tokens.cuts(long))
    assert (len(cuts) == 0) if family == "metaspace" else (len(cuts) > 10)
    assert tokens.encode_batch([long, "short"])[0] == whole


def words_with(*special: str) -> Backend:
    words = bytes_tokenizer().backend
    words.add_special_tokens([AddedToken(name, special=True) for name in special])
    return words


def loaded(path, **wanted) -> Tokenizer:
    data = settings.Data()
    return load(settings.Tokenizer(path=str(path), **wanted), (), (), data)


def test_ends_are_found_by_name(tmp_path):
    (tmp_path / "tokenizer.json").write_text(words_with("</s>", "<s>").to_str())
    assert (loaded(tmp_path).bos, loaded(tmp_path).eos) == ("<bos>", "<eos>"), (
        "the well-known names"
    )
    config = {"eos_token": {"content": "</s>", "special": True}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = loaded(tmp_path / "tokenizer.json")
    assert (tokens.bos_id, tokens.eos_id) == (None, 258)
    with pytest.raises(DataError, match=r"no bos token; set tokenizer\.add_bos = false"):
        loaded(tmp_path, add_bos=True)


def test_a_tokenizer_without_an_end_says_so(tmp_path):
    words = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    (tmp_path / "tokenizer.json").write_text(words.to_str())
    with pytest.raises(DataError, match=r"no eos token; set tokenizer\.add_eos = false"):
        loaded(tmp_path)
    assert loaded(tmp_path, add_eos=False).vocab_size == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/none.json", "no such file or folder"),
        ("./none", "no such file or folder"),
        ("{tmp}/bad.json", "not a tokenizer.json"),
        ("{tmp}/other.json", "not a tokenizer.json"),
        ("{tmp}/empty", "no tokenizer.json and no SentencePiece tokenizer.model in this folder"),
        ("no-such-owner/no-such-model", "cannot be had"),
    ],
)
def test_tokenizers_that_are_none(path, message, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        loaded(path.format(tmp=tmp_path))


def test_more_words_than_sixteen_bits():
    words = Backend(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = Tokenizer(words)
    assert tokens.dtype == "uint32" and tokens.encode("w69999 w1") == [69999, 1]


def test_a_sample_comes_from_all_over_and_never_from_what_is_held_out(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03d}.txt").write_text(f"{i:03d} " * 250)
    (source,) = text.sources(settings.Data(dataset=(str(tmp_path),)))
    chosen = list(sample(source, 64_000, ValidationSplit(0.3)))
    numbers = [int(t[:3]) for t in chosen]
    assert chosen == list(sample(source, 64_000, ValidationSplit(0.3))), "the same every time"
    assert sum(map(len, chosen)) == 64_000
    assert max(numbers) - min(numbers) > 150
    assert not any(is_validation(f"{n:03d}.txt", 0.3) for n in numbers)
    assert sum(map(len, sample(source, 10**9, ValidationSplit(0.0)))) == 200 * 1000, (
        "no more than there is"
    )


def test_trained_once_for_the_same_text(tmp_path):
    (tmp_path / "a.txt").write_text("some text to learn from, again and again\n" * 200)
    data = settings.Data(
        dataset=(str(tmp_path / "a.txt"),), folder=str(tmp_path / "stores"), validation_fraction=0.0
    )
    wanted = settings.Tokenizer(path="train", train_vocab_size=300)
    said = []
    with logged_to(said):
        first, again = (load(wanted, text.sources(data), (1.0,), data) for _ in range(2))
    assert first.fingerprint == again.fingerprint and len(said) == 1
    with pytest.raises(SettingsError, match="at least 258"):
        load(
            settings.Tokenizer(path="train", train_vocab_size=100),
            text.sources(data),
            (1.0,),
            data,
        )


def test_broken_files_of_a_tokenizer_are_named(tmp_path):
    bytes_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match="tokenizer_config.json: not valid JSON"):
        loaded(tmp_path)
    for broken in ('{"model": 1}', '{"model": {"type": "of tomorrow"}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(DataError, match="tokenizer.json: not a tokenizer.json"):
            loaded(tmp_path)


def test_held_out_is_a_share_of_identities():
    chosen = np.array([is_validation(f"file.jsonl:{i}", 0.1) for i in range(20_000)])
    assert abs(chosen.mean() - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    assert not any(is_validation(f"file.jsonl:{i}", 0.0) for i in range(100))


def test_a_sentencepiece_model_without_its_library_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n\x05<unk>")
    for path in (file, tmp_path):
        with pytest.raises(DataError, match=r"pip install 'longfire\[sentencepiece\]'") as refused:
            loaded(path)
        assert "tiktoken" not in str(refused.value)


def test_ranks_of_tiktoken_are_no_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"aGVsbG8= 0\nd29ybGQ= 1\n")
    with pytest.raises(DataError, match=r"Llama 3 has ranks .*name the tokenizer\.json"):
        loaded(tmp_path / "tokenizer.model")
