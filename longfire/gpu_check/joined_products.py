"""Queries, keys and values as one product, and gate and up as one, beside the separate products
that the models have: forward and the gradient of the input, at the sizes of transformer-1b."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from longfire.device import wait

TOKENS = {True: 64, False: 16384}  # True: small
HIDDEN_SIZE = {True: 32, False: 2048}
# Outputs of each product, in multiples of the hidden size
QUERIES_KEYS_VALUES = (1.0, 1.0, 1.0)
GATE_UP = (2.75, 2.75)
REPEATS = 10


def joined_times(device: torch.device, dtype: torch.dtype, is_small: bool) -> dict[str, float]:
    """Seconds of each way, by name."""
    seconds: dict[str, float] = {}
    for name, multiples in (("qkv", QUERIES_KEYS_VALUES), ("gate_up", GATE_UP)):
        hidden_size = HIDDEN_SIZE[is_small]
        widths = [int(multiple * hidden_size) for multiple in multiples]
        x_ND = torch.ones(TOKENS[is_small], hidden_size, device=device, dtype=dtype)
        separate = [torch.ones(width, hidden_size, device=device, dtype=dtype) for width in widths]
        joined = [torch.cat(separate)]
        seconds[f"{name}_separate_seconds"] = median_seconds(x_ND, separate)
        seconds[f"{name}_joined_seconds"] = median_seconds(x_ND, joined)
    return seconds


def products(x_ND: Tensor, weights_WD: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """x times each weight, and the gradient of x where each output's gradient is the output: each
    product adds to what those before gave."""
    outputs = [x_ND @ weight_WD.mT for weight_WD in weights_WD]
    d_x_ND = outputs[0] @ weights_WD[0]
    for y_NW, weight_WD in zip(outputs[1:], weights_WD[1:]):
        d_x_ND.addmm_(y_NW, weight_WD)
    return outputs, d_x_ND


def median_seconds(x_ND: Tensor, weights_WD: Sequence[Tensor]) -> float:
    """Of REPEATS after a first time, which allocates."""
    products(x_ND, weights_WD)
    seconds: list[float] = []
    for _ in range(REPEATS):
        begun = wait(x_ND.device)
        products(x_ND, weights_WD)
        seconds.append(wait(x_ND.device) - begun)
    return statistics.median(seconds)


def described(seconds: dict[str, float]) -> str:
    """How long one product takes beside the separate ones, in words."""
    parts: list[str] = []
    for name, label in (("qkv", "q, k, v"), ("gate_up", "gate, up")):
        joined = seconds[f"{name}_joined_seconds"]
        separate = seconds[f"{name}_separate_seconds"]
        parts.append(f"{label} {1000 * joined:.3g} ms, separate {1000 * separate:.3g} ms")
    return f"as one product {'; '.join(parts)}"
