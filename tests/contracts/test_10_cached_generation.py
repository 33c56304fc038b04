"""Promise 10: cached generation equals the full forward, for every mixer and hybrid, however the prompt is cut."""

import pytest
import torch
from golden import FLA_CASES, read
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from longfire.config.options import Sampling
from longfire.generation.generate import generate
from longfire.generation.steps import advance, feed
from longfire.huggingface.families import FAMILIES, config_from_hf
from longfire.huggingface.load import model_of
from longfire.huggingface.tensors import to_ours
from longfire.mixers import MIXERS
from longfire.mixers.cache_rows import memory_bytes, selected, stacked
from longfire.mixers.mixer import Cache, Sequence
from longfire.model import Model

TOKENS = 150  # more than two chunks of 64
VARIANTS = {
    **{name: ((name,), {}) for name in MIXERS},
    "windowed": (
        ("attention",),
        {"attention": {"num_heads": 4, "num_kv_heads": 1, "window_size": 7}},
    ),
    "norms of q and k": (
        ("gla", "attention", "gsa"),
        {
            "gla": {"qk_norm": True},
            "attention": {"num_heads": 2, "qk_norm": True},
            "gsa": {"qk_norm": True},
        },
    ),
    "gla without convolution": (
        ("gla",),
        {"gla": {"num_heads": 4, "num_kv_heads": 2, "use_output_gate": False}},
    ),
    "delta rule, value groups": (
        ("gated_delta_net",),
        {
            "gated_delta_net": {
                "num_heads": 2,
                "num_v_heads": 4,
                "head_dim": 8,
                "use_gate": False,
                "allow_neg_eigval": True,
            }
        },
    ),
    "retention, grouped heads": (
        ("retention",),
        {"retention": {"num_heads": 4, "num_kv_heads": 2, "use_output_gate": False}},
    ),
    "linear attention, normalised": (
        ("linear_attention",),
        {
            "linear_attention": {
                "num_kv_heads": 1,
                "feature_map": "elu",
                "norm_feature_map": True,
                "norm_k": True,
            }
        },
    ),
    "linear attention, eight features a channel": (
        ("linear_attention",),
        {"linear_attention": {"feature_map": "dpfp"}},
    ),
    "delta_net without activation": (
        ("delta_net",),
        {
            "delta_net": {
                "qk_activation": "none",
                "qk_norm": "sum",
                "use_beta": False,
                "use_gate": True,
            }
        },
    ),
    "delta_net without convolution": (
        ("delta_net",),
        {"delta_net": {"use_short_conv": False, "qk_activation": "elu"}},
    ),
    "kda, bounded, value groups": (
        ("kda",),
        {
            "kda": {
                "num_v_heads": 4,
                "expand_v": 2.0,
                "use_short_conv": False,
                "lower_bound": -5.0,
                "safe_gate": True,
            }
        },
    ),
    "hgrn2 without convolution": (
        ("hgrn2",),
        {"hgrn2": {"use_short_conv": False, "use_lower_bound": False}},
    ),
    "gsa without convolution": (
        ("gsa",),
        {"gsa": {"use_short_conv": False, "feature_map": "relu", "num_slots": 0}},
    ),
    "mamba2, the gate last": (
        ("mamba2",),
        {
            "mamba2": {
                "n_groups": 1,
                "norm_before_gate": True,
                "use_conv_bias": False,
                "dt_low": 0.01,
                "dt_high": 0.5,
            }
        },
    ),
    "rwkv7 behind another": (("gla", "rwkv7", "rwkv7"), {}),
    "samba": (("mamba", "attention"), {"attention": {"window_size": 7}}),
    "hybrid of all": (tuple(MIXERS), {}),
}


def cached_logits(model: Model, ids_BT: Tensor, cuts: list[int]) -> Tensor:
    """Logits (B, T, W) of chunks that end at the cuts, each seen after what the cache kept of those before."""
    cache, parts = Cache(), []
    for start, stop in zip([0, *cuts], [*cuts, ids_BT.shape[1]]):
        positions_BT = torch.arange(start, stop).expand(len(ids_BT), -1)
        parts.append(
            model.logits(model(ids_BT[:, start:stop], Sequence(positions_BT, cache=cache)))
        )
    return torch.cat(parts, 1)


def assert_equal_within_rounding(model: Model, cached_BTW: Tensor, full_BTW: Tensor) -> None:
    """Another order of fp32 sums: 2 additions to the residual stream a layer, each a sum of up to T + D terms whose roundings
    (2^-24) add like a random walk, relative to the largest logit; twice that, as both sides round, and four times for what
    norms of small vectors magnify (random ids reach 1.7 times the bound without it)."""
    terms = (full_BTW.shape[1] + model.config.hidden_size) ** 0.5
    tolerance = 4 * 2 * 2 * model.config.num_hidden_layers * terms * 2**-24 * full_BTW.abs().max()
    assert (cached_BTW - full_BTW).abs().max() <= tolerance


@pytest.fixture(scope="module", params=VARIANTS)
def model(request) -> Model:
    from conftest import MIXER_SETTINGS, tiny_model

    types, changed = VARIANTS[request.param]
    mixers = {name: {**MIXER_SETTINGS[name], **changed.get(name, {})} for name in types}
    return tiny_model(*types, mixers=mixers)


