"""Ways to call each fast op, with random inputs, and how far it may be from its reference: what
`longfire doctor` runs on a user's machine, and the tests here.

The reference runs in float64 on the same rounded inputs, so that what is compared is the fast
form's own rounding.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops import (
    attention,
    attention_blocks,
    cross_entropy,
    delta_rule,
    dplr,
    linear_attention,
    selective_scan,
    short_conv,
    token_shift,
)
from longfire.ops.bf16 import native_bf16
from longfire.ops.documents import Documents

DTYPES = (torch.float32, torch.bfloat16)
STRONG = -20.0  # log decay of a step: e^-20 a token leaves exp(64 * 20) between the ends of a chunk, far beyond fp32
FP32 = {
    "g",
    "g_BTHK",
    "gv",
    "beta_BTH",
    "A_DN",
    "initial_state_BHKV",
    "initial_state_BDN",
    "weight_DW",
    "bias_D",
    "state_BDW",
    "weight_WD",
}  # in fp32 in every model


class Sizes(NamedTuple):
    """B, T, H, K, V, W of the cases. T is more than a chunk of 64 and no multiple of anything."""

    B: int
    T: int
    H: int
    K: int
    V: int
    W: int


SIZES = {"cpu": Sizes(2, 83, 4, 16, 24, 97), "cuda": Sizes(2, 331, 4, 64, 128, 1009)}


class Draw:
    """Random inputs, drawn on the CPU in float64, so that every device and type sees the same
    numbers."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def documents(self, B: int, T: int) -> Documents:
        """About one document start in 16 tokens, other places in each row; the second row is one
        document."""
        starts_BT = self.uniform(B, T) < 1 / 16
        starts_BT[1:2] = False
        return Documents.from_ids(starts_BT.long().cumsum(1))


Inputs = dict[
    str, Any
]  # arguments by name: float64 tensors, and what is no number (documents, window, labels)


class Case(NamedTuple):
    """One way to call an op. The fast form is `module.<op>`, the reference `module.<op>_reference`,
    looked up when called."""

    module: ModuleType
    op: str
    name: str
    inputs: Callable[[Draw, Sizes], Inputs]

    def __str__(self) -> str:
        return f"{self.op}, {self.name}"


def attention_inputs(
    draw: Draw,
    n: Sizes,
    *,
    heads: int = 4,
    queries: float = 1.0,
    longer: int = 0,
    documents: bool = False,
    **options: Any,
) -> Inputs:
    """heads: G. queries: the share of the S positions that have one, the last ones, which documents
    are of. longer: S beyond T.
    skip: another number of keys at the left end of each row is hidden."""
    S = n.T + longer
    T = max(1, round(S * queries))
    own_value_size, skip = options.pop("own_value_size", False), options.pop("skip", False)
    inputs = {
        "q_BTHK": draw.normal(n.B, T, n.H, n.K),
        "k_BSGK": draw.normal(n.B, S, heads, n.K),
        "v_BSGV": draw.normal(n.B, S, heads, n.V if own_value_size else n.K),
        **options,
    }
    if documents:
        inputs["documents"] = draw.documents(n.B, T)
    if skip:
        inputs["skip_B"] = (draw.uniform(n.B) * (S - T + 1)).long()
    return inputs


