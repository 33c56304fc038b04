"""Ways to call ops/dplr.py."""

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F

from longfire.doctor.op_cases import STRONG, Case, Draw, Inputs, Sizes
from longfire.ops import dplr


def dplr_inputs(
    draw: Draw,
    n: Sizes,
    *,
    strong: float = 0.0,
    documents: bool = False,
    state: bool = True,
) -> Inputs:
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
    }
    if state:
        inputs["initial_state_BHKV"] = draw.normal(n.B, n.H, n.K, n.V)
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def cases() -> Iterator[Case]:
    """Those of `dplr`."""
    ways: dict[str, Inputs] = {
        "vector decay": {},
        "vector decay, documents": {"documents": True},
        f"vector decay of e^{STRONG:.0f}": {"strong": STRONG},
    }
    for name, options in ways.items():
        yield Case(dplr, "dplr", name, partial(dplr_inputs, **options))
