"""evaluate.py: loss and bits per byte against a count by hand, by position too, and the bytes of every kind of word."""

import json
import lzma
import math

import numpy as np
import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from longfire.config import settings as all_settings
from longfire.data.batches import Batches
from longfire.data.prepare import prepare
from longfire.data.tokenizer import Tokenizer, bytes_tokenizer, train_tokenizer
from longfire.evaluation.evaluate import (
    Measured,
    byte_lengths,
    evaluate,
    measure_validation,
    token_bytes,
    validation_bytes,
    xz_bits_per_byte,
)

pytestmark = pytest.mark.dtype

T = 16


@pytest.fixture
def batches(tmp_path):
    """Two sources of bytes; one has validation documents."""
    for name, count in (("many", 60), ("one", 1)):
        lines = [
            json.dumps({"text": f"{name} {i}: naïve fire " + "ab" * (i % 5)}) for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = all_settings.Data(
        dataset=(f"{tmp_path}/many.jsonl", f"{tmp_path}/one.jsonl"),
        folder=f"{tmp_path}/stores",
        validation_fraction=0.2,
        num_workers=1,
        prefetch_factor=0,
    )
    with (
        prepare(data, all_settings.Tokenizer(path="bytes")) as prepared,
        Batches(prepared, data, T, seed=0) as made,
    ):
        yield made


def test_the_numbers_are_those_counted_by_hand(batches, tiny_model):
    model = tiny_model("gla", "attention", vocab_size=258)
    results = evaluate(model, batches, tokens=100_000, chunk_tokens=7)
    assert list(results) == ["many.jsonl"], "a source without validation documents is left out"
    found = results["many.jsonl"]
    nats, labels = 0.0, []
    for batch in batches.validation_batches(0, 100_000, count=1):
        logits_BTW = model.logits(model(batch.ids_BT))
        nats += F.cross_entropy(
            logits_BTW.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum"
        ).item()
        labels += [label for label in batch.labels_BT.flatten().tolist() if label != -100]
    size = sum(label < 256 for label in labels)  # EOS costs nats and is no byte
    assert size < len(labels) == found["tokens"] and found["bytes"] == size
    assert found["loss"] == pytest.approx(nats / len(labels), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(labels)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_evaluation_leaves_no_gradients_and_reads_at_most_so_many_tokens(batches, tiny_model):
    model = tiny_model("attention", vocab_size=258)
    results = evaluate(model, batches, tokens=50, chunk_tokens=64)
    assert results["many.jsonl"]["tokens"] == 49  # of 50 the first has nothing before it
    assert all(p.grad is None for p in model.parameters())


def test_xz_sees_the_very_bytes_that_were_predicted(batches):
    text = validation_bytes(batches, "many.jsonl", 100_000)
    first, *rest = batches.validation_text(0, 100_000)
    assert text.decode() == "".join(rest) and first == "m"
    assert xz_bits_per_byte(text) == 8 * len(
        lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    ) / len(text)
    assert math.isnan(xz_bits_per_byte(b""))


BPE = train_tokenizer(
    ["def f(x):\n    return 'naïve 漢字' # <eos> 🙂\n" * 9, "the fire of the firemen"], 300
)


@given(some.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_bytes_of_words_add_up_to_the_text(text):
    """Also where a word is half a character."""
    for tokenizer in (BPE, bytes_tokenizer()):
        table = token_bytes(tokenizer)
        ids = tokenizer.encode(text)
        assert b"".join(table[i] for i in ids) == text.encode()
        assert byte_lengths(tokenizer)[np.array(ids, int)].sum() == len(text.encode())


def test_special_words_have_no_bytes_and_words_added_by_hand_their_own():
    words = Backend.from_str(BPE.backend.to_str())
    words.add_tokens([AddedToken("<tab>", special=False)])
    tokenizer = Tokenizer(words, BPE.bos, BPE.eos, "here")
    table = token_bytes(tokenizer)
    assert table[tokenizer.eos_id] == table[tokenizer.bos_id] == b""
    assert table[words.token_to_id("<tab>")] == b"<tab>"


def test_words_of_sentencepiece():
    vocabulary = {
        "<unk>": 0,
        **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)},
        "▁fire": 257,
        "▁": 258,
        "man": 259,
    }
    words = Backend(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True))
    words.normalizer = normalizers.Replace(" ", "▁")
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    table = token_bytes(Tokenizer(words, "", "", "here"))
    assert (table[257], table[258], table[259], table[11]) == (b" fire", b" ", b"man", b"\n")
    text = "é\n"  # no word of the vocabulary: bytes
    assert b"".join(table[i] for i in words.encode(text).ids) == text.encode()


def test_losses_by_position(batches, tiny_model):
    """Every label stands in the bucket of the tokens before it, and all buckets together are the loss."""
    model = tiny_model("attention", vocab_size=258)
    found = measure_validation(model, batches, 100_000, 64)["many.jsonl"]
    nats_C = np.zeros(T)
    for batch in batches.validation_batches(0, 100_000, count=1):
        logits_BTW = model.logits(model(batch.ids_BT)).detach()
        nats_C += F.cross_entropy(
            logits_BTW.flatten(0, 1), batch.labels_BT.flatten(), reduction="none"
        ).numpy()
    np.testing.assert_allclose(found.nats_C, nats_C, rtol=1e-5)
    buckets = found.by_position()
    assert [(b["from"], b["to"]) for b in buckets] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 16)]
    assert sum(b["tokens"] for b in buckets) == found.tokens
    assert buckets[2]["loss"] == pytest.approx(
        nats_C[3:7].sum() / found.count_C[3:7].sum(), rel=1e-5
    )


def test_buckets_without_a_token_are_left_out():
    measured = Measured(np.array([1.0, 0.0, 0.0, 6.0]), np.array([1, 0, 0, 3]), 9)
    assert measured.by_position() == [
        {"from": 1, "to": 1, "loss": 1.0, "tokens": 1},
        {"from": 4, "to": 4, "loss": 2.0, "tokens": 3},
    ]


def test_bits_per_byte_counts_the_bytes_of_documents(tmp_path):
    """A tokenizer that loses two of three bytes does not make them disappear from the count; a cut document counts by its share."""
    from longfire.data.store_writer import StoreWriter
    from longfire.data.token_record import TokenRecord
    from longfire.data.tokens import TokenStore

    header = {"source": {}, "tokenizer": {"fingerprint": "t"}, "options": {}, "dtype": "uint16"}
    (tmp_path / "s").mkdir()
    writer = StoreWriter(tmp_path / "s", header)
    writer.append("train", TokenRecord(np.arange(20) % 3, np.array([10, 10])), np.array([30, 60]))
    writer.commit({}, complete=True)
    writer.close()
    stream, lengths_W = TokenStore(tmp_path / "s").train, np.ones(3, np.int64)
    measured = Measured(np.ones(1), np.array([20]), 20)
    assert measured.of_documents(stream, 20, lengths_W).bytes == 90
    assert measured.of_documents(stream, 10, lengths_W).bytes == 60
    assert measured.of_documents(stream, 15, lengths_W).bytes == 90
    assert measured.of_documents(stream, 20, 0 * lengths_W).bytes == 90
