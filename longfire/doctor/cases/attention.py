"""Ways to call ops/attention.py."""

from collections.abc import Iterator
from functools import partial

from longfire.doctor.op_cases import Case, Draw, Inputs, Sizes
from longfire.ops import attention
from longfire.ops.fast.attention import BLOCK


def attention_inputs(
    draw: Draw,
    n: Sizes,
    *,
    heads: int = 4,
    queries: float = 1.0,
    longer: int = 0,
    documents: bool = False,
    own_value_size: bool = False,
    skip: bool = False,
    **options: object,
) -> Inputs:
    """heads: G. queries: the share of the S positions that have one, the last ones, which documents
    are of. longer: S beyond T. own_value_size: V is not K.
    skip: another number of keys at the left end of each sequence is hidden."""
    S = n.T + longer
    T = max(1, round(S * queries))
    inputs: Inputs = {
        "q_BTHK": draw.normal(n.B, T, n.H, n.K),
        "k_BSGK": draw.normal(n.B, S, heads, n.K),
        "v_BSGV": draw.normal(n.B, S, heads, n.V if own_value_size else n.K),
        **options,
    }
    if documents:
        inputs["documents"] = draw.documents(n.B, T)
    if skip:
        inputs["skip_B"] = (draw.uniform(n.B) * (S - T + 1)).long()
    return inputs


def cases() -> Iterator[Case]:
    """Those of `attention`."""
    whole: dict[str, Inputs] = {
        "causal": {},
        "grouped heads": {"heads": 2},
        "own value size, own scale": {"own_value_size": True, "scale": 0.3},
        "window": {"window": 9},
        "window, longer than a block": {"window": 40, "longer": BLOCK, "heads": 1},
        "documents": {"documents": True},
        "window, documents, 1 kv head": {"window": 9, "documents": True, "heads": 1},
        "queries are the last third": {"queries": 1 / 3, "heads": 2},
        "the last third, window": {"queries": 1 / 3, "window": 9},
    }
    for name, options in whole.items():
        yield Case(attention, "attention", name, partial(attention_inputs, **options))
