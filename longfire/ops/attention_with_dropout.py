"""Causal softmax attention some of whose weights are dropped: training on whole sequences.

Which weights stay is a hash of the query's noise, the head and the key's place (ops/dropout.py), so
that no plan and no resume changes it. torch's fused kernels draw masks of their own, in an order of
their own; so the forms are ours.
"""

from typing import Protocol

from torch import Tensor

from longfire.ops.attention import attention_reference
from longfire.ops.documents import Documents
from longfire.ops.forms import Forms


class DroppingAttentionOp(Protocol):
    """The signature of `attention_with_dropout` and its forms."""

    def __call__(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGV: Tensor,
        noise_BT: Tensor,
        *,
        dropout: float,
        window: int | None = None,
        documents: Documents | None = None,
        scale: float | None = None,
        first_head: int = 0,
    ) -> Tensor: ...


FORMS: Forms[DroppingAttentionOp] = Forms(
    "attention_with_dropout",
    reference="longfire.ops.attention_with_dropout:attention_with_dropout_reference",
    torch="longfire.ops.fast.attention_with_dropout:attention_in_query_blocks",
    triton="longfire.ops.fast.attention_kernels:attention_by_kernels",
    memory="longfire.ops.fast.triton_memory:attention",
)


def attention_with_dropout(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    noise_BT: Tensor,
    *,
    dropout: float,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    first_head: int = 0,
) -> Tensor:
    """dropped(causal softmax(q k^T * scale)) v -> (B, T, H, V). G key/value heads serve H heads.

    dropout: share of the weights that become 0; the others are divided by 1 - dropout. noise_BT:
    int32, of each query. first_head: the number of the first head here, of those of all processes.
    window: keys a query sees, itself included. documents: tokens see their own document. scale:
    K^-0.5 if None.
    """
    return FORMS.chosen()(
        q_BTHK,
        k_BTGK,
        v_BTGV,
        noise_BT,
        dropout=dropout,
        window=window,
        documents=documents,
        scale=scale,
        first_head=first_head,
    )


def attention_with_dropout_reference(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    noise_BT: Tensor,
    *,
    dropout: float,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    first_head: int = 0,
) -> Tensor:
    """The reference: all scores and the whole mask in memory. Same arguments and result."""
    return attention_reference(
        q_BTHK,
        k_BTGK,
        v_BTGV,
        window=window,
        documents=documents,
        scale=scale,
        dropout=dropout,
        noise_BT=noise_BT,
        first_head=first_head,
    )
