"""`longfire doctor`: every fast op against its slow truth on this machine, forward and backward.

The truth runs in float64 on the same rounded inputs, so that what is compared is the fast form's own rounding. Where there are
several forms (our own on torch, fla's kernels on CUDA) each that a run could choose is checked, on the CPU and on the GPU.
"""

import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from longfire import ops
from longfire.launch import cxx_compiler
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
from longfire.report import version_of

DTYPES = (torch.float32, torch.bfloat16)
PACKAGES = ("longfire", "torch", "triton", "fla-core", "flash-linear-attention", "transformers")
WIDTHS = (21, 30, 9, 6, 6, 21, 10)
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
    """Random inputs, drawn on the CPU in float64, so that every device and type sees the same numbers."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def documents(self, B: int, T: int) -> Documents:
        """About one document start in 16 tokens, other places in each row; the second row is one document."""
        starts_BT = self.uniform(B, T) < 1 / 16
        starts_BT[1:2] = False
        return Documents.from_ids(starts_BT.long().cumsum(1))


Inputs = dict[str, Any]  # arguments by name: float64 tensors, and what is no number (documents, window, labels)


class Case(NamedTuple):
    """One way to call an op. The fast form is `module.<op>`, the truth `module.<op>_slow`, looked up when called."""

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
    """heads: G. queries: the share of the S positions that have one. longer: S beyond T."""
    S = n.T + longer
    inputs = {
        "q_BTHK": draw.normal(n.B, round(S * queries), n.H, n.K),
        "k_BSGK": draw.normal(n.B, S, heads, n.K),
        "v_BSGV": draw.normal(n.B, S, heads, n.V if options.pop("own_value_size", False) else n.K),
    }
    return {**inputs, **options, **({"documents": draw.documents(n.B, S)} if documents else {})}


def recurrent_inputs(
    draw: Draw,
    n: Sizes,
    *,
    decay: str,
    rule: bool,
    strong: float = 0.0,
    documents: bool = False,
    groups: int = 1,
    one_key: bool = False,
) -> Inputs:
    """Linear attention (rule false) or the delta rule, from an initial state. decay: none, constant, scalar, vector, or value: gv.
    groups: heads of q that share one of all else. one_key: all heads have the same queries and keys."""
    H = n.H // groups
    row, keys = (n.B, n.T, H), 1 if one_key else H
    shape = {"none": None, "constant": (H,), "scalar": row, "vector": (*row, n.K), "value": (*row, n.V)}[decay]
    k_BTHK = draw.normal(n.B, n.T, keys, n.K)
    inputs = {
        "q_BTHK": draw.normal(n.B, n.T, keys * groups, n.K),
        "k_BTHK": F.normalize(k_BTHK, dim=-1) if rule else k_BTHK,
        "v_BTHV": draw.normal(*row, n.V),
        **({"beta_BTH": 2 * draw.uniform(*row)} if rule else {}),
        **({"gv" if decay == "value" else "g": F.logsigmoid(2 * draw.normal(*shape)) + strong} if shape else {}),
        "initial_state_BHKV": draw.normal(n.B, H, n.K, n.V),
    }
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def dplr_inputs(draw: Draw, n: Sizes, *, strong: float = 0.0, documents: bool = False) -> Inputs:
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
        "initial_state_BHKV": draw.normal(n.B, n.H, n.K, n.V),
    }
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def selective_scan_inputs(draw: Draw, n: Sizes, *, strong: float = 1.0, documents: bool = False) -> Inputs:
    """A as Mamba begins, -1 ... -N; steps of some 0.01 to 3, `strong` times as long."""
    D, N = n.H * n.K, 16
    inputs = {
        "x_BTD": draw.normal(n.B, n.T, D),
        "dt_BTD": strong * F.softplus(draw.normal(n.B, n.T, D) - 2),
        "A_DN": -torch.arange(1, N + 1, dtype=torch.float64).repeat(D, 1),
        "B_BTN": draw.normal(n.B, n.T, N),
        "C_BTN": draw.normal(n.B, n.T, N),
        "initial_state_BDN": draw.normal(n.B, D, N),
    }
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def previous_token_inputs(draw: Draw, n: Sizes, *, documents: bool = False) -> Inputs:
    inputs = {"x_BTD": draw.normal(n.B, n.T, n.H * n.K), "before_BD": draw.normal(n.B, n.H * n.K)}
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def short_conv_inputs(draw: Draw, n: Sizes, *, width: int = 4, documents: bool = False, **options: Any) -> Inputs:
    D = n.H * n.K
    inputs = {
        "x_BTD": draw.normal(n.B, n.T, D),
        "weight_DW": draw.normal(D, width),
        "bias_D": draw.normal(D),
        "state_BDW": draw.normal(n.B, D, width - 1),
    }
    return {**inputs, **options, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def cross_entropy_inputs(draw: Draw, n: Sizes, *, chunk_tokens: int, softcap: float = 0.0) -> Inputs:
    """A third of the tokens has no label, and of several chunks the first none at all."""
    N, D = n.B * n.T, n.H * n.K
    labels_N = (draw.uniform(N) * n.W).long()
    labels_N[draw.uniform(N) < 1 / 3] = -100
    if chunk_tokens < N:
        labels_N[:chunk_tokens] = -100
    weight_WD = draw.normal(n.W, D) / D**0.5
    given = {"hidden_ND": draw.normal(N, D), "weight_WD": weight_WD, "labels_N": labels_N}
    return given | {"chunk_tokens": chunk_tokens, "softcap": softcap}


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
        (linear_attention, "linear_attention", ("none", "constant", "scalar", "vector", "value")),
        (delta_rule, "delta_rule", ("none", "scalar", "vector")),
    ):
        for decay in decays:
            inputs = partial(recurrent_inputs, decay=decay, rule=op == "delta_rule")
            name = "no decay" if decay == "none" else f"{decay} decay"
            yield Case(module, op, name, inputs)
            yield Case(module, op, f"{name}, documents", partial(inputs, documents=True))
            if decay in ("scalar", "vector", "value"):
                yield Case(module, op, f"{name} of e^{STRONG:.0f}", partial(inputs, strong=STRONG))
            if op == "linear_attention" and decay in ("constant", "vector"):
                yield Case(module, op, f"{name}, grouped heads", partial(inputs, groups=2, documents=True))
    inputs = partial(recurrent_inputs, decay="scalar", rule=False, one_key=True)
    yield Case(linear_attention, "linear_attention", "scalar decay, one key for all heads", inputs)
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
        yield Case(selective_scan, "selective_scan", name, partial(selective_scan_inputs, **options))
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
    }.items():
        inputs = partial(cross_entropy_inputs, **options)
        yield Case(cross_entropy, "linear_cross_entropy", name, inputs)


CASES = tuple(cases())


def results(op: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs, and the gradient of every floating input through all of them, for fixed random gradients of the outputs."""
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
    gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    named = zip(("output", "second output"), outputs)
    return {name: x.detach() for name, x in named} | {f"d {name}": d for name, d in zip(leaves, gradients)}


