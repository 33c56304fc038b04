"""Feature maps: what queries and keys pass before linear attention takes their products
(Katharopoulos 2020, eq. 4)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.lazy_table import LazyTable
from longfire.ops.linear import in_fp32

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


# Those that are modules.
MAPS: LazyTable[type[nn.Module]] = LazyTable(
    {
        "elementwise_product": "longfire.ops.feature_map_modules:HadamardMap",
        "t2r": "longfire.ops.feature_map_modules:T2RMap",
        "hedgehog": "longfire.ops.feature_map_modules:HedgehogMap",
        "dpfp": "longfire.ops.feature_map_modules:DPFPMap",
    }
)
FEATURE_MAPS = (*ACTIVATIONS, *MAPS)


def feature_map(name: str, size: int) -> Callable[[Tensor], Tensor]:
    """A map of the last dim, of `size` channels, to `feature_size` features; a module where it
    learns."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    return MAPS[name](size)


def feature_size(name: str, size: int) -> int:
    return size * {"hedgehog": 2, "dpfp": 2 * DPFP_ROLLS}.get(name, 1)


def sum_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / max(sum |x|, eps) over the last dim."""
    return F.normalize(in_fp32(x), p=1.0, dim=-1, eps=eps).to(x.dtype)
