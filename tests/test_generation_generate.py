"""The seed, stops and prompts; batches, caches and streams equal what is computed at once."""

import re

import pytest
import torch

from longfire.config.model_config import mixer_of
from longfire.config.options import Sampling
from longfire.data.tokenizer import bytes_tokenizer, train_tokenizer
from longfire.errors import SettingsError
from longfire.generation.continuation import Continuation
from longfire.generation.generate import (
    generate,
    generate_text,
    generate_texts,
    prompt_ids,
    stream_text,
)
from longfire.generation.steps import Pace, steps
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


# What transformers does, on random logits.


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
    from longfire.ops.rounded_weights import keep_rounded

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
