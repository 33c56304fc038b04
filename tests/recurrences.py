"""An independent float64 form of the recurrences, and the inputs they are tried on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.doctor import op_cases
from longfire.ops.documents import Documents

B, H = 2, 3
Inputs = dict[str, Any]


def inputs(
    op: str,
    seed: int,
    T: int,
    K: int,
    V: int,
    decay: str,
    state: bool = True,
    documents: float = 0.0,
) -> Inputs:
    """Random arguments of an op, float64. decay: none, constant, scalar, vector, value, vector and value, or with ", one key" one
    head of queries and keys; documents: the share of tokens that start one."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key_heads = 1 if decay.endswith(", one key") else H
    decay = decay.removesuffix(", one key")
    key_decay = decay.removesuffix("value").removesuffix(" and ") or "none"
    shape = {"none": None, "constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}[key_decay]
    made = {"q": randn(B, T, key_heads, K), "k": randn(B, T, key_heads, K), "v": randn(B, T, H, V)}
    if op == "delta_rule":
        made["k"] = F.normalize(made["k"], dim=-1)
        made["beta"] = 2 * torch.rand(B, T, H, generator=generator, dtype=torch.float64)
    if op == "dplr":  # as RWKV-7: the key that c reads is what b takes away, here almost
        made["c"] = -F.normalize(randn(B, T, H, K), dim=-1)
        share = torch.rand(B, T, H, K, generator=generator, dtype=torch.float64)
        made["b"] = 0.1 * F.normalize(randn(B, T, H, K), dim=-1) - share * made["c"]
    made["g"] = None if shape is None else F.logsigmoid(2 * randn(*shape))
    if decay.endswith("value"):
        made["gv"] = F.logsigmoid(2 * randn(B, T, H, V))
    made["initial_state_BHKV"] = randn(B, H, K, V) if state else None
    if documents:
        starts_BT = torch.rand(B, T, generator=generator) < documents
        made["documents"] = Documents.from_ids(starts_BT.long().cumsum(1))
    return made


def call(op: Callable, made: Inputs) -> tuple[Tensor, Tensor]:
    """op(q, k, v, [beta, | c, b,] g, ...) as it is meant to be called."""
    positional = [made[name] for name in ("q", "k", "v", "beta", "c", "b", "g") if name in made]
    named = {name: made[name] for name in ("gv", "documents") if name in made}
    return op(*positional, initial_state_BHKV=made["initial_state_BHKV"], **named)


def converted(made: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in made.items()}


def results(op: Callable, made: Inputs) -> dict[str, Tensor]:
    """`op_cases.results` of the op: o, state, and the gradient of every input as d_q, d_k ..."""
    found = op_cases.results(lambda **named: call(op, named), made)
    names = {"output": "o", "second output": "state"}
    return {names.get(name, name.replace(" ", "_")): x for name, x in found.items()}


def errors(op: Callable, truth: Callable, made: Inputs, dtype: torch.dtype) -> dict[str, float]:
    """max |op - truth| / max |truth| of each result; the reference in float64 of the same rounded inputs."""
    rounded = converted(made, dtype)
    got, true = results(op, rounded), results(truth, converted(rounded, torch.float64))
    floor = (
        max(float(x.abs().max()) for x in true.values()) * 1e-12
    )  # a gradient may be exactly zero
    return {
        name: float((got[name].double() - x).abs().max() / x.abs().max().clamp_min(floor))
        for name, x in true.items()
    }


def by_numpy(made: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence as written on paper, S <- M S diag(exp gv) + w, one document, head and token at a time."""
    q, k, v = (made[name].numpy() for name in "qkv")
    q, k = (np.repeat(x, v.shape[2] // x.shape[2], 2) for x in (q, k))
    (rows, T, heads, K), V = q.shape, v.shape[-1]
    beta = made["beta"].numpy() if "beta" in made else None
    g = np.zeros(heads) if made["g"] is None else made["g"].numpy()
    g = np.broadcast_to(g if g.ndim == 4 else g[..., None], q.shape)
    values_kept = np.exp(made["gv"].numpy()) if "gv" in made else np.ones_like(v)
    ids = np.zeros((rows, T)) if "documents" not in made else made["documents"].ids_BT.numpy()
    given = made["initial_state_BHKV"]
    o, last = np.zeros((rows, T, heads, V)), np.zeros((rows, heads, K, V))
    for b, h in np.ndindex(rows, heads):
        S = np.zeros((K, V)) if given is None else given[b, h].numpy().copy()
        for t in range(T):
            if t and ids[b, t] != ids[b, t - 1]:
                S = np.zeros((K, V))
            key, write, M = k[b, t, h], v[b, t, h], np.diag(np.exp(g[b, t, h]))
            if beta is not None:
                M, write = (
                    (np.eye(K) - beta[b, t, h] * np.outer(key, key)) @ M,
                    beta[b, t, h] * write,
                )
            if "c" in made:
                M = M + np.outer(made["b"][b, t, h], made["c"][b, t, h])
            S = M @ S * values_kept[b, t, h] + np.outer(key, write)
            o[b, t, h] = S.T @ q[b, t, h] / np.sqrt(K)
        last[b, h] = S
    return o, last
