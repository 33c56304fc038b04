"""Sampling by its probabilities, text in whole characters, stops, prompts; streams equal what is decoded at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.data.tokenizer import bytes_tokenizer, train_tokenizer
from longfire.errors import SettingsError
from longfire.generate import (
    Sampling,
    draw,
    generate,
    generate_text,
    main,
    pieces,
    prompt_ids,
    stream_text,
    until_stop,
)
from longfire.hub.convert import export

TEXT = "naïve 漢字 🙂 and\n\n  tabs\tand 12345 the the the end"


@pytest.fixture(scope="module")
def words():
    return train_tokenizer([TEXT * 3], 300)


@pytest.fixture(scope="module")
def model():
    from conftest import tiny_model

    return tiny_model("gla", "attention", vocab_size=300)


def frequencies(sampling: Sampling, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw(logits, sampling, chance) for _ in range(draws)])
    return drawn.bincount(minlength=len(logits)) / draws


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(temperature=1, top_k=0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=1, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_k=0, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_k=0, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=0.5, top_k=0), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        (Sampling(temperature=1, top_k=0, top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
    ],
)
def test_ids_are_drawn_by_their_probabilities(sampling, expected):
    observed = frequencies(sampling, torch.tensor([0.1, 0.4, 0.2, 0.3]).log())
    for seen, p in zip(observed.tolist(), expected):
        assert abs(seen - p) <= 4 * math.sqrt(p * (1 - p) / 4000)  # 4 standard deviations; never drawn where p = 0


def test_an_id_without_probability_is_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert frequencies(Sampling(temperature=1, top_k=0), logits, 200).tolist() == [0, 1, 0]


def test_the_seed_decides(model):
    one, two = (generate(model, [1, 2], Sampling(max_new_tokens=20, seed=seed)) for seed in (1, 2))
    assert one == generate(model, [1, 2], Sampling(max_new_tokens=20, seed=1)) != two


def test_a_stop_id_ends_and_is_left_out(model):
    all_ids = generate(model, [1, 2], Sampling(max_new_tokens=20))
    cut = all_ids.index(all_ids[7])
    assert generate(model, [1, 2], Sampling(max_new_tokens=20), [all_ids[7]]) == all_ids[:cut]


def test_padded_words_are_never_drawn(model):
    drawn = generate(model, [1], Sampling(max_new_tokens=60, temperature=5.0, top_k=0), words=40)
    assert max(drawn) < 40


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_streamed_text_is_the_text(kind, words):
    tokenizer = bytes_tokenizer() if kind == "bytes" else words
    ids = tokenizer.encode(TEXT)
    for start in (1, len(ids) // 2):
        streamed = list(pieces(tokenizer, ids[:start], ids[start:]))
        assert not any("\ufffd" in piece for piece in streamed)
        assert tokenizer.decode(ids[:start]) + "".join(streamed) == TEXT
        assert len(streamed) > 5


def test_bytes_that_never_become_a_character_are_shown_in_the_end():
    tokenizer = bytes_tokenizer()
    assert "".join(pieces(tokenizer, [65], [66, 0xE6, 0xBC])) == tokenizer.decode([65, 66, 0xE6, 0xBC])[1:]


@given(some.lists(some.text("abc", max_size=4)), some.lists(some.text("abc", min_size=1, max_size=3), max_size=3))
@settings(deadline=None)
def test_stops_cut_the_text_wherever_the_pieces_end(texts, stops):
    whole = "".join(texts)
    shown = "".join(until_stop(texts, tuple(stops)))
    ends = [whole.index(stop) for stop in stops if stop in whole]
    if not ends:
        assert shown == whole
    else:  # the first stop that is complete ends the text; another that began earlier may be completed by the same piece
        assert whole.startswith(shown) and any(whole.startswith(stop, len(shown)) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_what_cannot_begin_a_stop_is_shown_at_once():
    assert list(until_stop(["ab", "c", "d<", "e", "<|", "x"], ("<|e",))) == ["ab", "c", "d", "<e", "<|x"]


def test_text_and_stream_agree_and_eos_ends(model, words):
    sampling = Sampling(max_new_tokens=30, temperature=2.0, top_k=0, seed=3)
    text = generate_text(model, words, "the ", sampling)
    assert text == "".join(stream_text(model, words, "the ", sampling)) and text
    drawn = generate(model, words.encode("the "), sampling, words=words.vocab_size)
    until_eos = drawn[: drawn.index(words.eos_id)] if words.eos_id in drawn else drawn
    assert text == words.decode(until_eos)


def test_prompts(words):
    tokenizer = bytes_tokenizer()
    assert prompt_ids(tokenizer, "ab") == [97, 98]
    assert prompt_ids(tokenizer, "ab", add_bos=True) == [256, 97, 98]
    assert prompt_ids(tokenizer, "") == [256]  # as a document begins
    bare = bytes_tokenizer()
    bare.bos, bare.eos = "", ""
    with pytest.raises(SettingsError, match="prompt is empty"):
        prompt_ids(bare, "")


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"stop": ("",)}],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_from_a_folder_of_hugging_face_weights(model, words, tmp_path, capsys):
    export(model, words, tmp_path / "hf")
    assert main(tmp_path / "hf", ["the ", "end"], Sampling(max_new_tokens=8)) == 0
    expected = [p + generate_text(model, words, p, Sampling(max_new_tokens=8)) for p in ("the ", "end")]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)