def recurrent_inputs(
    draw: Draw,
    n: Sizes,
    *,
    decay: str,
    rule: bool,
    strong: float = 0.0,
    documents: bool = False,
    groups: int = 1,
    heads_per_key: int = 1,
    value_decay: bool = False,
    state: bool = True,
) -> Inputs:
    """Linear attention (rule false) or the delta rule. decay: none, constant, scalar or vector.

    groups: heads of q that share one of all else.  heads_per_key: heads of v, g and the state that share one of q and k.
    value_decay: gv too.  state: whether there is an initial one.
    """
    H = n.H // groups
    row, keys = (n.B, n.T, H), H // heads_per_key
    shape = {"none": None, "constant": (H,), "scalar": row, "vector": (*row, n.K)}[decay]
    k_BTHK = draw.normal(n.B, n.T, keys, n.K)
    inputs = {
        "q_BTHK": draw.normal(n.B, n.T, keys * groups, n.K),
        "k_BTHK": F.normalize(k_BTHK, dim=-1) if rule else k_BTHK,
        "v_BTHV": draw.normal(*row, n.V),
    }
    if rule:
        inputs["beta_BTH"] = 2 * draw.uniform(*row)
    if shape:
        inputs["g"] = F.logsigmoid(2 * draw.normal(*shape)) + strong
    if value_decay:
        inputs["gv"] = F.logsigmoid(2 * draw.normal(*row, n.V)) + strong
    if state:
        inputs["initial_state_BHKV"] = draw.normal(n.B, H, n.K, n.V)
    if documents:
        inputs["documents"] = draw.documents(n.B, n.T)
    return inputs