@torch.no_grad()
@given(some.data())
@settings(deadline=None, max_examples=3)
def test_any_split_then_token_by_token(model, data):
    cuts = sorted(data.draw(some.sets(some.integers(1, TOKENS - 21), max_size=4), label="cuts"))
    ids_BT = torch.randint(97, (2, TOKENS), generator=torch.Generator().manual_seed(len(cuts)))
    full_BTW = model.logits(model(ids_BT))
    token_by_token = list(range(TOKENS - 20, TOKENS))
    assert_equal_within_rounding(
        model, cached_logits(model, ids_BT, [*cuts, *token_by_token]), full_BTW
    )


@torch.no_grad()
def test_token_by_token_from_the_first(model):
    ids_BT = torch.randint(97, (1, 80), generator=torch.Generator().manual_seed(1))
    full_BTW = model.logits(model(ids_BT))
    assert_equal_within_rounding(model, cached_logits(model, ids_BT, list(range(1, 80))), full_BTW)


@torch.no_grad()
def test_greedy_generation_follows_the_full_forward(model):
    prompt = torch.randint(97, (5,), generator=torch.Generator().manual_seed(2)).tolist()
    drawn = generate(model, prompt, Sampling(max_new_tokens=12, temperature=0))
    assert len(drawn) == 12
    logits_TW = model.logits(model(torch.tensor([prompt + drawn])))[0]
    for place, chosen in enumerate(drawn, len(prompt) - 1):
        likeliest = logits_TW[place].max()
        assert (
            logits_TW[place, chosen] >= likeliest - 1e-4 * likeliest.abs()
        )  # a tie may fall either way


@pytest.mark.parametrize("case", FLA_CASES)
@torch.no_grad()
def test_weights_of_fla_token_by_token_equal_flas_own_full_forward(case):
    golden = read(case)
    shape, family = config_from_hf(golden.config, case), FAMILIES[golden.config["model_type"]]
    model = model_of(shape, to_ours(family, shape, golden.weights))
    cached_BTW = cached_logits(model, golden.ids_BT, list(range(30, golden.ids_BT.shape[1])))
    assert (cached_BTW - golden.logits_BTW).abs().max() <= 1e-4 * golden.logits_BTW.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length(kind):
    """Beyond the original length they change for all tokens at once: each next token equals a full forward of what is there."""
    from conftest import tiny_model

    divisors = {"rope_short_factor": (1.0, 1.1, 1.2, 1.3), "rope_long_factor": (1.0, 2.0, 3.0, 4.0)}
    settings_ = {"num_heads": 4, "rope": kind, "rope_factor": 4.0, "rope_original_length": 16}
    settings_ |= divisors if kind == "longrope" else {}
    model = tiny_model(
        "gla",
        "attention",
        num_hidden_layers=4,
        mixers={"attention": settings_, "gla": {"num_heads": 2}},
    )
    ids_BT = torch.randint(97, (2, 50), generator=torch.Generator().manual_seed(4))
    cached_BTW = cached_logits(model, ids_BT, [10, *range(12, 50)])
    for length in range(12, 51):
        full_BTW = model.logits(model(ids_BT[:, :length]))[:, -1:]
        assert_equal_within_rounding(model, cached_BTW[:, length - 1 : length], full_BTW)


@torch.no_grad()
def test_a_batch_of_texts_of_which_some_outgrow_the_original_length():
    """Rows of different lengths together: each as if it were alone, also once the longest has left."""
    from conftest import tiny_model

    settings_ = {"num_heads": 4, "rope": "dynamic", "rope_factor": 4.0, "rope_original_length": 16}
    model = tiny_model("attention", num_hidden_layers=2, mixers={"attention": settings_})
    ids = [
        torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in (5, 14, 20)
    ]
    caches = [Cache() for _ in ids]
    for text, cache in zip(ids, caches):
        feed(model, text, cache)
    together, going = stacked(caches), [0, 1, 2]
    for step in range(6):
        if step == 3:
            together, going = selected(together, [0, 1]), [0, 1]
        for row in going:
            ids[row].append(step + row)
        got_BW = advance(model, [ids[row][-1] for row in going], together)
        for row, got_W in zip(going, got_BW):
            true_W = model.logits(model(torch.tensor([ids[row]])))[0, -1]
            assert_equal_within_rounding(model, got_W[None, None], true_W[None, None])


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_memory_is_constant_where_the_mixer_has_a_state(name):
    from conftest import MIXER_SETTINGS, tiny_model

    types, changed = VARIANTS[name]
    model = tiny_model(
        *types, mixers={n: {**MIXER_SETTINGS[n], **changed.get(n, {})} for n in types}
    )
    cache, sizes = Cache(), []
    for _ in range(3):
        feed(model, [1] * 30, cache)
        sizes.append(memory_bytes(cache))
    grows = "attention" in types and not changed.get("attention", {}).get("window_size")
    assert (sizes[0] < sizes[1] < sizes[2]) if grows else (sizes[0] == sizes[1] == sizes[2])
