"""Softmax attention by torch's fused kernels (ops/attention.py).

What the kernels cannot see is left out by cutting, not by a mask of T x T: documents one by one,
windows in blocks of queries with the keys that the block can see.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.attention import visible
from longfire.ops.attention_blocks import attention_in_blocks
from longfire.ops.attention_with_dropout import attention_with_dropout
from longfire.ops.bf16 import native_bf16
from longfire.ops.documents import Documents
from longfire.ops.forms import LazyFunction

# queries that share a slice of keys where a mask is needed: its size is BLOCK x (BLOCK + window)
BLOCK = 256
VARLEN_ATTENTION: LazyFunction[Callable[..., tuple[Tensor, Tensor]]] = LazyFunction(
    "longfire.ops.fast.varlen_attention:varlen_attention"
)


def attention_fused(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    noise_BT: Tensor | None = None,
    skip_B: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """Dropout is an op of its own: masks of the fused kernels depend on the order in which they
    draw. bf16 on a CPU without bf16 units is multiplied in fp32 (torch's bf16 backward takes 5x the
    time there)."""
    T = q_BTHK.shape[1]
    S = k_BSGK.shape[1]
    if dropout > 0 and noise_BT is not None:
        assert S == T, "dropout is for training, on whole rows"
        return attention_with_dropout(
            q_BTHK,
            k_BSGK,
            v_BSGV,
            noise_BT,
            dropout=dropout,
            window=window,
            documents=documents,
            scale=scale,
            first_head=first_head,
        )
    window = None if window is not None and window >= S else window
    q = multipliable(q_BTHK)
    k = multipliable(k_BSGK)
    v = multipliable(v_BSGV)
    if documents is not None and T == S and skip_B is None and has_varlen_kernel(q, v):
        o_BTHV = whole_documents(q, k, v, documents, window, scale)
    elif documents is not None:
        o_BTHV = packed(q, k, v, documents, window, scale, skip_B)
    elif (
        window is not None and T == S and skip_B is None and has_varlen_kernel(q, v)
    ):  # it skips what a window hides
        row_ends = torch.arange(0, len(q) * T + 1, T, dtype=torch.int32, device=q.device)
        o_BTHV = varlen(
            q, k.flatten(0, 1), v.flatten(0, 1), (row_ends, row_ends), (T, T), window, scale
        )
    else:
        o_BTHV = one_document(q, k, v, window, scale, skip_B)
    return o_BTHV.to(q_BTHK.dtype)


def multipliable(x: Tensor) -> Tensor:
    """x as it is, or in fp32 where the device has no units for its dtype."""
    if x.dtype == torch.bfloat16 and not native_bf16(x.device):
        return x.float()
    return x


def whole_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Sequences of several documents, all of whose keys are here: one kernel, one operator of a
    graph that serves other documents too."""
    o_ND, _ = VARLEN_ATTENTION.get()(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        documents.cu_lengths,
        documents.cu_lengths_cpu,
        -1 if window is None else window - 1,
        scale,
    )
    return o_ND.unflatten(0, q.shape[:2])


@torch.compiler.disable(
    reason=(
        "the lengths of documents differ from batch to batch: a graph of them would be made anew "
        "each time"
    )
)
def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    window: int | None,
    scale: float | None,
    skip_B: Tensor | None = None,
) -> Tensor:
    """Sequences of several documents, each seeing itself only: one call of a varlen kernel, or
    document by document.

    The sequences are laid end to end, split where documents end, and joined again, so that nothing
    is paid for what is not seen.
    """
    (B, T), S = q.shape[:2], k.shape[1]
    k_ND = k.flatten(0, 1)
    v_ND = v.flatten(0, 1)
    key_ends = documents.cu_lengths
    longest = documents.max_length
    if S > T:  # keys before the sequence: its first document's from skip_B on, the others nobody's
        skip_B = torch.zeros(B, dtype=torch.int64, device=q.device) if skip_B is None else skip_B
        seen_BS = torch.arange(S, device=q.device) >= skip_B[:, None]
        k_ND = k[seen_BS]
        v_ND = v[seen_BS]
        longest = longest + S - T
        before = torch.zeros_like(key_ends)
        before[1:][key_ends[:-1] % T == 0] = (S - T - skip_B).to(before.dtype)
        key_ends = key_ends + before.cumsum(0, dtype=before.dtype)
    if has_varlen_kernel(q, v):
        return varlen(
            q,
            k_ND,
            v_ND,
            (documents.cu_lengths, key_ends),
            (documents.max_length, longest),
            window,
            scale,
        )
    lengths = documents.cu_lengths_cpu.diff().tolist()
    key_lengths = key_ends.diff().tolist() if S > T else lengths
    pieces = zip(q.flatten(0, 1).split(lengths), k_ND.split(key_lengths), v_ND.split(key_lengths))
    outputs = [one_document(q[None], k[None], v[None], window, scale)[0] for q, k, v in pieces]
    return torch.cat(outputs).unflatten(0, (len(q), -1))


