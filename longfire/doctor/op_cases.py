"""What a way to call a fast op is, and how far the op may be from its reference: what
`longfire doctor` runs on a user's machine, and the tests here.

The reference runs in float64 on the same rounded inputs, so that what is compared is the fast
form's own rounding.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longfire.ops.bf16 import native_bf16
from longfire.ops.documents import Documents

DTYPES = (torch.float32, torch.bfloat16)
# log decay of a step: e^-20 a token leaves exp(64 * 20) between the ends of a chunk, far beyond
# fp32
STRONG = -20.0
# Inputs that are fp32 in every model.
FP32 = {
    "g",
    "g_BTHK",
    "g_BTGM",
    "gv",
    "beta_BTH",
    "A_DN",
    "initial_state_BHKV",
    "initial_state_BGMX",
    "initial_state_BDN",
    "weight_DW",
    "bias_D",
    "state_BDW",
    "weight_WD",
}


# Log decays. The gradient of one is a sum of q dq - k dk (v dv of values) over later tokens (Yang
# 2023, GLA, appendix C), so that its rounding is that of these products, however little is left.
DECAYS = ("d g", "d g_BTHK", "d g_BTGM", "d gv")
FACTORS_OF_DECAYS = ("q_BTHK", "k_BTHK", "v_BTHV", "s_BTGM")


class Sizes(NamedTuple):
    """B, T, H, K, V, W of the cases. T is more than a chunk of 64 and no multiple of anything."""

    B: int
    T: int
    H: int
    K: int
    V: int
    W: int


SIZES = {
    "cpu": Sizes(2, 83, 4, 16, 24, 97),
    "cuda": Sizes(2, 331, 4, 64, 128, 1009),
}


class Draw:
    """Random inputs, drawn on the CPU in float64, so that every device and type sees the same
    numbers."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Of mean 0 and variance 1."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """From 0 to 1."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def documents(self, B: int, T: int) -> Documents:
        """About one document start in 16 tokens, other places in each sequence; the second
        sequence is one document."""
        starts_BT = self.uniform(B, T) < 1 / 16
        starts_BT[1:2] = False
        return Documents.from_ids(starts_BT.long().cumsum(1))


# Arguments by name: float64 tensors, and what is no tensor (documents, window, labels).
Inputs = dict[str, Any]


def nothing_missing(device: torch.device) -> str:
    return ""


class Case(NamedTuple):
    """One way to call an op. The fast form is `module.<op>`, the reference `module.<op>_reference`,
    looked up when called. missing: why a device cannot run it; "" if it can."""

    module: ModuleType
    op: str
    name: str
    inputs: Callable[[Draw, Sizes], Inputs]
    missing: Callable[[torch.device], str] = nothing_missing

    def __str__(self) -> str:
        return f"{self.op}, {self.name}"


def results(op: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs, and the gradient of every floating input through all of them, for fixed random
    gradients of the outputs."""
    leaves: dict[str, Tensor] = {}
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            leaves[name] = x.detach().requires_grad_()
    outputs = op(**{**inputs, **leaves})
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    found: dict[str, Tensor] = {}
    for name, output in zip(("output", "second output"), outputs):
        found[name] = output.detach()
    for name, gradient in zip(leaves, gradients_of(outputs, list(leaves.values()))):
        found[f"d {name}"] = gradient
    return found


def gradients_of(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> Sequence[Tensor]:
    """Of fixed random gradients of the outputs; zeros where no output depends on a leaf."""
    draw = Draw(seed=1)
    differentiable: list[Tensor] = []
    seeds: list[Tensor] = []
    for output in outputs:
        # eighths: exact in bf16, the same for all
        seed = draw.normal(*output.shape).mul(8).round().div(8).to(output)
        if output.requires_grad:
            differentiable.append(output)
            seeds.append(seed)
    if not differentiable:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(
        differentiable,
        leaves,
        seeds,
        allow_unused=True,
        materialize_grads=True,
    )


def moved(
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
) -> Inputs:
    """The inputs on a device, their values rounded to dtype; those that a model keeps in fp32 are
    of that type still."""

    def one(name: str, x: object) -> object:
        if isinstance(x, Documents):
            return x.to(device)
        if not isinstance(x, Tensor):
            return x
        x = x.to(device)
        if not x.is_floating_point():
            return x
        if name in FP32 and dtype != torch.float64:
            return x.to(dtype).float()
        return x.to(dtype)

    return {name: one(name, x) for name, x in inputs.items()}


def errors(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes | None = None,
    seed: int = 0,
    floor: float = 0.0,
) -> dict[str, float]:
    """max |fast - reference| / scale of each output and gradient; infinite where the fast form is
    not finite. The scale is max |reference|, and of a decay's gradient what it is a difference of,
    where that is larger.

    sizes: those of SIZES if None.  floor: a result below this share of the largest one is what is
    left of larger numbers, and its error is relative to that share.
    """
    inputs = case.inputs(Draw(seed), sizes or SIZES[device.type])
    rounded = moved(inputs, device, dtype)
    exact = in_fp64(rounded)
    got = results(getattr(case.module, case.op), rounded)
    true = results(getattr(case.module, f"{case.op}_reference"), exact)
    largest_of = scales(exact, true)
    least = max(1e-30, floor * float(max(largest_of.values())))
    found: dict[str, float] = {}
    for name, largest in largest_of.items():
        difference = (got[name].double() - true[name]).abs().max()
        found[name] = torch.inf
        if difference.isfinite():
            found[name] = float(difference / largest.clamp_min(least))
    return found


def scales(inputs: Inputs, true: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an error of each result that is not empty is relative to."""
    found: dict[str, Tensor] = {}
    for name, x in true.items():
        if x.numel():
            found[name] = x.abs().max()
    for decay in DECAYS:
        for name in FACTORS_OF_DECAYS:
            if decay in found and f"d {name}" in found:
                product = (inputs[name].detach() * true[f"d {name}"]).abs().max()
                found[decay] = torch.maximum(found[decay], product)
    return found


def in_fp64(inputs: Inputs) -> Inputs:
    """The inputs with their floating numbers in float64."""
    found: Inputs = {}
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.double()
        found[name] = x
    return found


def tolerance(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int | None = None,
) -> float:
    """The largest error that rounding explains, relative to the largest value.

    u is half a unit in the last place. A result is rounded to its type (u of it). Sums over T
    tokens are fp32 everywhere: their errors walk at random, sqrt(T) u. Products are fp32 too, but
    for attention, which multiplies in the type of its inputs where the device can, and for CUDA's
    kernels, which multiply fp32 in TF32 (10 bits): independent errors of u each, so u of their sum.
    The factors 4 and 16 are for the handful of roundings in a row (the delta rule solves a system),
    and for the largest of thousands.
    """
    fp32 = torch.finfo(torch.float32).eps / 2
    u = torch.finfo(dtype).eps / 2
    products = fp32
    if case.op.startswith("attention") and native_bf16(device):
        products = u
    if device.type == "cuda":
        products = max(u, 2**-11)
    rounding = 4 * u if u > fp32 else 0
    sums = 4 * fp32 * (tokens or SIZES[device.type].T) ** 0.5
    return rounding + 16 * products + sums
