"""Rotary positions against transformers' own, and by what they are: rotations whose angle depends on distance alone."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from longfire.ops.rope import Rotary, rotate, rotate_reference

pytestmark = pytest.mark.dtype

THETA = 10000.0


def rope(x_BTHK: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    return rotate(x_BTHK, *Rotary(x_BTHK.shape[-1], theta).turns(positions_BT))


LONGROPE = {
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.01 * i for i in range(16)],
    "long_factor": [1.0 + 0.9 * i for i in range(16)],
}


@pytest.mark.parametrize(
    "scaling, settings",
    [
        ("default", {}),
        ("longrope", {"factor": 4.0, **LONGROPE}),
        ("longrope", {"factor": 4.0, "attention_factor": 1.3, **LONGROPE}),
        ("linear", {"factor": 4.0}),
        ("dynamic", {"factor": 4.0}),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 64}),
        (
            "yarn",
            {
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 0.7,
                "truncate": False,
            },
        ),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)
@pytest.mark.parametrize("tokens", [40, 64, 65, 300, 200_000])
def test_scalings_are_those_of_transformers(scaling, settings, tokens):
    """To the bit, but for dynamic beyond its length, where their base is a Python number."""
    parameters = {"rope_type": scaling, "rope_theta": THETA, **settings}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters=parameters,
    )
    positions_BT = torch.arange(tokens)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions_BT)
    ours = {
        name.replace("original_max_position_embeddings", "original_length"): value
        for name, value in settings.items()
    }
    ours |= {name: tuple(ours[name]) for name in ("short_factor", "long_factor") if name in ours}
    rotary = Rotary(32, THETA, scaling, **{"original_length": 64, **ours})
    ours_cos, ours_sin = rotary.turns(positions_BT, torch.full_like(positions_BT, tokens))
    for mine, theirs in ((ours_cos, cos), (ours_sin, sin)):
        if (
            scaling == "dynamic" and tokens > 64
        ):  # an angle of `tokens` radians has 2^-23 of it as its last bit
            torch.testing.assert_close(
                mine[:, :, 0], theirs[..., :16], rtol=0, atol=tokens * 2**-21
            )
        else:
            assert torch.equal(mine[:, :, 0], theirs[..., :16])


def test_channels_beyond_the_turned_ones_stay():
    x_BTHK, positions_BT = torch.randn(1, 5, 2, 16), torch.arange(5)[None]
    y_BTHK = rotate(x_BTHK, *Rotary(8).turns(positions_BT))
    assert y_BTHK[..., 8:].equal(x_BTHK[..., 8:])
    torch.testing.assert_close(y_BTHK[..., :8], rope(x_BTHK[..., :8], positions_BT, THETA))


def test_is_llamas_in_value_and_gradient():
    """fp32 angles up to 3000: both sides round the angle alike, so what is left is three roundings of the turned pair."""
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    x_BTHK = torch.randn(2, 6, 4, 8, requires_grad=True)
    positions_BT = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 7, 3000, 3001]])
    cos, sin = LlamaRotaryEmbedding(config)(x_BTHK, positions_BT)
    true = apply_rotary_pos_emb(x_BTHK.transpose(1, 2), x_BTHK.transpose(1, 2), cos, sin)[
        0
    ].transpose(1, 2)
    got, seed = rope(x_BTHK, positions_BT, THETA), torch.randn(2, 6, 4, 8)
    for a, b in ((got, true), *zip(*(torch.autograd.grad(y, x_BTHK, seed) for y in (got, true)))):
        torch.testing.assert_close(a, b, rtol=0, atol=2**-20)


def test_lengths_stay_and_scores_depend_on_distance():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    score = lambda at, to: (
        rope(q, torch.tensor([[at]]), THETA) * rope(k, torch.tensor([[to]]), THETA)
    ).sum()
    torch.testing.assert_close(
        score(5, 2), score(105, 102), rtol=0, atol=1e-4
    )  # angles are fp32: 2^-24 * 105
    torch.testing.assert_close(
        rope(q, torch.tensor([[977]]), THETA).norm(), q.norm(), rtol=1e-6, atol=0
    )


def test_position_zero_turns_nothing_and_dtypes_stay():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(1, 1, 2, 6, dtype=dtype)
        assert torch.equal(rope(x, torch.zeros(1, 1, dtype=torch.long), THETA), x)


def test_gradcheck():
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, torch.tensor([[0, 1, 5]]), THETA), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 6])  # all channels turn, or the first of them
def test_equals_its_reference_forward_and_backward(size, dtype):
    """The same three operations; only a product and a sum may be one rounding instead of two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator).to(dtype).requires_grad_()
    seed = torch.randn(2, 5, 3, 8, generator=generator).to(dtype)
    turns = Rotary(size).turns(torch.arange(5).expand(2, -1))
    found = []
    for form in (rotate, rotate_reference):
        y = form(x, *turns)
        found.append([y, *torch.autograd.grad(y, x, seed)])
    for fast, true in zip(*found):
        assert fast.dtype == true.dtype
        assert (fast - true).abs().max() <= 2 * torch.finfo(dtype).eps * true.abs().max()
