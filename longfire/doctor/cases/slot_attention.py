"""Ways to call ops/slot_attention.py."""

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F

from longfire.doctor.op_cases import STRONG, Case, Draw, Inputs, Sizes
from longfire.ops import slot_attention


def slot_inputs(
    draw: Draw,
    n: Sizes,
    *,
    strong: float = 0.0,
    documents: bool = False,
    groups: int = 1,
) -> Inputs:
    """As many slots as a key has channels; groups: heads of q that share one of all else."""
    heads = (n.B, n.T, n.H // groups)
    g_BTGM = F.logsigmoid(2 * draw.normal(*heads, n.K)) / 8 + strong
    inputs: Inputs = {
        "q_BTHK": draw.normal(n.B, n.T, n.H, n.K),
        "k_BTGK": draw.normal(*heads, n.K) / n.K**0.5,
        "v_BTGV": draw.normal(*heads, n.V),
        "s_BTGM": draw.uniform(*heads, n.K),
        "g_BTGM": g_BTGM,
        "initial_state_BGMX": draw.normal(n.B, n.H // groups, n.K, n.K + n.V) / n.K**0.5,
    }
    if documents:
        inputs["documents"] = draw.documents(n.B, n.T)
    return inputs


def cases() -> Iterator[Case]:
    """Those of `slot_attention`."""
    ways: dict[str, Inputs] = {
        "plain": {},
        "documents": {"documents": True},
        "grouped heads": {"groups": 2, "documents": True},
        f"decay of e^{STRONG:.0f}": {"strong": STRONG},
    }
    for name, options in ways.items():
        yield Case(slot_attention, "slot_attention", name, partial(slot_inputs, **options))