def moved(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """The inputs on a device, their values rounded to dtype; those that a model keeps in fp32 are of that type still."""

    def one(name: str, x: Any) -> Any:
        if isinstance(x, Documents):
            return x.to(device)
        if not isinstance(x, Tensor):
            return x
        x = x.to(device)
        if not x.is_floating_point():
            return x
        return x.to(dtype).float() if name in FP32 else x.to(dtype)

    return {name: one(name, x) for name, x in inputs.items()}


def errors(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """max |fast - truth| / max |truth| of each output and gradient; infinite where the fast form is not finite."""
    rounded = moved(case.inputs(Draw(), SIZES[device.type]), device, dtype)
    exact = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in rounded.items()}
    got = results(getattr(case.module, case.op), rounded)
    true = results(getattr(case.module, f"{case.op}_slow"), exact)
    found = {}
    for name, x in true.items():
        difference = (got[name].double() - x).abs().max()
        found[name] = float(difference / x.abs().max().clamp_min(1e-30)) if difference.isfinite() else torch.inf
    return found


def tolerance(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error that rounding explains, relative to the largest value.

    u is half a unit in the last place. A result is rounded to its type (u of it). Sums over T tokens are fp32 everywhere: their
    errors walk at random, sqrt(T) u. Products are fp32 too, but for attention, which multiplies in the type of its inputs where
    the device can, and for CUDA's kernels, which multiply fp32 in TF32 (10 bits): independent errors of u each, so u of
    their sum. The factors 4 and 16 are for the handful of roundings in a row (the delta rule solves a system), and for the
    largest of thousands.
    """
    fp32, u = torch.finfo(torch.float32).eps / 2, torch.finfo(dtype).eps / 2
    products = u if case.op.startswith("attention") and native_bf16(device) else fp32
    if device.type == "cuda":
        products = max(u, 2**-11)
    return 4 * (u if u > fp32 else 0) + 16 * products + 4 * fp32 * SIZES[device.type].T ** 0.5


def check(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[bool, str, str]:
    """(right or not, which result was furthest off, by how much or what was raised)."""
    try:
        found = errors(case, device, dtype)
    except (RuntimeError, ValueError) as error:  # a kernel that cannot run here is a finding, not the end
        return False, f"{type(error).__name__}", str(error).splitlines()[0][:80]
    worst = max(found, key=found.get)
    return found[worst] <= tolerance(case, device, dtype), worst, f"{found[worst]:.1e}"


def tables(device: torch.device) -> Iterator[dict[str, ops.Choice]]:
    """Each set of forms that a run on this device could choose, chosen while it is looked at."""
    automatic = ops.choose(device, "auto")
    if any(choice.name != "torch" for choice in automatic.values()):
        yield ops.choose(device, "torch")
    yield ops.choose(device, "auto")


def facts() -> dict[str, str]:
    """What a reader must know to judge the table, and what a report of a fault should hold."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    found |= {name: version_of(name) or "not installed" for name in PACKAGES}
    memory = psutil.virtual_memory()
    cpu = torch.device("cpu")
    found["cpu"] = (
        f"{psutil.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"{memory.total / 2**30:.1f} GiB ({memory.available / 2**30:.1f} free); {bf16(cpu)}"
    )
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        found["gpu"] = f"{gpu.name}, {memory}, CUDA {torch.version.cuda}; {bf16(torch.device('cuda'))}"
    else:
        found["gpu"] = f"none that torch sees (torch built for CUDA {torch.version.cuda or 'not at all'})"
    found["compiler"] = cxx_compiler() or "no C++ compiler found: training.compile stays off on a CPU"
    return found


def bf16(device: torch.device) -> str:
    return "multiplies bf16 natively" if native_bf16(device) else "no bf16 matrix units: bf16 is multiplied in fp32"


def main() -> int:
    """Print the table; 0 if every form is right, 1 if one is not."""
    console = Console(highlight=False, soft_wrap=True)
    for name, value in facts().items():
        console.print(f"{name:<24}{value}")
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    begun, count, wrong = time.perf_counter(), 0, []
    for device in devices:
        for table in tables(device):
            count += len(CASES) * len(DTYPES)
            wrong += check_all(device, table, console)
    console.print(f"\n{count - len(wrong)} of {count} right, in {time.perf_counter() - begun:.0f} s")
    if wrong:
        console.print(f"wrong: {'; '.join(wrong)}. Train with model.kernels = slow (or torch, if only fla is wrong), and "
                      "report this whole page", style="bold red")  # fmt: skip
    return int(bool(wrong))


def check_all(device: torch.device, table: dict[str, ops.Choice], console: Console) -> list[str]:
    """Check and print every case in both types, with the forms that are chosen; those that are wrong."""
    console.print()
    for told in ops.told(table):
        console.print(f"{device.type}, {told}")
    words = ("op", "case", "type", "device", "form", "largest error in", "relative", "limit")
    console.print(line(*words), style="bold")
    wrong = []
    for case in CASES:
        form = table[case.op].name if case.op in table else "torch"
        for dtype in DTYPES:
            right, where, relative = check(case, device, dtype)
            type_name, limit = str(dtype).removeprefix("torch."), f"{tolerance(case, device, dtype):.0e}"
            words = (case.op, case.name, type_name, device.type, form, where, relative, limit)
            console.print(line(*words), "[green]ok[/]" if right else "[bold red]FAIL[/]")
            wrong += [] if right else [f"{case} ({form}, {type_name}, {device.type})"]
    return wrong


def line(*words: str) -> str:
    return " ".join(f"{word:<{width}}" for word, width in zip(words, (*WIDTHS, 6)))
