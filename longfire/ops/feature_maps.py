"""Feature maps: what queries and keys pass before linear attention takes their products
(Katharopoulos 2020, eq. 4)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.ops.linear import Linear, in_fp32

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "swish": F.silu,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x: F.elu(x) + 1,
}
DPFP_ROLLS = 4  # fla's nu


class HadamardMap(nn.Module):
    """Product of two affine maps."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer1 = Linear(size, size)
        self.layer2 = Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(x) * self.layer2(x)


class T2RMap(nn.Module):
    """relu(W x) (Kasai 2021)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


class HedgehogMap(nn.Module):
    """softmax of (2 y, -2 y), y = W x + b that begins as x (Zhang 2024)."""

    own_init = {"layer.weight": lambda weight, generator: nn.init.eye_(weight)}

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * self.layer(x)
        return torch.cat([y, -y], -1).softmax(-1)


class DPFPMap(nn.Module):
    """Products of (relu(x), relu(-x)) with itself rolled by 1 to DPFP_ROLLS places (Schlag 2021,
    eq. 37)."""

    def __init__(self, size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.relu(), (-x).relu()], -1)
        return torch.cat([x * x.roll(places, -1) for places in range(1, DPFP_ROLLS + 1)], -1)


LEARNED: dict[str, type[nn.Module]] = {
    "elementwise_product": HadamardMap,
    "t2r": T2RMap,
    "hedgehog": HedgehogMap,
}
FEATURE_MAPS = (*ACTIVATIONS, *LEARNED, "dpfp")


def feature_map(name: str, size: int) -> Callable[[Tensor], Tensor]:
    """A map of the last dim, of `size` channels, to `feature_size` features; a module where it
    learns."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    return (LEARNED | {"dpfp": DPFPMap})[name](size)


def feature_size(name: str, size: int) -> int:
    return size * {"hedgehog": 2, "dpfp": 2 * DPFP_ROLLS}.get(name, 1)


def sum_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / max(sum |x|, eps) over the last dim."""
    return F.normalize(in_fp32(x), p=1.0, dim=-1, eps=eps).to(x.dtype)
