"""What mixers and MLPs declare of how their parameters are split (`roles`), as lists of them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from longfire.mixers.mixer import Mixer
    from longfire.mlps.contract import MLP
    from longfire.model import Model

# role -> equal parts, each of which is split by itself: 1, but 2 for a matrix that makes two
# things; 0: every process has the whole
ROLES = {
    "column": 1,
    "kv_head": 1,
    "head": 1,
    "halves": 2,
    "norm": 1,
    "row": 1,
    "inner_row": 1,
    "replicate": 0,
}
ROWS = ("row", "inner_row")  # split by columns, the matrix's inputs


def named_regions(model: "Model") -> Iterator[tuple["Mixer | MLP", str]]:
    """Each mixer with the name that layer_types gives it, each MLP with its own."""
    for block, mixer, mlp in zip(model.layers, model.config.layer_types, model.config.mlp_types):
        yield block.mixer, mixer
        if block.mlp is not None:
            yield block.mlp, f"mlp {mlp}"


def split_leaves(region: "Mixer | MLP", tp: int) -> list[tuple[str, int, int]]:
    """Parameters that the roles split over tp processes: name, dim, and equal parts of it that are
    split each by itself."""
    found: list[tuple[str, int, int]] = []
    for name, role in region.roles.items():
        parts = ROLES[role]
        if not parts or (role == "kv_head" and shares_kv_heads(region, tp)):
            continue
        for leaf in leaves(region, name):
            # the bias of a row matrix is added to the sum of what all have made
            if role in ROWS and leaf.endswith(".bias"):
                continue
            found.append((leaf, int(role in ROWS), parts))
    return found


def shares_kv_heads(region: "Mixer | MLP", tp: int) -> bool:
    """Whether several of tp processes have queries of one key/value head, which each of them
    makes."""
    if "kv_head" not in region.roles.values():
        return False
    kv_heads = region.kv_heads
    return kv_heads < tp and tp % kv_heads == 0


def leaves(region: nn.Module, name: str) -> list[str]:
    """Names of the parameters that a role speaks of; none where these settings have none."""
    found: list[str] = []
    for leaf, _ in region.named_parameters():
        if leaf == name or leaf.startswith(f"{name}."):
            found.append(leaf)
    return found