def varlen(
    q: Tensor,
    k_ND: Tensor,
    v_ND: Tensor,
    ends: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    window: int | None,
    scale: float | None,
) -> Tensor:
    """torch's varlen flash attention: documents that end at `ends` (int32, from 0; of the queries,
    of the keys) of the sequences laid end to end. A document's queries are its last tokens."""
    from torch.nn.attention.varlen import varlen_attn  # takes 2 s: it imports the compiler

    seen = (-1 if window is None else window - 1, 0)  # keys before and after a query
    o = varlen_attn(
        q.flatten(0, 1),
        k_ND,
        v_ND,
        *ends,
        *longest,
        scale=scale,
        window_size=seen,
        enable_gqa=q.shape[2] > k_ND.shape[1],
    )
    assert isinstance(o, Tensor), "no log-sum-exp was asked for"
    return o.unflatten(0, (len(q), -1))


def has_varlen_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether torch's varlen flash attention takes these: half precision on CUDA (Ampere or newer),
    equal head sizes."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def one_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    skip_B: Tensor | None = None,
) -> Tensor:
    """Rows that are one document each: one call, or with a window, or keys before the first query,
    a call for each block."""
    T = q.shape[1]
    S = k.shape[1]
    if T == 1:
        first = 0 if window is None else max(0, S - window)
        return one_query(
            q, k[:, first:], v[:, first:], scale, None if skip_B is None else skip_B - first
        )
    if T == S and (window is None or window >= S) and skip_B is None:
        return kernel(q, k, v, scale, causal=True)
    if window is None and skip_B is None:
        # keys before the first query, which all queries see, and those of the queries: parts of one
        # softmax, without a mask
        return attention_in_blocks(q, k, v, keys=S, scale=scale)
    masks: dict[tuple[int, int], Tensor] = {}  # blocks inside a long sequence share one
    outputs = []
    for start in range(S - T, S, BLOCK):
        stop = min(start + BLOCK, S)
        first = 0 if window is None else max(0, start - window + 1)
        shape = (stop - start, stop - first)
        if shape not in masks or skip_B is not None:
            seen = visible(
                *shape, window, None, q.device, None if skip_B is None else skip_B - first
            )
            masks[shape] = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(
                ~seen, -torch.inf
            )
        queries = q[:, start - (S - T) : stop - (S - T)]
        outputs.append(
            kernel(queries, k[:, first:stop], v[:, first:stop], scale, mask=masks[shape])
        )
    return torch.cat(outputs, 1)


def one_query(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, skip_B: Tensor | None
) -> Tensor:
    """One query for each sequence. The heads that share keys become the queries of one call, which
    reads the keys once (0.7 of the time at 9 heads of 3 groups and 4096 keys)."""
    B, _, H, K = q.shape
    S, G = k.shape[1:3]
    mask = None
    if skip_B is not None:
        mask = (torch.arange(S, device=q.device) >= skip_B[:, None])[:, None, None]
    o = kernel(q.view(B, G, H // G, K).transpose(1, 2), k, v, scale, mask=mask)
    return o.transpose(1, 2).reshape(B, 1, H, v.shape[-1])


def kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """torch's SDPA in our layout. It is memory-lean for equal head sizes only, so the smaller one
    is padded with zeros."""
    K = q.shape[-1]
    V = v.shape[-1]
    scale = K**-0.5 if scale is None else scale
    if K != V:
        q = F.pad(q, (0, max(K, V) - q.shape[-1]))
        k = F.pad(k, (0, max(K, V) - k.shape[-1]))
        v = F.pad(v, (0, max(K, V) - v.shape[-1]))
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return o.transpose(1, 2)[..., :V]
