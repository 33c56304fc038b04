"""Feature maps that are modules (ops/feature_maps.py)."""

import torch
from torch import Tensor, nn

from longfire.ops.feature_maps import DPFP_ROLLS
from longfire.ops.linear import Linear


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
