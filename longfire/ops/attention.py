"""Softmax attention, whole and in parts; causal, with grouped heads, sliding windows and documents.

torch's fused kernels do the work, and what they cannot see is left out by cutting, not by a mask of
T x T: documents one by one, windows in blocks of queries with the keys that the block can see.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

from longfire.ops import chosen
from longfire.ops.bf16 import native_bf16
from longfire.ops.documents import Documents
from longfire.ops.dropout import kept, with_index
from longfire.ops.linear import in_fp32, working_dtype

# queries that share a slice of keys where a mask is needed: its size is BLOCK x (BLOCK + window)
BLOCK = 256


def attention(
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
    """Causal softmax(q k^T * scale) v -> (B, T, H, V). Queries are the last T of S positions; G
    key/value heads serve H heads.

    window: keys a query sees, itself included. documents: tokens see their own document; of S - T
    keys before a row, those from skip_B on belong to its first document. scale: K^-0.5 if None.
    skip_B: so many keys at the left end of each row are seen by no query but their own.
    dropout: share of the weights that become 0, by the queries' noise (T = S only) and the head's
    number, which counts from first_head; none without noise. It leaves the fused kernels: their
    masks depend on the order in which they draw. bf16 on a CPU without bf16 units is multiplied in
    fp32 (torch's bf16 backward takes 5x the time there).
    """
    T = q_BTHK.shape[1]
    S = k_BSGK.shape[1]
    assert S >= T, "queries are the last T of S positions"
    drops = dropout > 0 and noise_BT is not None
    if chosen("attention") == "reference":
        return attention_reference(
            q_BTHK,
            k_BSGK,
            v_BSGV,
            window=window,
            documents=documents,
            scale=scale,
            dropout=dropout,
            noise_BT=noise_BT,
            skip_B=skip_B,
            first_head=first_head,
        )
    if drops:
        assert noise_BT is not None, "dropout is made of noise"
        return attention_dropping(
            q_BTHK, k_BSGK, v_BSGV, window, documents, scale, dropout, noise_BT, first_head
        )
    window = None if window is not None and window >= S else window
    q = multipliable(q_BTHK)
    k = multipliable(k_BSGK)
    v = multipliable(v_BSGV)
    if documents is not None:
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
    """Rows of several documents, each seeing itself only: one call of a varlen kernel, or document
    by document.

    The rows are laid end to end, split where documents end, and joined again, so that nothing is
    paid for what is not seen.
    """
    (B, T), S = q.shape[:2], k.shape[1]
    k_ND = k.flatten(0, 1)
    v_ND = v.flatten(0, 1)
    key_ends = documents.cu_lengths
    longest = documents.max_length
    if S > T:  # keys before the row: its first document's from skip_B on, the others nobody's
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
    lengths = documents.cu_lengths.diff().tolist()
    key_lengths = key_ends.diff().tolist()
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
    of the keys) of the rows laid end to end. A document's queries are its last tokens."""
    from torch.nn.attention.varlen import varlen_attn  # takes 2 s: it imports the compiler

    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[2] != k_ND.shape[1] else {}
    seen = (-1 if window is None else window - 1, 0)  # keys before and after a query
    o = varlen_attn(
        q.flatten(0, 1), k_ND, v_ND, *ends, *longest, scale=scale, window_size=seen, **grouped
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
        return after_earlier(q, k, v, scale)
    masks: dict[tuple[int, int], Tensor] = {}  # blocks inside a long row share one
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


def after_earlier(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Keys before the first query, which all queries see, and those of the queries: two parts of
    one softmax, without any mask."""
    before = k.shape[1] - q.shape[1]
    o_early, lse_early_BHT = attention_parts(
        q, k[:, :before], v[:, :before], causal=False, scale=scale
    )
    o_own, lse_own_BHT = attention_parts(q, k[:, before:], v[:, before:], causal=True, scale=scale)
    share_BTH1 = (lse_early_BHT - lse_own_BHT).sigmoid().transpose(1, 2)[..., None]
    return torch.lerp(o_own, o_early, share_BTH1)


def one_query(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, skip_B: Tensor | None
) -> Tensor:
    """A query a row. The heads that share keys become the queries of one call, which reads the keys
    once (0.7 of the time at 9 heads of 3 groups and 4096 keys)."""
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


def attention_reference(
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
    """The truth: all scores written out, in fp32 (float64 for float64 inputs). Same arguments and
    result."""
    T = q_BTHK.shape[1]
    S = k_BSGK.shape[1]
    seen = visible(T, S, window, documents, q_BTHK.device, skip_B)
    mask = None
    if dropout > 0 and noise_BT is not None:
        assert T == S, "dropout is for training, on whole rows"
        mask = weight_mask(noise_BT, q_BTHK.shape[2], 0, S, dropout, first_head)
    return softmax_reference(q_BTHK, k_BSGK, v_BSGV, seen, scale, mask, dropout)[0].to(q_BTHK.dtype)


def attention_dropping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    documents: Documents | None,
    scale: float | None,
    dropout: float,
    noise_BT: Tensor,
    first_head: int,
) -> Tensor:
    """The same, for BLOCK queries at a time, whose scores are made again in the backward: memory
    grows with T, not with T^2."""
    T = q.shape[1]
    assert k.shape[1] == T, "dropout is for training, on whole rows"
    documents_BT = None if documents is None else documents.ids_BT

    def block(start: int, stop: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = 0 if window is None else max(0, start - window + 1)
        seen = visible(stop - start, stop - first, window, None, q.device)
        if documents_BT is not None:
            seen = (
                seen
                & (documents_BT[:, start:stop, None] == documents_BT[:, None, first:stop])[:, None]
            )
        mask = weight_mask(noise_BT[:, start:stop], q.shape[2], first, stop, dropout, first_head)
        return softmax_reference(
            q[:, start:stop], k[:, first:stop], v[:, first:stop], seen, scale, mask, dropout
        )[0]

    bounds = [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]
    outputs = [
        checkpoint(block, start, stop, q, k, v, use_reentrant=False) for start, stop in bounds
    ]
    return torch.cat(outputs, 1).to(q.dtype)


def weight_mask(
    noise_BT: Tensor, heads: int, first: int, stop: int, p: float, first_head: int
) -> Tensor:
    """(B, H, T, S) bool: which weights of the keys first to stop stay."""
    head_H = torch.arange(first_head, first_head + heads, dtype=torch.int32, device=noise_BT.device)
    key_S = torch.arange(first, stop, dtype=torch.int32, device=noise_BT.device)
    noise_BHT = with_index(noise_BT, head_H).movedim(-1, 1)
    return kept(with_index(noise_BHT, key_S), p)


def visible(
    T: int,
    S: int,
    window: int | None,
    documents: Documents | None,
    device: torch.device,
    skip_B: Tensor | None = None,
) -> Tensor:
    """(B or 1, 1, T, S) bool: which of S keys each of the last T positions sees."""
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    seen = seen[None]
    if skip_B is not None:
        seen = seen & ((key >= skip_B[:, None, None]) | (key == query))
    if documents is not None:  # keys before the row are of its first document
        ids_BT = documents.ids_BT
        ids_BS = torch.cat([ids_BT[:, :1].expand(-1, S - T), ids_BT], 1)
        seen = seen & (ids_BT[:, :, None] == ids_BS[:, None, :])
    return seen[:, None]


def softmax_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float | None,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of the scores with all of them in memory; seen: (B or 1, 1, T, S), None
    for all. mask: weights that stay of a dropout with p."""
    groups = q.shape[2] // k.shape[2]
    dtype = working_dtype(q)
    q = q.to(dtype)
    k = k.repeat_interleave(groups, 2).to(dtype)
    v = v.repeat_interleave(groups, 2).to(dtype)
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if seen is not None:
        scores_BHTS = scores_BHTS.masked_fill(~seen, -torch.inf)
    weights_BHTS = scores_BHTS.softmax(-1)
    if mask is not None:
        weights_BHTS = torch.where(mask, weights_BHTS / (1 - p), 0.0)
    return torch.einsum("bhts,bshv->bthv", weights_BHTS, v), scores_BHTS.logsumexp(-1)


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
    if chosen("attention") == "reference":
        return attention_parts_reference(q_BTHK, k_BSGK, v_BSGV, causal=causal, scale=scale)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if q_BTHK.device.type == "cuda":
        return parts_by_flex(q_BTHK, k_BSGK, v_BSGV, causal, scale)
    K = q_BTHK.shape[-1]
    V = v_BSGV.shape[-1]
    dtype = working_dtype(q_BTHK)
    q = F.pad(q_BTHK.to(dtype), (0, max(K, V) - q_BTHK.shape[-1])).transpose(1, 2)
    k = F.pad(k_BSGK.to(dtype), (0, max(K, V) - k_BSGK.shape[-1])).transpose(1, 2)
    v = F.pad(v_BSGV.to(dtype), (0, max(K, V) - v_BSGV.shape[-1])).transpose(1, 2)
    o, lse_BHT = _Parts.apply(q, k, v, causal, scale)
    return o.transpose(1, 2)[..., :V], lse_BHT


def attention_parts_reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The truth: all scores written out. Same arguments and result."""
    T = q_BTHK.shape[1]
    S = k_BSGK.shape[1]
    return softmax_reference(
        q_BTHK, k_BSGK, v_BSGV, visible(T, S, None, None, q_BTHK.device) if causal else None, scale
    )


class _Parts(torch.autograd.Function):
    """The kernel behind torch's SDPA on a CPU, which is private but gives the logsumexp that the
    public face drops.

    Its backward knows no gradient of lse. With P = exp(scores - lse), d scores = P * (dO v^T -
    delta + d lse), where the kernel makes delta = rowsum(dO * O) itself: one more channel with dO =
    1, O = -d lse and v = 0 gives it delta - d lse.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal = causal
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        size = q.shape[-1]
        d_o = torch.zeros_like(o) if d_o is None else d_o
        if d_lse is not None:
            q = F.pad(q, (0, 1))
            k = F.pad(k, (0, 1))
            v = F.pad(v, (0, 1))
            o = torch.cat([o, -d_lse[..., None].to(o.dtype)], -1)
            d_o = F.pad(d_o, (0, 1), value=1.0)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_o, q, k, v, o, lse, 0.0, ctx.causal, scale=ctx.scale
        )
        return *(gradient[..., :size] for gradient in gradients), None, None


WithLogsumexp = Callable[..., tuple[Tensor, flex.AuxOutput]]


def parts_by_flex(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """On CUDA: flex attention, which gives the logsumexp and its gradient; compiled, since
    uncompiled it makes all scores."""
    T = q.shape[1]
    S = k.shape[1]
    mask = flex.create_block_mask(earlier, None, None, T, S, device=q.device) if causal else None
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    # To a type checker torch.compile leaves the first overload only: outputs without logsumexp.
    attend: WithLogsumexp = torch.compile(flex.flex_attention)  # type: ignore[assignment]
    wanted = flex.AuxRequest(lse=True)
    o, aux = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=wanted)
    assert aux.lse is not None
    return in_fp32(o.transpose(1, 2)), aux.lse


def earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query
