"""What a segment does to a state that is diagonal plus low rank."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from longfire.ops.documents import Documents, continues
from longfire.ops.dplr import dplr
from longfire.ops.fast import dplr as chunkwise
from longfire.ops.fast import low_rank
from longfire.ops.fast.chunkwise import chunk_size, chunked, segments_of, step_decays
from longfire.ops.linear import working_dtype
from longfire.ops.maps.contract import STATE, Affine, Recurrence, around, folded
from longfire.ops.maps.wide_values import with_wide_values


def dplr_map(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    c_BTHK: Tensor,
    b_BTHK: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float | None = None,
    documents: Documents | None = None,
) -> Affine:
    """Of ops/dplr.py: the maps of chunks, folded up from the left."""

    dtype = working_dtype(k_BTHK)

    def maps() -> Iterator[tuple[Tensor, Tensor]]:
        for k, v, c, b, g, continues_BT in segments_of(
            (k_BTHK, v_BTHV, c_BTHK, b_BTHK, g_BTHK, continues(documents))
        ):
            assert k is not None and v is not None and c is not None and b is not None
            size = chunk_size(k.shape[1])
            decay = chunked(step_decays(g, continues_BT, k), size, fill=1.0)
            c = chunkwise.of_own_document(c, continues_BT)
            k, v, c, b = (chunked(x.to(dtype), size) for x in (k, v, c, b))
            yield chunkwise.chunk_maps(k, v, c, b, decay)

    return folded(maps())


def dplr_around(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    c_BTHK: Tensor,
    b_BTHK: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float | None = None,
    documents: Documents | None = None,
    state_before: Callable[[Affine], Tensor],
) -> Tensor:
    """Outputs alone, of tokens whose state before them follows from their own map (`around`)."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q_BTHK, k_BTHK, v_BTHV, c_BTHK, b_BTHK, g_BTHK, continues(documents))
    return around(partial(chunkwise.work, scale=scale), low_rank.read, inputs, state_before).to(
        q_BTHK.dtype
    )


RECURRENCE = Recurrence(dplr, dplr_map, STATE, dplr_around, with_wide_values)
