"""Softmax attention to one block of keys, in parts that join."""

from collections.abc import Callable

from torch import Tensor

from longfire.ops.attention import softmax_reference, visible
from longfire.ops.forms import Forms

PartsOp = Callable[..., tuple[Tensor, Tensor]]  # with the arguments of `attention_parts`
FORMS: Forms[PartsOp] = Forms(
    "attention",
    reference="longfire.ops.attention_parts:attention_parts_reference",
    torch="longfire.ops.fast.attention_parts:attention_parts_fused",
)


def attention_parts(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of queries to one block of keys, with what is needed to join blocks: o (B, T, H, V)
    and lse (B, H, T).

    Both fp32 (float64 for float64 inputs), so that joining many blocks does not round many times,
    and differentiable in both. lse = log sum exp of the scores. Parts of one softmax over keys in
    two blocks join as o = (exp(lse_1) o_1 + exp(lse_2) o_2) / (exp(lse_1) + exp(lse_2)) (Liu 2023,
    RingAttention; Milakov 2018).
    causal: T = S and query t sees keys 0 to t; else every query sees every key.
    """
    assert not causal or q_BTHK.shape[1] == k_BSGK.shape[1], "causal blocks are aligned"
    return FORMS.chosen()(q_BTHK, k_BSGK, v_BSGV, causal=causal, scale=scale)


def attention_parts_reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The reference: all scores written out. Same arguments and result."""
    T = q_BTHK.shape[1]
    S = k_BSGK.shape[1]
    return softmax_reference(
        q_BTHK, k_BSGK, v_BSGV, visible(T, S, None, None, q_BTHK.device) if causal else None, scale
    )
