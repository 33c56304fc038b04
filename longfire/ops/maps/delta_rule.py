"""What a segment does to the state of the delta rule."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from longfire.ops.delta_rule import delta_rule
from longfire.ops.documents import Documents, continues
from longfire.ops.fast import delta_rule as chunkwise
from longfire.ops.fast import low_rank
from longfire.ops.fast.chunkwise import chunk_size, chunked, segments_of, step_decays
from longfire.ops.linear import working_dtype
from longfire.ops.maps.contract import STATE, Affine, Recurrence, around, folded
from longfire.ops.maps.wide_values import with_wide_values


def delta_rule_map(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    documents: Documents | None = None,
) -> Affine:
    """Of ops/delta_rule.py: the maps of chunks, folded up from the left."""

    dtype = working_dtype(k_BTHK)

    def maps() -> Iterator[tuple[Tensor, Tensor]]:
        for k, v, beta, g_, continues_BT in segments_of(
            (k_BTHK, v_BTHV, beta_BTH[..., None], g, continues(documents))
        ):
            assert k is not None and v is not None and beta is not None
            size = chunk_size(k.shape[1])
            decay = chunked(step_decays(g_, continues_BT, k), size, fill=1.0)
            k, v, beta = (chunked(x.to(dtype), size) for x in (k, v, beta))
            yield chunkwise.chunk_maps(k, v, beta, decay)

    return folded(maps())


def delta_rule_around(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    documents: Documents | None = None,
    state_before: Callable[[Affine], Tensor],
) -> Tensor:
    """Outputs alone, of tokens whose state before them follows from their own map (`around`)."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], g, continues(documents))
    return around(partial(chunkwise.work, scale=scale), low_rank.read, inputs, state_before).to(
        q_BTHK.dtype
    )


RECURRENCE = Recurrence(delta_rule, delta_rule_map, STATE, delta_rule_around, with_wide_values)