def dplr_inputs(
    draw: Draw, n: Sizes, *, strong: float = 0.0, documents: bool = False, state: bool = True
) -> Inputs:
    """As RWKV-7: c and b are one key, read and in part taken away."""
    heads = (n.B, n.T, n.H, n.K)
    key_BTHK = F.normalize(draw.normal(*heads), dim=-1)
    inputs = {
        "q_BTHK": draw.normal(*heads),
        "k_BTHK": draw.normal(*heads),
        "v_BTHV": draw.normal(n.B, n.T, n.H, n.V),
        "c_BTHK": -key_BTHK,
        "b_BTHK": key_BTHK * draw.uniform(*heads),
        "g_BTHK": F.logsigmoid(2 * draw.normal(*heads)) + strong,
    }
    if state:
        inputs["initial_state_BHKV"] = draw.normal(n.B, n.H, n.K, n.V)
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def selective_scan_inputs(
    draw: Draw, n: Sizes, *, strong: float = 1.0, documents: bool = False, state: bool = True
) -> Inputs:
    """A as Mamba begins, -1 ... -N; steps of some 0.01 to 3, `strong` times as long."""
    D, N = n.H * n.K, 16
    inputs = {
        "x_BTD": draw.normal(n.B, n.T, D),
        "dt_BTD": strong * F.softplus(draw.normal(n.B, n.T, D) - 2),
        "A_DN": -torch.arange(1, N + 1, dtype=torch.float64).repeat(D, 1),
        "B_BTN": draw.normal(n.B, n.T, N),
        "C_BTN": draw.normal(n.B, n.T, N),
    }
    if state:
        inputs["initial_state_BDN"] = draw.normal(n.B, D, N)
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def previous_token_inputs(
    draw: Draw, n: Sizes, *, documents: bool = False, state: bool = True
) -> Inputs:
    inputs = {"x_BTD": draw.normal(n.B, n.T, n.H * n.K)}
    if state:
        inputs["before_BD"] = draw.normal(n.B, n.H * n.K)
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def short_conv_inputs(
    draw: Draw,
    n: Sizes,
    *,
    width: int = 4,
    documents: bool = False,
    state: bool = True,
    bias: bool = True,
    **options: Any,
) -> Inputs:
    D = n.H * n.K
    inputs = {"x_BTD": draw.normal(n.B, n.T, D), "weight_DW": draw.normal(D, width)}
    if bias:
        inputs["bias_D"] = draw.normal(D)
    if state:
        inputs["state_BDW"] = draw.normal(n.B, D, width - 1)
    return {**inputs, **options, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def cross_entropy_inputs(
    draw: Draw, n: Sizes, *, chunk_tokens: int, softcap: float = 0.0, l2_warp: bool = False
) -> Inputs:
    """A third of the tokens has no label, and of several chunks the first none at all."""
    N, D = n.B * n.T, n.H * n.K
    labels_N = (draw.uniform(N) * n.W).long()
    labels_N[draw.uniform(N) < 1 / 3] = -100
    if chunk_tokens < N:
        labels_N[:chunk_tokens] = -100
    weight_WD = draw.normal(n.W, D) / D**0.5
    given = {"hidden_ND": draw.normal(N, D), "weight_WD": weight_WD, "labels_N": labels_N}
    return given | {"chunk_tokens": chunk_tokens, "softcap": softcap, "l2_warp": l2_warp}


def cases() -> Iterator[Case]:
    for name, options in {
        "causal": {},
        "grouped heads": {"heads": 2},
        "own value size, own scale": {"own_value_size": True, "scale": 0.3},
        "window": {"window": 9},
        "window, longer than a block": {"window": 40, "longer": attention.BLOCK, "heads": 1},
        "documents": {"documents": True},
        "window, documents, 1 kv head": {"window": 9, "documents": True, "heads": 1},
        "queries are the last third": {"queries": 1 / 3, "heads": 2},
        "the last third, window": {"queries": 1 / 3, "window": 9},
    }.items():
        yield Case(attention, "attention", name, partial(attention_inputs, **options))
    for name, options in {
        "causal": {"causal": True},
        "all keys, grouped heads": {"causal": False, "heads": 2, "queries": 1 / 3},
    }.items():
        yield Case(attention, "attention_parts", name, partial(attention_inputs, **options))
    for name, options in {
        "grouped heads": {"heads": 2},
        "window, own value size": {"window": 9, "own_value_size": True},
    }.items():
        inputs = partial(attention_inputs, keys=32, **options)
        yield Case(attention_blocks, "attention_in_blocks", name, inputs)
    for module, op, decays in (
        (linear_attention, "linear_attention", ("none", "constant", "scalar", "vector")),
        (delta_rule, "delta_rule", ("none", "scalar", "vector")),
    ):
        for decay in decays:
            inputs = partial(recurrent_inputs, decay=decay, rule=op == "delta_rule")
            name = "no decay" if decay == "none" else f"{decay} decay"
            yield Case(module, op, name, inputs)
            yield Case(module, op, f"{name}, documents", partial(inputs, documents=True))
            if decay in ("scalar", "vector"):
                yield Case(module, op, f"{name} of e^{STRONG:.0f}", partial(inputs, strong=STRONG))
            if op == "linear_attention" and decay in ("constant", "vector"):
                yield Case(
                    module, op, f"{name}, grouped heads", partial(inputs, groups=2, documents=True)
                )
    for name, options in {
        "value decay": {"value_decay": True},
        "value decay, documents": {"value_decay": True, "documents": True},
        f"value decay of e^{STRONG:.0f}": {"value_decay": True, "strong": STRONG},
        "value decay, grouped heads": {"value_decay": True, "groups": 2},
        "value decay, one key for all heads": {"value_decay": True, "heads_per_key": 4},
        "vector and value decay": {"decay": "vector", "value_decay": True},
        "scalar decay, one key for all heads": {"decay": "scalar", "heads_per_key": 4},
        "vector decay, one key for two heads": {
            "decay": "vector",
            "heads_per_key": 2,
            "documents": True,
        },
    }.items():
        inputs = partial(recurrent_inputs, rule=False, **{"decay": "none", **options})
        yield Case(linear_attention, "linear_attention", name, inputs)
    for name, options in {
        "vector decay": {},
        "vector decay, documents": {"documents": True},
        f"vector decay of e^{STRONG:.0f}": {"strong": STRONG},
    }.items():
        yield Case(dplr, "dplr", name, partial(dplr_inputs, **options))
    for name, options in {
        "Mamba's steps": {},
        "documents": {"documents": True},
        "steps of 20": {"strong": 20.0},
    }.items():
        yield Case(
            selective_scan, "selective_scan", name, partial(selective_scan_inputs, **options)
        )
    for name, documents in {"whole rows": False, "documents": True}.items():
        inputs = partial(previous_token_inputs, documents=documents)
        yield Case(token_shift, "previous_token", name, inputs)
    for name, options in {
        "width 4": {},
        "width 3, documents": {"width": 3, "documents": True},
        "no activation": {"silu": False},
    }.items():
        yield Case(short_conv, "short_conv", name, partial(short_conv_inputs, **options))
    for name, options in {
        "in chunks": {"chunk_tokens": 32},
        "in one": {"chunk_tokens": 4096},
        "soft cap": {"chunk_tokens": 4096, "softcap": 2.0},
        "l2 warp": {"chunk_tokens": 32, "l2_warp": True},
    }.items():
        inputs = partial(cross_entropy_inputs, **options)
        yield Case(cross_entropy, "linear_cross_entropy", name, inputs)


CASES = tuple(cases())


def results(op: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs, and the gradient of every floating input through all of them, for fixed random
    gradients of the outputs."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    outputs = op(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    draw = Draw(seed=1)
    seeds = [
        draw.normal(*x.shape).mul(8).round().div(8).to(x) for x in outputs
    ]  # eighths: exact in bf16, the same for all
    differentiable = [
        pair for pair in zip(outputs, seeds) if pair[0].requires_grad
    ]  # zeros need no input
    gradients = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if differentiable:
        some_outputs, their_seeds = zip(*differentiable)
        wanted = list(leaves.values())
        gradients = torch.autograd.grad(
            some_outputs, wanted, their_seeds, allow_unused=True, materialize_grads=True
        )
    named = zip(("output", "second output"), outputs)
    return {name: x.detach() for name, x in named} | {
        f"d {name}": d for name, d in zip(leaves, gradients)
    }


def moved(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """The inputs on a device, their values rounded to dtype; those that a model keeps in fp32 are
    of that type still."""

    def one(name: str, x: Any) -> Any:
        if isinstance(x, Documents):
            return x.to(device)
        if not isinstance(x, Tensor):
            return x
        x = x.to(device)
        if not x.is_floating_point():
            return x
        return x.to(dtype).float() if name in FP32 and dtype != torch.float64 else x.to(dtype)

    return {name: one(name, x) for name, x in inputs.items()}


def errors(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes | None = None,
    seed: int = 0,
    floor: float = 0.0,
) -> dict[str, float]:
    """max |fast - reference| / max |reference| of each output and gradient; infinite where the fast
    form is not finite.

    sizes: those of SIZES if None.  floor: a result below this share of the largest one is what is left of larger numbers, and its
    error is relative to that share.
    """
    rounded = moved(case.inputs(Draw(seed), sizes or SIZES[device.type]), device, dtype)
    exact = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in rounded.items()
    }
    got = results(getattr(case.module, case.op), rounded)
    true = results(getattr(case.module, f"{case.op}_reference"), exact)
    least = max(1e-30, floor * max(float(x.abs().max()) for x in true.values() if x.numel()))
    found = {}
    for name, x in true.items():
        if not x.numel():
            continue
        difference = (got[name].double() - x).abs().max()
        found[name] = (
            float(difference / x.abs().max().clamp_min(least))
            if difference.isfinite()
            else torch.inf
        )
    return found


def tolerance(
    case: Case, device: torch.device, dtype: torch.dtype, tokens: int | None = None
) -> float:
    """The largest error that rounding explains, relative to the largest value.

    u is half a unit in the last place. A result is rounded to its type (u of it). Sums over T
    tokens are fp32 everywhere: their errors walk at random, sqrt(T) u. Products are fp32 too, but
    for attention, which multiplies in the type of its inputs where the device can, and for CUDA's
    kernels, which multiply fp32 in TF32 (10 bits): independent errors of u each, so u of their sum.
    The factors 4 and 16 are for the handful of roundings in a row (the delta rule solves a system),
    and for the largest of thousands.
    """
    fp32, u = torch.finfo(torch.float32).eps / 2, torch.finfo(dtype).eps / 2
    products = u if case.op.startswith("attention") and native_bf16(device) else fp32
    if device.type == "cuda":
        products = max(u, 2**-11)
    return (
        4 * (u if u > fp32 else 0)
        + 16 * products
        + 4 * fp32 * (tokens or SIZES[device.type].T) ** 0.5
    )
