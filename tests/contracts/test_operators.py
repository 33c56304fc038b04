"""Each operator of our own tells torch.compile the reference: shapes, strides, what it mutates, however its inputs lie in memory.

A stride that the shape function states and the operator does not keep shows only where the compiler happens to lay an input
out another way: it stopped a compiled backward of Mamba-2.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from worlds import in_processes

from longfire.ops import blockwise
from longfire.ops.fast import chunkwise, low_rank, selective_scan, value_tree
from longfire.parallel import collectives

B, N, H, T, C, K, V = 2, 3, 2, 2 * selective_scan.TOKENS - 3, 8, 4, 6


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


key_BCK, value_BCV, pairs_BCC = rand(B, C, K), rand(B, C, V), rand(B, C, C)
key_BCJK = key_BCK[:, :, None]  # of J = 1 key
rows_BNHCK, state_BHKV = rand(B, N, H, C, K), rand(B, H, K, V)
selective = [rand(B, T, V), rand(B, T, V), -rand(V, K), rand(B, T, K), rand(B, T, K)]
starts_BT = rand(B, T) < 0.1
q_BTHK, k_BTGK, v_BTGV, o_BTHV, lse_BHT = (
    rand(B, 9, 4, K),
    rand(B, 9, H, K),
    rand(B, 9, H, V),
    rand(B, 9, 4, V),
    rand(B, 4, 9),
)
ids_BT, how = (
    torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]).expand(B, -1),
    list(blockwise.How(1.0, query_chunk=4, key_chunk=3)),
)

CALLS = {
    chunkwise.decay_tree: [(key_BCK, [key_BCK, key_BCK], [key_BCK])],
    chunkwise.decay_tree_backward: [
        (key_BCK, [key_BCK], [key_BCK], [key_BCK[:, :1], key_BCJK, key_BCJK, pairs_BCC[:, None]]),
    ],
    value_tree.value_tree: [(pairs_BCC, value_BCV, value_BCV)],
    value_tree.value_tree_backward: [(pairs_BCC, value_BCV, value_BCV, [value_BCV] * 3)],
    chunkwise.scan: [
        (rand(B, N, H, K, K), rand(B, N, H, K, V), rand(B, H, K, V), True),
        (rand(B, N, H, K, 1), rand(B, N, H, K, V), rand(B, H, K, V), False),
        (rand(1, N, 1, 1, 1), rand(B, 1, H, K, V).expand(B, N, H, K, V), rand(B, H, K, V), False),
    ],
    low_rank.scan_low_rank: [
        (
            rand(B, N, H, K, 1),
            rows_BNHCK,
            rand(B, N, H, C, V),
            rows_BNHCK,
            rand(B, N, H, K, V),
            state_BHKV,
            True,
        ),
        (rand(1, N, 1, 1, 1), rows_BNHCK, rand(B, N, H, C, V), rows_BNHCK, None, state_BHKV, False),
    ],
    selective_scan.scan_tokens: [
        (*selective, rand(B, K, V), starts_BT),
        (*selective, rand(B, K, V), None),
    ],
    selective_scan.scan_tokens_backward: [
        (selective, starts, rand(2, B, K, V), rand(B, T, V), rand(B, K, V))
        for starts in (starts_BT, None)
    ],
    blockwise.attend_blocks: [(q_BTHK, k_BTGK, v_BTGV, ids, None, how) for ids in (None, ids_BT)],
    blockwise.attend_blocks_backward: [
        (o_BTHV, q_BTHK, k_BTGK, v_BTGV, o_BTHV, lse_BHT, ids, None, how) for ids in (None, ids_BT)
    ],
}
COLLECTIVES = (
    collectives.summed,
    collectives.highest,
    collectives.gathered,
    collectives.scattered,
)  # with the name of a group
# Those that Triton's kernels compute, where another test has imported them: tests/triton_interpreter
OF_KERNELS = set()
for name in ("fla", "scan_by_kernels", "attend_with_dropout"):
    OF_KERNELS |= {f"longfire::{name}", f"longfire::{name}_backward"}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "last two dims swapped": lambda x: x.mT.contiguous().mT,
    "first two dims swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other of a wider one": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def laid(arguments, layout):
    """The same values, matrices and above laid out by `layout`."""
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(laid(x, layout) for x in arguments)
    return layout(arguments) if isinstance(arguments, Tensor) and arguments.dim() > 1 else arguments


def operators() -> set[str]:
    names = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("longfire::")
    }
    return names - OF_KERNELS


def test_every_operator_is_among_the_cases():
    assert operators() == {operator._qualname for operator in (*CALLS, *COLLECTIVES)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", CALLS, ids=lambda operator: operator._qualname)
def test_shapes_and_strides_are_as_stated(operator, layout):
    for call in CALLS[operator]:
        torch.library.opcheck(
            operator, laid(call, LAYOUTS[layout]), test_utils=("test_schema", "test_faketensor")
        )


def check_collectives(rank: int) -> None:
    name = collectives.known_as(dist.group.WORLD)
    for operator in COLLECTIVES:
        for layout in LAYOUTS.values():
            for x in (rand(B, T, V), rand(1, T, V)):  # one row: a dim of size 1 has any stride
                torch.library.opcheck(
                    operator, (laid(x, layout), name), test_utils=("test_schema", "test_faketensor")
                )


def test_shapes_and_strides_between_processes_are_as_stated():
    in_processes(1, check_collectives)
