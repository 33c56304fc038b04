"""Sampling by its probabilities, text in whole characters, stops, prompts; streams equal what is decoded at once."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.config.model_config import mixer_of
from longfire.config.options import Sampling
from longfire.data.tokenizer import bytes_tokenizer, train_tokenizer
from longfire.errors import CheckpointError, SettingsError
from longfire.generation.generate import (
    Continuation,
    Pace,
    Reader,
    draw,
    generate,
    generate_text,
    generate_texts,
    penalised,
    prompt_ids,
    steps,
    stream_text,
)
from longfire.mixers import MIXERS

pytestmark = pytest.mark.dtype

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
        (Sampling(temperature=1, top_k=0, min_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_k=3, min_p=0.76), [0, 1, 0, 0]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
    ],
)
def test_ids_are_drawn_by_their_probabilities(sampling, expected):
    observed = frequencies(sampling, torch.tensor([0.1, 0.4, 0.2, 0.3]).log())
    for seen, p in zip(observed.tolist(), expected):
        assert abs(seen - p) <= 4 * math.sqrt(
            p * (1 - p) / 4000
        )  # 4 standard deviations; never drawn where p = 0


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
    drawn = generate(
        model, [1], Sampling(max_new_tokens=60, temperature=5.0, top_k=0), vocab_size=40
    )
    assert max(drawn) < 40


def pushed(reader: Reader, ids: list[int]) -> list[str]:
    """What a reader shows, piece by piece."""
    shown = []
    for i in ids:
        shown.append(reader.push(i))
        if reader.ended:
            break
    return [text for text in [*shown, reader.rest()] if text]


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_streamed_text_is_the_text(kind, words):
    tokenizer = bytes_tokenizer() if kind == "bytes" else words
    ids = tokenizer.encode(TEXT)
    for start in (1, len(ids) // 2):
        streamed = pushed(Reader(tokenizer, ids[:start]), ids[start:])
        assert not any("\ufffd" in piece for piece in streamed)
        assert tokenizer.decode(ids[:start]) + "".join(streamed) == TEXT
        assert len(streamed) > 5


def test_bytes_that_never_become_a_character_are_shown_in_the_end():
    tokenizer = bytes_tokenizer()
    shown = pushed(Reader(tokenizer, [65]), [66, 0xE6, 0xBC])
    assert "".join(shown) == tokenizer.decode([65, 66, 0xE6, 0xBC])[1:]


@given(
    some.text("abc", max_size=12), some.lists(some.text("abc", min_size=1, max_size=3), max_size=3)
)
@settings(deadline=None)
def test_stops_cut_the_text(whole, stops):
    reader = Reader(bytes_tokenizer(), [0], tuple(stops))
    shown = "".join(pushed(reader, list(whole.encode())))
    ends = [whole.index(stop) for stop in stops if stop in whole]
    assert reader.ended == bool(ends)
    if not ends:
        assert shown == whole
    else:  # the first stop that is complete ends the text; another that began earlier may be completed by the same piece
        assert whole.startswith(shown) and any(whole.startswith(stop, len(shown)) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_what_cannot_begin_a_stop_is_shown_at_once():
    assert pushed(Reader(bytes_tokenizer(), [0], ("<|e",)), list(b"abcd<e<|x")) == [
        *"abcd",
        "<e",
        "<|x",
    ]


def test_text_and_stream_agree_and_eos_ends(model, words):
    sampling = Sampling(max_new_tokens=30, temperature=2.0, top_k=0, seed=3)
    text = generate_text(model, words, "the ", sampling)
    assert text == "".join(stream_text(model, words, "the ", sampling)) and text
    drawn = generate(model, words.encode("the "), sampling, vocab_size=words.vocab_size)
    until_eos = drawn[: drawn.index(words.eos_id)] if words.eos_id in drawn else drawn
    assert text == words.decode(until_eos)


def test_generation_prompts(words):
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
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop": ("",)},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"temperature": "hot"},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_logits_that_are_no_numbers_are_an_error():
    with pytest.raises(CheckpointError, match="NaN"):
        draw(torch.tensor([0.0, math.nan]), Sampling(), torch.Generator())


# What transformers does, on random logits.


def left_by_transformers(logits: torch.Tensor, *warpers) -> torch.Tensor:
    """Probabilities after its warpers."""
    scores = logits[None]
    for warper in warpers:
        scores = warper(torch.tensor([[0]]), scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p", [(1.0, 0, 1.0, 0.2), (0.7, 6, 0.8, 0.1), (1.3, 4, 0.9, 0.0)]
)
def test_probabilities_are_those_of_transformers(seed, temperature, top_k, top_p, min_p):
    from transformers.generation import logits_process as theirs

    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(seed))
    warpers = [theirs.TemperatureLogitsWarper(temperature)]
    warpers += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [theirs.MinPLogitsWarper(min_p)] if min_p else []
    expected = left_by_transformers(logits, *warpers)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    observed = frequencies(sampling, logits, 2000)
    for seen, p in zip(observed.tolist(), expected.tolist()):
        assert abs(seen - p) <= 4.5 * math.sqrt(p * (1 - p) / 2000)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 4.0])
def test_repetition_is_penalised_as_in_transformers(penalty):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(40, generator=torch.Generator().manual_seed(3))
    ids = torch.randint(40, (1, 15), generator=torch.Generator().manual_seed(4))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0]
    seen = torch.zeros(40, dtype=torch.bool)
    seen[ids[0]] = True
    assert torch.equal(penalised(logits, seen, penalty), expected)


def test_what_was_drawn_and_what_the_prompt_has_is_not_drawn_again_under_a_great_penalty(model):
    drawn = generate(
        model, [1, 2, 3], Sampling(max_new_tokens=30, temperature=0, repetition_penalty=1e6)
    )
    assert len({1, 2, 3, *drawn}) == 33


# Several prompts.

PROMPTS = ["the ", "naïve 漢字 and the end of the tabs and 12345", "e", "and\n\n  tabs", "12"]
KINDS = {
    **{name: ((name,), {}) for name in MIXERS},
    "window": (
        ("attention",),
        {"attention": {"num_heads": 4, "num_kv_heads": 1, "window_size": 6}},
    ),
    "hybrid": (
        ("gla", "attention:local", "attention", "gated_delta_net"),
        {"attention:local": {"num_heads": 4, "num_kv_heads": 2, "window_size": 5}},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def any_model(request):
    from conftest import MIXER_SETTINGS, tiny_model

    types, changed = KINDS[request.param]
    mixers = {name: changed.get(name) or MIXER_SETTINGS[mixer_of(name)] for name in types}
    plain = {"init_embedding": "initializer_range", "init_head": "initializer_range"}
    return tiny_model(
        *types, mixers=mixers, vocab_size=300, **plain
    )  # RWKV-7's own is too even to write much


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(max_new_tokens=14, temperature=0), marks=pytest.mark.slow),
        Sampling(
            max_new_tokens=14, temperature=1.5, top_k=0, seed=5, repetition_penalty=1.2, stop=("a",)
        ),
    ],
    ids=["greedy", "drawn"],
)
def test_a_row_of_a_batch_writes_what_it_writes_alone(any_model, words, sampling):
    alone = [
        "".join(stream_text(any_model, words, p, sampling, index=i)) for i, p in enumerate(PROMPTS)
    ]
    assert len(set(alone)) > 2
    for batch_size in (2, 5, 8):
        assert (
            list(generate_texts(any_model, words, PROMPTS, sampling, batch_size=batch_size))
            == alone
        )


def test_rows_that_are_over_leave_the_batch_and_get_no_token_more(any_model):
    rows = [
        Continuation([1, 2], Sampling(max_new_tokens=n, temperature=2.0, top_k=0), index=n)
        for n in (3, 9, 6)
    ]
    order = [(rows.index(row), drawn) for row, drawn in steps(any_model, rows)]
    assert [len([1 for number, _ in order if number == n]) for n in range(3)] == [3, 9, 6]
    assert [[drawn for number, drawn in order if number == n] for n in range(3)] == [
        row.ids[2:] for row in rows
    ]


def test_who_reads_may_end_a_row(any_model):
    rows = [
        Continuation([1, 2], Sampling(max_new_tokens=9)),
        Continuation([3], Sampling(max_new_tokens=9)),
    ]
    for row, _ in steps(any_model, rows):
        row.over = row.over or (row is rows[0] and row.drawn == 4)
    assert [row.drawn for row in rows] == [4, 9]


def test_memory_a_token_is_constant_where_the_mixer_has_a_state(any_model):
    """What --stats tells: cache bytes at the first token and at the last."""
    pace = Pace()
    for _ in steps(any_model, [Continuation([1] * 20, Sampling(max_new_tokens=60))], pace=pace):
        pass
    grows = any(
        mixer_of(name) == "attention" and not getattr(block.mixer.config, "window_size", 0)
        for name, block in zip(any_model.config.layer_types, any_model.layers)
    )
    assert (pace.last_bytes > pace.first_bytes) == grows
    assert (pace.prompt_tokens, pace.tokens, pace.steps) == (20, 59, 59) and pace.seconds > 0
    assert re.search(
        r"tokens/s, [\d.]+ ms a token; cache: [\d,]+ bytes at the first token", str(pace)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_rounded_once_give_the_same_text(dtype, any_model):
    from longfire.initialise import build
    from longfire.ops.linear import keep_rounded

    low = build(any_model.config, 0, "cpu", dtype)
    before = generate(low, [1, 2], Sampling(max_new_tokens=20, temperature=1.5))
    keep_rounded(low, dtype)
    assert generate(low, [1, 2], Sampling(max_new_tokens=20, temperature=1.5)) == before


def test_learned_positions_end():
    from conftest import tiny_model

    model = tiny_model("attention", learned_positions=True, max_position_embeddings=8)
    assert (
        len(generate(model, [1, 2], Sampling(max_new_tokens=7))) == 7
    )  # the last is drawn and not seen
    with pytest.raises(SettingsError, match="learned 8 positions"):
        generate(model, [1, 2], Sampling(max_new_tokens=8))
